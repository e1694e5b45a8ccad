"""The bytes of a text are the sum over its tokens, whatever the tokenizer and wherever a text is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from icl_setup import tiny_tokenizer
from shared import SHARED
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from open_lm.data.token_bytes import token_bytes
from open_lm.data.tokenizer import Tokenizer, load_tokenizer

NEOX = SHARED / "data" / "gpt-neox-20b-tokenizer.json"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@given(st.text())
def test_byte_level_tokens_add_up_to_the_bytes_of_any_text(byte_level, text):
    counts = token_bytes(byte_level)
    assert sum(counts[i] for i in byte_level.encode(text)) == len(text.encode())


def test_special_tokens_stand_for_no_text(byte_level):
    counts = token_bytes(byte_level)
    assert counts[byte_level.eot_id] == counts[byte_level.pad_id] == 0
    assert len(counts) == byte_level.vocab_size


@pytest.mark.skipif(not NEOX.exists(), reason="needs ../shared")
def test_gpt_neox_with_its_added_runs_of_spaces():
    tokenizer = load_tokenizer(str(NEOX))
    counts = token_bytes(tokenizer)
    text = "def f(x):\n        return '日本 é 🤖'\n" + " " * 25 + "x\t\u200b"
    assert sum(counts[i] for i in tokenizer.encode(text)) == len(text.encode())


def sentence_piece():
    """Llama 2's kind: spaces as ▁, one put before the text, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, "sentence piece")


@given(st.text("ab é日", min_size=1))
def test_sentence_piece_counts_the_space_it_puts_before_a_text(text):
    tokenizer = sentence_piece()
    counts = token_bytes(tokenizer)
    assert sum(counts[i] for i in tokenizer.encode(text)) == len(text.encode()) + 1
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_whose_tokens_have_no_bytes_of_their_own_is_not_guessed():
    backend = Backend(models.WordPiece({"[UNK]": 0, "</s>": 1, "a": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert token_bytes(Tokenizer(backend, "word piece")) is None
    assert json.loads(backend.to_str())["decoder"]["type"] == "WordPiece"
