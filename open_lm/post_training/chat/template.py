"""Chat templates: messages become text, and the parts of it that the assistant speaks are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import ConfigError
from open_lm.post_training.chat.conversations import ANSWERING, Message

_TULU = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '' if loop.last else '\n' }}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
BUILT_IN = {"tulu": _TULU, "chatml": _CHATML, "plain": _PLAIN}
"""Templates by name. plain: the texts one after the other, end of text after each answer; nothing else."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as text, and the [start, end) of what is trained on in it, in characters."""

    text: str
    spans: list[tuple[int, int]]


class TemplateRefusal(Exception):
    """A conversation that the template does not take, such as one that begins with the assistant."""


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja template and the special tokens it may name."""

    source: str
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what the assistant generates."""
        return bool(_GENERATION.search(self.source))

    def render(self, messages: Sequence[Message], n_given: int = 0) -> Rendered:
        """The text, and the answers among the messages from number `n_given` on.

        Where the template does not mark them, an answer is what its message adds to the text before it and the
        beginning of an answer.

        Raises:
            TemplateRefusal: the template does not take these messages.
            ConfigError: it does not mark answers, and what it writes depends on later messages.
        """
        if self.marks_answers:
            text, spans = self._rendered(messages, mark=True)
            answering = [k for k, message in enumerate(messages) if message["role"] == ANSWERING]
            if len(spans) == len(answering):
                spans = [span for span, number in zip(spans, answering, strict=True) if number >= n_given]
            return Rendered(text, [(start, end) for start, end in spans if end > start])
        text = self._rendered(messages)[0]
        numbers = [k for k, message in enumerate(messages) if message["role"] == ANSWERING and k >= n_given]
        return Rendered(text, [span for k in numbers if (span := self._added(text, messages, k))])

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the assistant's next answer follows."""
        return self._rendered(messages, add_generation_prompt=True)[0]

    def _added(self, text: str, messages: Sequence[Message], number: int) -> tuple[int, int] | None:
        """The [start, end) of what message `number` adds; None where that is nothing."""
        before = self._rendered(messages[:number], add_generation_prompt=True)[0]
        upto = self._rendered(messages[: number + 1])[0]
        if not text.startswith(upto) or not upto.startswith(before):
            raise ConfigError(
                "--chat-template: what it writes for a message depends on those after it, so the answers cannot be "
                "told from the text. Put {% generation %}…{% endgeneration %} around them in the template."
            )
        end = len(upto)
        closed = upto.rstrip()
        if any(closed.endswith(token) for token in self.tokens.values()):  # a line break behind the closing token
            end = len(closed)
        return (len(before), end) if end > len(before) else None

    def _rendered(
        self, messages: Sequence[Message], *, mark: bool = False, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            render: Any = render_jinja_template
            texts, spans = render(
                [list(messages)],
                chat_template=self.source,
                return_assistant_tokens_mask=mark,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"--chat-template: line {error.lineno} is no jinja ({error.message}).") from error
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise TemplateRefusal(str(error)) from error
        return texts[0], [(start, end) for start, end in spans[0]] if mark and spans else []


def load_template(named: str | None, tokenizer: Tokenizer, stored: str | None = None) -> ChatTemplate:
    """The template that `--chat-template` names: a built-in one, a file, or (None) the source that a checkpoint has
    `stored`, else the tokenizer's own, else tulu.

    Raises:
        ConfigError: there is no such file.
    """
    tokens = {**tokenizer.special_tokens}
    tokens.setdefault("eos_token", tokenizer.token_of(tokenizer.eot_id) or "")
    if named is None:
        return ChatTemplate(stored or tokenizer.chat_template or BUILT_IN["tulu"], tokens)
    if named in BUILT_IN:
        return ChatTemplate(BUILT_IN[named], tokens)
    path = Path(named).expanduser()
    if not path.is_file():
        raise ConfigError(f"--chat-template {named}: no such file. Give one, or one of {', '.join(BUILT_IN)}.")
    return ChatTemplate(path.read_text(), tokens)


def unmarked(source: str) -> str:
    """A template without its marks of answers, which only training needs and llama.cpp does not know."""
    return _MARKS.sub("", source)


def template_facts(template: ChatTemplate) -> dict[str, Any]:
    """The ledger's entry of a template."""
    return {"chat_template": template.source, "marks_answers": template.marks_answers}
