"""Encoders: the fast one is used only where it gives the reference's ids; pieces of huge documents join exactly."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from open_lm.data.tokenizer import Tokenizer, load_tokenizer
from open_lm.errors import ConfigError, DataError
from open_lm.preprocess import encoding
from open_lm.preprocess.encoder_choice import choose_encoder
from open_lm.preprocess.encoding import DocumentEncoder, FastEncoder, ReferenceEncoder, cut_safely

NEOX = SHARED / "data" / "gpt-neox-20b-tokenizer.json"


@pytest.fixture(scope="module")
def neox():
    return load_tokenizer(str(NEOX))


@needs_shared
def test_end_of_text_and_padding_come_from_the_tokenizer(neox):
    assert (neox.eot_id, neox.pad_id, neox.vocab_size) == (0, 1, 50277)
    assert neox.token_of(neox.eot_id) == "<|endoftext|>"


@needs_shared
@given(st.text(max_size=200))
@settings(deadline=None)
def test_text_comes_back_byte_for_byte(neox, text):
    normal = neox._backend.normalizer.normalize_str(text) if neox._backend.normalizer else text
    assert neox.decode(neox.encode(text)) == normal


@pytest.fixture(scope="module")
def fast(neox):
    pytest.importorskip("fastokens")
    return FastEncoder(neox)


@needs_shared
@given(st.lists(st.text(max_size=300), max_size=8))
@settings(max_examples=200, deadline=None)
def test_the_fast_encoder_equals_the_reference_on_any_text(neox, fast, texts):
    assert encoding.first_difference(ReferenceEncoder(neox), fast, texts) is None


@needs_shared
def test_documents_are_each_followed_by_end_of_text(neox):
    encoded = DocumentEncoder(neox, "tokenizers", np.dtype("<u2")).encode(["a b", "", "c"])[0]
    assert encoded.tolist() == [*neox.encode("a b"), 0, 0, *neox.encode("c"), 0]
    assert encoded.dtype == np.uint16


@needs_shared
@pytest.mark.parametrize("piece", [200, 1000])
def test_huge_documents_in_pieces_have_the_ids_of_the_whole(neox, piece):
    text = (SHARED / "data" / "text" / "tinyshakespeare.txt").read_text()[:10_000] + "日本語 テスト\n\n  x " * 100
    pieces = cut_safely(ReferenceEncoder(neox), text, piece)
    assert len(pieces) > 3 and "".join(pieces) == text
    assert [i for p in pieces for i in neox.encode(p)] == neox.encode(text)


@needs_shared
def test_a_document_without_a_safe_place_stays_whole(neox):
    assert cut_safely(ReferenceEncoder(neox), "x" * 5000, 100) == ["x" * 5000]


def metaspace():
    """A tokenizer whose words depend on what is before them: cutting at a word's end would add a `▁`."""
    model = tokenizers.models.BPE(vocab={"▁": 0, "a": 1, "</s>": 2, "▁a": 3}, merges=[("▁", "a")])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return Tokenizer(backend, "metaspace")


def test_pieces_are_only_cut_where_it_changes_nothing():
    tokenizer, text = metaspace(), "a\na a\n" * 300
    pieces = cut_safely(ReferenceEncoder(tokenizer), text, 100)
    assert [i for p in pieces for i in tokenizer.encode(p)] == tokenizer.encode(text)


class Lying(ReferenceEncoder):
    """A fast encoder that is wrong about one word."""

    name = "fastokens"

    def encode(self, texts):
        return super().encode([text.replace("zebra", "horse") for text in texts])


@needs_shared
def test_an_encoder_that_differs_on_the_users_text_is_not_used(neox, monkeypatch):
    assert choose_encoder(neox, "tokenizers", [])[0] == "tokenizers"
    monkeypatch.setattr(encoding, "FastEncoder", Lying)
    assert choose_encoder(neox, "auto", ["a lion"])[0] == "fastokens"
    name, why = choose_encoder(neox, "auto", ["a lion", "a zebra"])
    assert name == "tokenizers" and "a zebra" in why
    with pytest.raises(ConfigError, match=r"--encoder fastokens: .*zebra"):
        choose_encoder(neox, "fastokens", ["a zebra"])


@needs_shared
def test_what_an_encoder_proved_is_remembered_for_its_tokenizer_and_versions(neox, monkeypatch, tmp_path):
    from importlib import metadata

    pytest.importorskip("fastokens")
    memory, tried = tmp_path / "cache" / "proofs.json", []

    def sample():
        tried.append(1)
        yield "a lion"

    def choose(tokenizer=neox, wanted="auto"):
        return choose_encoder(tokenizer, wanted, sample(), memory)[0]

    assert choose() == choose() == choose(wanted="fastokens") == "fastokens"
    assert len(tried) == 1
    assert choose(metaspace()) == "tokenizers" == choose(metaspace()), "what failed is tried again"
    assert len(tried) == 3
    monkeypatch.setattr(metadata, "version", lambda package: "99")
    assert choose() == "fastokens" and len(tried) == 4, "another version proves itself again"
    memory.write_bytes(b"garbage")
    assert choose() == "fastokens" and len(tried) == 5
    monkeypatch.setattr(encoding, "FastEncoder", Lying)
    memory.unlink()
    assert choose_encoder(neox, "auto", ["a zebra"], memory)[0] == "tokenizers" and not memory.exists()


@needs_shared
def test_an_encoder_that_errs_later_is_caught_by_the_check_on_the_way(neox, monkeypatch):
    monkeypatch.setattr(encoding, "FastEncoder", Lying)
    documents = DocumentEncoder(neox, "fastokens", np.dtype("<u2"))
    documents.encode(["a zebra in the zoo"])
    with pytest.raises(DataError, match=r"--encoder fastokens.*--encoder tokenizers"):
        documents.encode(["a zebra in the zoo"] * 3000)


def test_a_missing_fast_encoder_is_no_error_unless_asked_for(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "fastokens", None)
    name, why = choose_encoder(metaspace(), "auto", [])
    assert name == "tokenizers" and "pip install fastokens" in why
    with pytest.raises(ConfigError, match="pip install fastokens"):
        choose_encoder(metaspace(), "fastokens", [])


@pytest.mark.parametrize(
    ("content", "match"), [(None, "no such file"), ("{", "not a tokenizer.json"), ('{"a": 1}', "not a tokenizer.json")]
)
def test_what_is_no_tokenizer_is_said_with_the_flag(tmp_path, content, match):
    path = tmp_path / "tokenizer.json"
    if content:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"--tokenizer .*tokenizer\.json: {match}"):
        load_tokenizer(str(path))


def test_a_tokenizer_without_end_of_text_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        Tokenizer(backend, "bare")


@needs_shared
def test_a_folder_with_a_tokenizer_json_or_a_whole_hf_folder_will_do(neox, tmp_path):
    (tmp_path / "tokenizer.json").write_text(neox.to_json())
    assert load_tokenizer(str(tmp_path)).encode("some text") == neox.encode("some text")
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.encode("some text"), loaded.eot_id, loaded.pad_id) == (neox.encode("some text"), 0, 1)
