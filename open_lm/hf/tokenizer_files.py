"""Tokenizer of an export: which one goes with a checkpoint, and its files for every version of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_lm.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_near
from open_lm.errors import ConfigError
from open_lm.post_training.chat.template import load_template, unmarked

CLASS = "PreTrainedTokenizerFast"
"""The class that all versions of transformers have for a tokenizer.json."""


def tokenizer_of(named: str | None, facts: Mapping[str, Any], checkpoint: str) -> Tokenizer | None:
    """The tokenizer that --tokenizer names, else the one that the checkpoint names; None where there is none.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if named == "none":
        return None
    stored = (facts.get("config") or {}).get("tokenizer")
    if named or not stored:
        return load_tokenizer(named) if named else None
    try:
        return load_tokenizer(tokenizer_near(stored, checkpoint))
    except ConfigError as error:
        raise ConfigError(
            f"the checkpoint was made with the tokenizer {stored}, which is not found ({error}). Give --tokenizer, or "
            "--tokenizer none to leave it out."
        ) from error


def with_chat_template(
    tokenizer: Tokenizer | None, named: str | None, stored: str | None = None, *, marked: bool
) -> Tokenizer | None:
    """The tokenizer with the template that --chat-template names, else the `stored` one of the checkpoint's data, else
    its own; `marked`: with marks of answers.

    Raises:
        ConfigError: there is no such template, or no tokenizer whose files it would go into.
    """
    if tokenizer is None:
        if named:
            raise ConfigError("--chat-template goes into the tokenizer's files: leave out --tokenizer none.")
        return None
    source = load_template(named, tokenizer).source if named else stored or tokenizer.chat_template
    found = copy.copy(tokenizer)
    found.chat_template = source if marked or source is None else unmarked(source)
    return found


def add_tokenizer(tokenizer: Tokenizer, theirs: Any, folder: Path) -> None:
    """Put the tokenizer into `folder`: special tokens, chat template, and its ids into the configs of `theirs`."""
    from tokenizers import Tokenizer as Backend
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    special = special_tokens(tokenizer)
    ids: dict[str, int | None] = {"eos_token_id": tokenizer.eot_id, "pad_token_id": tokenizer.pad_id}
    if "bos_token" in special:
        ids["bos_token_id"] = Backend.from_str(tokenizer.to_json()).token_to_id(special["bos_token"])
    for name, value in ids.items():
        setattr(theirs.config, name, value)
    theirs.generation_config = GenerationConfig(**ids)
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(tokenizer.to_json()),
        **special,
        model_max_length=theirs.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = tokenizer.chat_template
    made.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": CLASS}, indent=2) + "\n")


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens by transformers' names: those the tokenizer came with, end of text and padding always."""
    values = json.loads(tokenizer.to_json())
    unknown = values["model"].get("unk_token")
    return {
        **({"unk_token": unknown} if isinstance(unknown, str) else {}),
        **{name: token for name, token in tokenizer.special_tokens.items() if name in ("bos_token", "unk_token")},
        "eos_token": tokenizer.token_of(tokenizer.eot_id) or "",
        "pad_token": tokenizer.token_of(tokenizer.pad_id) or "",
    }
