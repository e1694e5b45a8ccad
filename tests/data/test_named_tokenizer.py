"""The tokenizer that data sets name."""

import logging
import socket
import time

import pytest

from open_lm.data.manifest import Shard
from open_lm.data.sources import Source, named_tokenizer
from open_lm.data.tokenizer import load_tokenizer
from open_lm.errors import ConfigError


def source(*tokenizers):
    return Source("s", tuple(Shard(str(k), f"{k}.tar", 1, tokenizer=name) for k, name in enumerate(tokenizers)))


def test_the_one_that_every_manifest_names_is_taken():
    assert named_tokenizer([source("a", None), source("a")]) == "a"
    assert named_tokenizer([source(None)]) is None
    assert named_tokenizer([]) is None


def test_of_two_none_is_taken_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert named_tokenizer([source("a"), source("b")]) is None
    assert "(a, b): give --tokenizer" in caplog.text


def test_a_mistyped_folder_is_refused_at_once_where_the_hub_cannot_be_reached(monkeypatch):
    with socket.socket() as taken:  # bound and not listening: a connection is refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("urllib.request.getproxies", dict)
        start = time.monotonic()
        with pytest.raises(ConfigError, match=r"--tokenizer out/tokenzier: .*no such folder here.*cannot be reached"):
            load_tokenizer("out/tokenzier")
    assert time.monotonic() - start < 10  # the Hub's client alone would try for a minute
