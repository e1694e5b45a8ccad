"""Tokenizers: text to ids and back with any Hugging Face tokenizer, in bounded memory."""

from __future__ import annotations

import hashlib
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from open_lm import storage
from open_lm.errors import ConfigError

END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
PADDING_NAMES = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


class Tokenizer:
    """A tokenizer with its end-of-text and padding ids. Encoding adds no special tokens and cuts nothing off.

    `chat_template` is its jinja template, None where it has none; `special_tokens` those that a template may name.
    """

    def __init__(
        self,
        backend: Any,
        name: str,
        *,
        eot_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        self.name, self._backend = name, backend
        self.chat_template, self.special_tokens = chat_template, dict(special_tokens or {})
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eot_id = self._end_of_text(eot_token)
        self.pad_id = self._first_known([pad_token, *PADDING_NAMES], self.eot_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores (TOKENIZERS_PARALLELISM=false: on one)."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued: with what the tokenizer puts before it (BOS), none after it."""
        plain = self.encode(text)
        whole = self._backend.encode_batch_fast([text], add_special_tokens=True)[0].ids  # `encode` would hold the GIL
        n_before = next((k for k in range(len(whole) - len(plain) + 1) if whole[k : k + len(plain)] == plain), 0)
        return whole[: n_before + len(plain)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids (n,) of each text, and the [start, end) of each token's characters in it (n, 2)."""
        found = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int64), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in found]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, end of text among them."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset([self.eot_id, *(number for number, token in added.items() if token.special)])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_of(self, token_id: int) -> str | None:
        """Spelling of one id in the vocabulary."""
        return self._backend.id_to_token(token_id)

    def to_json(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json."""
        return self._json

    @cached_property
    def _json(self) -> str:
        return self._backend.to_str()

    @cached_property
    def fingerprint(self) -> str:
        """A short text that two tokenizers share only if they are the same."""
        return "b2:" + hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def _end_of_text(self, named: str | None) -> int:
        found = self._first_known([named, *END_OF_TEXT_NAMES], -1)
        if found < 0:
            raise ConfigError(
                f"--tokenizer {self.name}: no end-of-text token (looked for {', '.join(END_OF_TEXT_NAMES)}). "
                "Add one to the tokenizer."
            )
        return found

    def _first_known(self, tokens: Sequence[str | None], otherwise: int) -> int:
        ids = (self._backend.token_to_id(token) for token in tokens if token)
        return next((i for i in ids if i is not None), otherwise)


def load_tokenizer(name_or_path: str, *, at_hand: bool = False) -> Tokenizer:
    """The tokenizer of a hub id, a local Hugging Face folder, or a tokenizer.json file.

    With `at_hand` nothing is fetched: a hub id must have been downloaded before.

    Raises:
        ConfigError: there is none, it is not a fast tokenizer, or it has no end-of-text token.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return _from_file(path, name_or_path)
    if path.is_dir() and not (path / "tokenizer_config.json").exists() and (path / "tokenizer.json").exists():
        return _from_file(path / "tokenizer.json", name_or_path)
    if not path.is_dir() and (name_or_path.endswith(".json") or name_or_path.startswith((".", "/", "~"))):
        raise ConfigError(f"--tokenizer {name_or_path}: no such file. Give a tokenizer.json, a folder or a hub id.")
    return _from_transformers(name_or_path, at_hand)


def tokenizer_near(named: str, checkpoint: str) -> str:
    """The location of the tokenizer that a checkpoint or a manifest names, which stores the name as it was given."""
    return storage.found_near(named, checkpoint)


def _from_file(path: Path, name: str) -> Tokenizer:
    import tokenizers

    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), name)
    except ConfigError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise ConfigError(f"--tokenizer {name}: not a tokenizer.json ({error}). Check the file.") from None


def hub_answers() -> bool:
    """Whether the Hub can be reached. Its client tries each of several files six times, which takes a minute where a
    name is mistyped and there is no network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return not constants.HF_HUB_OFFLINE
    hub = urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), timeout=10).close()
    except OSError:
        return False
    return True


def _from_transformers(name: str, at_hand: bool) -> Tokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_local = Path(name).expanduser().is_dir()
    reachable = is_local or at_hand or hub_answers()
    where: dict[str, Any] = {"local_files_only": at_hand or not reachable}
    try:
        try:
            loaded = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False, **where)
        except ValueError:  # its config names code of its own, which is never run: the tokenizer's file needs none
            loaded = PreTrainedTokenizerFast.from_pretrained(name, **where)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not reachable:
            reason = "no such folder here, not in the Hub's cache either, and the Hub cannot be reached"
        raise ConfigError(
            f"--tokenizer {name}: cannot be loaded ({reason}). Give a hub id that can be reached, "
            "a local folder, or a tokenizer.json file."
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(f"--tokenizer {name}: has no fast (Rust) form. Give one with a tokenizer.json.")
    template = getattr(loaded, "chat_template", None)
    return Tokenizer(
        loaded.backend_tokenizer,
        name,
        eot_token=loaded.eos_token,
        pad_token=loaded.pad_token,
        chat_template=template if isinstance(template, str) else None,
        special_tokens={key: value for key, value in loaded.special_tokens_map.items() if isinstance(value, str)},
    )
