"""Raw files: whatever is in them, the exact lines come out or an error names the file; never a silent loss."""

import gzip
import json
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.errors import DataError, StorageError
from open_lm.preprocess.input import document_text, sample_texts
from open_lm.preprocess.jsonl import (
    Line,
    Rejected,
    estimated_text_bytes,
    expand_inputs,
    read_lines,
)

LINES = st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=30)
PACK = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


def written(content, ending):
    path = Path(tempfile.mkdtemp()) / f"a{ending}"
    path.write_bytes(PACK[ending](content))
    return str(path)


def contents(url, **kwargs):
    return [line.content for line in read_lines(url, **({"max_line_bytes": 1000} | kwargs))]


@pytest.mark.parametrize("ending", PACK)
@given(lines=LINES, last_end=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_lines_of_a_file_are_read_as_they_are(ending, lines, last_end):
    content = b"\n".join(lines) + b"\n" * last_end
    expected = content.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    assert contents(written(content, ending)) == [line.rstrip(b"\r") for line in expected]


@pytest.mark.parametrize("ending", PACK)
@given(lines=LINES, step=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_blocks_cut_anywhere_hold_every_line_exactly_once(ending, lines, step):
    content = b"\n".join(lines) + b"\n"
    url = written(content, ending)
    whole = list(read_lines(url, max_line_bytes=1000))
    blocks = [list(read_lines(url, start=k, stop=k + step, max_line_bytes=1000)) for k in range(0, len(content), step)]
    assert [line for block in blocks for line in block] == whole


@given(lines=LINES, limit=st.integers(1, 29))
@settings(max_examples=60, deadline=None)
def test_longer_lines_are_said_to_be_too_long_and_the_next_is_whole(lines, limit):
    found = contents(written(b"".join(line + b"\n" for line in lines), ".jsonl"), max_line_bytes=limit)
    assert found == [None if len(line) > limit else line.rstrip(b"\r") for line in lines]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_packed_file_that_is_cut_is_an_error_with_its_name(ending, data):
    whole = PACK[ending](b'{"text": "some words"}\n' * 50)
    cut = data.draw(st.integers(1, len(whole) - 1))
    path = Path(written(b"", ".jsonl")).with_name(f"cut{ending}")
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=rf"cut{ending}: cut off at byte {cut}"):
        contents(str(path))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_packed_file_with_a_flipped_bit_gives_the_exact_lines_or_an_error(ending, data):
    content = b"".join(b'{"text": "line %d"}\n' % k for k in range(40))
    packed = (
        zstandard.ZstdCompressor(write_checksum=True).compress(content) if "zst" in ending else gzip.compress(content)
    )
    damaged = bytearray(packed)
    damaged[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = Path(written(b"", ".jsonl")).with_name(f"flipped{ending}")
    path.write_bytes(damaged)
    try:
        found = contents(str(path))
    except DataError:
        with pytest.raises(DataError, match=f"flipped{ending}"):
            contents(str(path))
    else:
        assert found == content.splitlines()


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=50, deadline=None)
def test_garbage_that_calls_itself_packed_is_an_error(ending, garbage):
    path = Path(written(b"", ".jsonl")).with_name(f"garbage{ending}")
    path.write_bytes(garbage)
    with pytest.raises(DataError, match=f"garbage{ending}"):
        contents(str(path))


def test_a_bomb_is_read_in_small_pieces(tmp_path):
    import tracemalloc

    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(zstandard.compress(bytes(200 << 20)))
    tracemalloc.start()
    assert contents(str(path)) == [None]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20


@given(
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.dictionaries(st.text(), inner))
)
@settings(max_examples=100, deadline=None)
def test_any_json_gives_its_text_or_a_reason(value):
    found = document_text(Line(5, json.dumps(value).encode()), "text")
    if isinstance(value, dict) and isinstance(value.get("text"), str) and value["text"]:
        assert found == value["text"]
    else:
        assert isinstance(found, Rejected)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_text_a_blank_or_a_reason(content):
    found = document_text(Line(5, content), "text")
    assert (found is None) == (not content.strip()) or isinstance(found, Rejected | str)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 5000, "malformed_json"),
        (b'{"text": "\\ud800"}', "malformed_json"),
        (b'{"text": NaN}', "malformed_json"),
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b'{"text": ""}', "empty"),
        (b'["text"]', "missing_key"),
        (b'{"text": ["a"]}', "not_text"),
    ],
)
def test_reasons(content, reason):
    assert document_text(Line(5, content), "text") == Rejected(reason)


def test_a_byte_order_mark_is_not_part_of_the_first_line():
    assert document_text(Line(0, b'\xef\xbb\xbf{"text": "a"}'), "text") == "a"


def test_files_are_found_by_path_glob_and_folder_sorted_and_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.jsonl.zst", "readme.md"):
        (tmp_path / name).write_bytes(b"")
    found = expand_inputs((str(tmp_path), f"{tmp_path}/*.jsonl", str(tmp_path / "b.jsonl")), "--input-files")
    assert [Path(url).name for url in found] == ["a.jsonl.gz", "b.jsonl", "c.jsonl.zst"]
    with pytest.raises(StorageError, match="--input-files"):
        expand_inputs((str(tmp_path / "none*"),), "--input-files")


def test_a_sample_of_the_users_text_stays_small_and_skips_what_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * 500 + '"}\nbroken\n{"text": "short"}\n' * 100)
    texts = list(sample_texts([str(path)], "text", max_characters=2000))
    assert 500 < sum(map(len, texts)) <= 2000


@pytest.mark.parametrize("ending", PACK)
def test_how_much_text_there_is_is_known_well_enough_for_a_progress_bar(ending):
    content = b"".join(b'{"text": "line %d"}\n' % (k * 7919) for k in range(400_000))
    url = written(content, ending)
    assert estimated_text_bytes([(url, Path(url).stat().st_size)]) == pytest.approx(len(content), rel=0.1)
