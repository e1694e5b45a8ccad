"""Odd names of inputs, files of one JSON array, and many files at once."""

import gzip
import json
import os
import resource

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_lm import storage
from open_lm.commands.tokenizer import sample
from open_lm.errors import DataError
from open_lm.preprocess import hub_dataset
from open_lm.preprocess.hub_dataset import HubFile, _apart, _json_lines, _matches
from open_lm.preprocess.json_array import array_rows, is_array
from open_lm.preprocess.jsonl import expand_inputs

LINE = b'{"text": "a document"}\n'


def test_a_folder_with_signs_in_its_name_is_that_folder(tmp_path):
    for name in ("a[1]", "a1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_bytes(LINE)
    assert expand_inputs((str(tmp_path / "a[1]"),), "--input-files") == [str(tmp_path / "a[1]" / "a[1].jsonl")]
    file = str(tmp_path / "a[1]" / "a[1].jsonl")
    assert expand_inputs((file,), "--input-files") == [file]


@pytest.mark.parametrize("pattern", ["", "out.json", "*.json"])
def test_a_folder_named_as_a_file_is_read_as_the_files_in_it(tmp_path, pattern):
    (tmp_path / "out.json").mkdir()
    for name in ("part-0.json", "part-1.json", "_SUCCESS", ".part-0.json.crc"):
        (tmp_path / "out.json" / name).write_bytes(LINE)
    found = expand_inputs((str(tmp_path / pattern),), "--input-files")
    assert [os.path.basename(path) for path in found] == ["part-0.json", "part-1.json"]


def test_a_name_that_is_no_utf_8_is_prepared_and_said(tmp_path, make_2048, tokenizer_json, capsys):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "wb") as file:
        file.write(orjson.dumps({"text": "hello " * 500}) + b"\n")
    flags = ["--input-files", str(tmp_path), "--tokenizer", str(tokenizer_json), "--seqlen", "15"]
    ledger = make_2048([*flags, "--output-dir", str(tmp_path / "out")])
    assert ledger["documents"]["tokenized"] == 1
    assert storage.from_text(ledger["job"]["inputs"][0][0]) == os.fsdecode(path)
    assert orjson.loads((tmp_path / "out" / "ledger.json").read_bytes())["documents"] == ledger["documents"]
    assert storage.shown(os.fsdecode(path)).endswith("caf\\xe9.jsonl")
    assert "\\xe9" not in capsys.readouterr().out


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_names_come_back_as_they_were(name):
    odd = os.fsdecode(name.encode() + b"\xff")
    assert storage.from_text(storage.to_text(name)) == name
    assert storage.from_text(orjson.loads(orjson.dumps(storage.to_text(odd)))) == odd


def test_a_tokenizer_is_learned_from_more_files_than_may_be_open(tmp_path):
    paths = []
    for k in range(300):
        paths.append(str(tmp_path / f"{k:03}.jsonl"))
        (tmp_path / f"{k:03}.jsonl").write_bytes(orjson.dumps({"text": f"{k:03}" * 10}) + b"\n")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 80, before[1]))
    try:
        everything, half = sample(paths, "text", 1 << 20), sample(paths, "text", 150 * 30)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(everything) == 300
    assert 150 <= len(half) <= 160 and half[-1][:3] > "250"  # from all of them, evenly


def test_a_long_document_is_learned_from_too(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(orjson.dumps({"text": "word " * 1_000_000}) + b"\n")
    assert [len(text) for text in sample([str(tmp_path / "a.jsonl")], "text", 1 << 24)] == [5_000_000]


def test_files_of_the_hub_that_would_become_one_file_stay_apart():
    paths = ["en/x.json.gz", "en/x.jsonl", "en--x.parquet", "fr/x.jsonl"]
    files = _apart([HubFile("d", "r", path) for path in paths])
    assert len({file.output for file in files}) == 4
    assert files[3].output == "fr--x.jsonl.zst", "only names that collide change"


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("data/*.parquet", "data/x.parquet", True),
        ("data/*.parquet", "data/fr/x.parquet", False),
        ("data/**/*.parquet", "data/fr/x.parquet", True),
        ("data/**/*.parquet", "data/x.parquet", True),
        ("**/*.jsonl", "x.jsonl", True),
        ("data/**", "data/a/b.jsonl", True),
        ("en/x-?[0-9].json", "en/x-a7.json", True),
        ("en/x.json", "en/xyjson", False),
    ],
)
def test_globs_of_cards_stay_in_their_folder(pattern, path, fits):
    assert _matches(path, pattern) is fits


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=8), st.sampled_from([None, 1, 3]), st.integers(1, 50), st.booleans())
def test_the_elements_of_an_array_are_its_lines_wherever_it_is_cut(tmp_path_factory, rows, indent, piece, packed):
    import open_lm.preprocess.json_array as module

    content = json.dumps(rows, indent=indent).encode()
    path = tmp_path_factory.mktemp("array") / ("x.json.gz" if packed else "x.json")
    path.write_bytes(gzip.compress(content) if packed else content)
    before, module._PIECE = module._PIECE, piece
    try:
        found = list(array_rows(str(path)))
    finally:
        module._PIECE = before
    assert is_array(str(path)) and [json.loads(row) for row in found] == rows
    assert not any(b"\n" in row or b"\r" in row for row in found)


@pytest.mark.parametrize("content", [b"[", b"[{}", b"[{},", b"[{},]", b"[{} {}]", b"[{}] 1", b'["\xff"]', b"[{1}]"])
def test_a_damaged_array_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json: its JSON array, after \d elements"):
        list(array_rows(str(tmp_path / "x.json")))


def test_an_array_of_the_hub_becomes_lines(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    monkeypatch.setattr(hub_dataset.HubFile, "url", property(lambda self: str(tmp_path / self.path)))
    lines = list(_json_lines(HubFile("d", "r", "x.json")))
    assert [orjson.loads(line) for line in lines] == [{"text": "a"}, {"text": "b"}]


def test_an_array_as_input_of_prepare_is_told_from_a_damaged_line(make_2048, tmp_path, tokenizer_json):
    (tmp_path / "x.json").write_text(json.dumps([{"text": "a"}]))
    flags = ["--tokenizer", str(tokenizer_json), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(DataError, match="a JSON array, where each line should be an object"):
        make_2048(["--input-files", str(tmp_path / "x.json"), *flags])
