"""A tokenizer of letters."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A tokenizer of letters, its end-of-text token 0."""
    letters = ["<|endoftext|>", "<|padding|>", *"abcdefghijklmnopqrstuvwxyz "]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(letters[:2])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
