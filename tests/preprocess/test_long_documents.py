"""Documents of any size: decoded and encoded piece by piece, with the ids of the whole, in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import open_lm.preprocess.encoding as encoding
import open_lm.preprocess.long_text as long_text
from open_lm.data.tokenizer import load_tokenizer
from open_lm.preprocess.encoding import DocumentEncoder, Unsplittable
from open_lm.preprocess.input import document_text, line_document, whole_document
from open_lm.preprocess.jsonl import Line, Rejected
from open_lm.preprocess.long_text import LongText

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
ROWS = st.dictionaries(TEXTS, TEXTS | st.integers(0, 9) | st.lists(TEXTS, max_size=2) | st.none(), max_size=4)


@pytest.fixture
def tiny(monkeypatch):
    """Everything is long, pieces are short."""
    monkeypatch.setattr(long_text, "_STRING_BYTES", 5)
    monkeypatch.setattr(long_text, "_PIECE_BYTES", 16)


def as_long(content):
    found = long_text.long_document(content, "text")
    return "".join(found.pieces()) or Rejected("empty") if isinstance(found, LongText) else found


@given(row=ROWS, text=TEXTS, ascii_only=st.booleans())
def test_a_long_line_gives_what_a_short_one_gives(row, text, ascii_only):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "_STRING_BYTES", 5)
        patch.setattr(long_text, "_PIECE_BYTES", 16)
        content = json.dumps({**row, "text": text}, ensure_ascii=ascii_only).encode()
        assert as_long(content) == document_text(Line(5, content), "text")


@given(content=st.binary(max_size=60) | st.binary(max_size=40).map(lambda b: b'{"text": "' + b + b'"}'))
def test_any_bytes_are_rejected_alike_or_give_the_same_text(content):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "_STRING_BYTES", 5)
        patch.setattr(long_text, "_PIECE_BYTES", 16)
        assert as_long(content) == document_text(Line(5, content), "text")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "aaaaaaaa\\ud800bbbbbbbbb"}', "malformed_json"),
        (b'{"text": "aaaaaaaa\\x00bbbbbbbbb"}', "malformed_json"),
        (b'{"text": "aaaaaaa\xff bbbbbbbbbb"}', "invalid_utf8"),
        (b'{"text": "aaaaaaaaaaaaaaaa', "malformed_json"),
        (b'{"other": "aaaaaaaaaaaaaaaa"}', "missing_key"),
        (b'{"text": ["aaaaaaaaaaaaaaaa"]}', "not_text"),
        (b'["aaaaaaaaaaaaaaaa"]', "missing_key"),
    ],
)
def test_what_is_wrong_with_a_long_line_is_said(tiny, content, reason):
    assert long_text.long_document(content, "text") == Rejected(reason) == document_text(Line(5, content), "text")


@pytest.fixture(scope="module")
def neox():
    path = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gpt-neox-20b-tokenizer.json"
    if not path.exists():
        pytest.skip("needs ../shared/data/gpt-neox-20b-tokenizer.json")
    return load_tokenizer(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "The naïve fox 👍🏽 jumps over\n\n  12 lazy dogs. " * 40,
        "日本語の文章です。空白はありません、" * 60,
        "x9Zq7" * 300,
        "don't   stop\t\t\n" * 60,
    ],
)
@pytest.mark.parametrize("piece", [50, 333])
def test_a_document_in_pieces_has_the_ids_of_the_whole(neox, tiny, monkeypatch, text, piece):
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(encoding.pieces_of, "__defaults__", (piece,))
    monkeypatch.setattr(encoding, "_MARGIN", 40)
    line = json.dumps({"text": text}).encode()
    documents = DocumentEncoder(neox, "tokenizers", np.dtype("<u2"))
    found = long_text.long_document(line, "text")
    ids, ends = documents.encode_long(found)
    assert ids.tolist() == documents.encode([text])[0].tolist() == [*neox.encode(text), neox.eot_id]
    assert ends.tolist() == [len(ids)]
    assert len(list(encoding.pieces_of(documents._encoder, found.pieces(), piece))) > len(text) // (4 * piece)


def test_a_document_without_a_place_to_cut_is_rejected_before_it_fills_the_memory(neox, tiny, monkeypatch):
    monkeypatch.setattr(encoding, "_LONGEST_STRETCH", 5000)
    monkeypatch.setattr(encoding.pieces_of, "__defaults__", (500,))
    documents = DocumentEncoder(neox, "tokenizers", np.dtype("<u2"))
    with pytest.raises(Unsplittable):
        documents.encode_long(LongText(memoryview(b"a" * 20_000), escaped=False))


def test_text_files_and_their_byte_order_mark(monkeypatch):
    import open_lm.preprocess.input as inputs

    monkeypatch.setattr(inputs, "LONG_BYTES", 4)
    for content in (b"\xef\xbb\xbfhello there", b"hello there"):
        assert "".join(whole_document(Line(0, content)).pieces()) == "hello there"
        assert "".join(line_document(Line(0, b'\xef\xbb\xbf{"text": "hi"}'), "text")) == "hi"
    assert whole_document(Line(0, b"hello \xff there")) == Rejected("invalid_utf8")


MEMORY = """
import sys
def peak_kib():  # ru_maxrss begins with that of the process this one was forked from
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
from open_lm.preprocess.tokenize import tokenize
sys.argv = ["prepare", "--input-files", {path!r}, "--output-dir", {out!r}, "--tokenizer", {tokenizer!r},
            "--num-workers", "1", "--encoder", {encoder!r}]
from open_lm.commands.prepare import main
import open_lm.preprocess.make, open_lm.data.tokenizer, fastokens
before = peak_kib()
main(sys.argv[1:])
print("grown", (peak_kib() - before) >> 10)
"""


@pytest.mark.slow
def test_a_document_of_57_mib_takes_little_more_than_its_line(tmp_path):
    pytest.importorskip("fastokens")
    tokenizer = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gpt-neox-20b-tokenizer.json"
    if not tokenizer.exists():
        pytest.skip("needs ../shared/data/gpt-neox-20b-tokenizer.json")
    words = np.random.default_rng(0).integers(0, 5000, 60_000)
    line = " ".join(f"w{word:x}or{word % 7}" for word in words)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + (line + "\\n") * (60_000_000 // len(line)) + '\U0001f600"}\n')
    small = tmp_path / "small.jsonl"
    small.write_text(json.dumps({"text": line[:100_000]}) + "\n")
    base, whole = (peak_mib(tmp_path, file, tokenizer) for file in (small, path))
    print("a line of", path.stat().st_size >> 20, "MiB:", whole - base, "MiB more than a short one")
    assert whole - base < 300, "it was 462 MiB"


def peak_mib(tmp_path, path, tokenizer):
    args = {"path": str(path), "out": str(tmp_path / path.stem), "tokenizer": str(tokenizer), "encoder": "fastokens"}
    done = subprocess.run([sys.executable, "-c", MEMORY.format(**args)], capture_output=True, text=True, check=True)
    return int(done.stdout.rpartition("grown")[2])
