"""The choice of the encoder: the fast one where it proves itself exact, remembered for tokenizer and versions."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from open_lm import storage
from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import ConfigError, StorageError
from open_lm.preprocess import encoding

_TRAPS = (
    "", " ", "  \n\n  x ", "\x00\x1f\x7f", "naïve e\u0301 日本語 한국어 👍🏽 \u200b\ufeff", "don't I'LL 's", "a" * 3000,
    "1234567890 3.14 1e-5",
    "\r\n\t\r", "<|endoftext|>", "x<|endoftext|> y<|padding|>", "=" * 100 + " " * 99 + "-", "ﬁ ½ Ⅷ",
)  # fmt: skip


def choose_encoder(
    tokenizer: Tokenizer, wanted: str, sample: Iterable[str], memory: Path | None = None
) -> tuple[str, str]:
    """The encoder to use, and why: the fast one when its ids are the reference's on `sample` and on known traps.

    What it proved is kept in the file `memory`, and is not tried again with the same tokenizer and versions; each
    process that encodes goes on to compare about one document in a thousand.

    Raises:
        ConfigError: `wanted` is fastokens, and it is not installed, cannot load the tokenizer, or is not exact.
    """
    if wanted == "tokenizers":
        return wanted, "as asked"
    proofs, name = _read(memory), _name(tokenizer)
    if name in proofs:
        return "fastokens", f"same ids as tokenizers on {proofs[name]}, when these versions were first used"
    texts = [*_TRAPS, *sample]
    problem = _problem(tokenizer, texts)
    if problem is None:
        n_bytes = sum(len(text.encode()) for text in texts)
        tried = f"{len(texts)} documents ({n_bytes:,} bytes)"
        _write(memory, {**_read(memory), name: tried})
        return "fastokens", f"same ids as tokenizers on {tried}"
    if wanted == "fastokens":
        raise ConfigError(f"--encoder fastokens: {problem}. Use --encoder auto or tokenizers.")
    return "tokenizers", problem


def memory_file() -> Path:
    """The file of proofs: in $OPEN_LM_CACHE, else in the user's cache folder."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("OPEN_LM_CACHE") or caches / "open_lm") / "exact_encoders.json"


def _name(tokenizer: Tokenizer) -> str:
    """The tokenizer, what was tried on it, and the versions of both encoders."""
    versions = []
    for package in ("fastokens", "tokenizers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    traps = hashlib.blake2b(repr(_TRAPS).encode(), digest_size=4).hexdigest()
    return " ".join([tokenizer.fingerprint, traps, *versions])


def _read(memory: Path | None) -> dict[str, Any]:
    if memory is not None:
        with contextlib.suppress(OSError, orjson.JSONDecodeError, TypeError):
            return dict(orjson.loads(memory.read_bytes()))
    return {}


def _write(memory: Path | None, proofs: dict[str, Any]) -> None:
    if memory is not None:
        with contextlib.suppress(StorageError):  # it is only tried again
            storage.write_bytes(str(memory), orjson.dumps(proofs))


def _problem(tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    try:
        fast = encoding.FastEncoder(tokenizer)
    except ImportError:
        return "fastokens, which is much faster, is not installed (pip install fastokens)"
    except Exception as error:  # whatever the Rust library says about a tokenizer it does not know
        return f"fastokens cannot load this tokenizer ({error})"
    different = encoding.first_difference(encoding.ReferenceEncoder(tokenizer), fast, texts)
    return None if different is None else f"fastokens gives other ids for {texts[different][:60]!r}"
