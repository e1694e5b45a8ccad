"""Which tokenizer the data themselves name."""

import logging

from open_lm.data.manifest import Shard
from open_lm.data.sources import Source, named_tokenizer


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
