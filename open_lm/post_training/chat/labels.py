"""Labels of conversations: the tokens of many at once, and which of them are trained on, in one pass over the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from open_lm.data.marks import START, UNTRAINED, joined
from open_lm.data.tokenizer import Tokenizer
from open_lm.post_training.chat.conversations import ANSWERING, Conversation
from open_lm.post_training.chat.template import ChatTemplate, Rendered, TemplateRefusal
from open_lm.preprocess.jsonl import Rejected


class Labelled(NamedTuple):
    """A conversation as ids with their marks joined (data/marks.py), and whether an end of text had to be added."""

    tokens: np.ndarray
    added_end: bool = False

    @property
    def n_trained(self) -> int:
        """Targets: the first token is none, nothing predicts it."""
        return n_targets(self.tokens)


def n_targets(tokens: np.ndarray) -> int:
    """Number of these tokens with marks that are targets of those before them."""
    return int((tokens[1:] >> 28 == 0).sum())


def label_all(
    conversations: Sequence[Conversation], template: ChatTemplate, tokenizer: Tokenizer
) -> list[Labelled | Rejected]:
    """Each conversation as labelled tokens, or the reason why it gives none.

    A token is trained on when it holds a character of an answer. Where the last answer ends without a special token,
    end of text follows it and is trained on: else the model would never learn to stop.
    """
    rendered: list[Rendered | Rejected] = [_render(conversation, template) for conversation in conversations]
    good = [one for one in rendered if isinstance(one, Rendered)]
    encoded = iter(tokenizer.encode_with_offsets([one.text for one in good]))
    labelled: list[Labelled | Rejected] = []
    for conversation, one in zip(conversations, rendered, strict=True):
        if isinstance(one, Rejected):
            labelled.append(one)
            continue
        ids, offsets = next(encoded)
        ends_with_answer = conversation.messages[-1]["role"] == ANSWERING
        labelled.append(_labelled(one.spans, ids, offsets, tokenizer, ends_with_answer=ends_with_answer))
    return labelled


def _render(conversation: Conversation, template: ChatTemplate) -> Rendered | Rejected:
    try:
        rendered = template.render(conversation.messages, conversation.n_given)
    except TemplateRefusal:
        return Rejected("template_refuses")
    return rendered if rendered.spans else Rejected("nothing_rendered")


def _labelled(
    spans: Sequence[tuple[int, int]],
    ids: np.ndarray,
    offsets: np.ndarray,
    tokenizer: Tokenizer,
    *,
    ends_with_answer: bool,
) -> Labelled | Rejected:
    if not len(ids):
        return Rejected("nothing_rendered")
    is_trained = np.zeros(len(ids), bool)
    for start, end in spans:
        is_trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    add_end = ends_with_answer and int(ids[-1]) not in tokenizer.special_ids and is_trained[-1]
    if add_end:
        ids, is_trained = np.append(ids, tokenizer.eot_id), np.append(is_trained, True)
    marks = np.where(is_trained, 0, UNTRAINED).astype(np.uint8)
    marks[0] |= START | UNTRAINED
    found = Labelled(joined(ids, marks), bool(add_end))
    return found if found.n_trained else Rejected("no_target")
