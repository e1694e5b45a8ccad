"""Flat token arrays: written, read by the loader, and refused where they cannot be what they are taken for."""

import csv
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.data.shards import write_shard
from open_lm.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def read(url, n_steps, vocab_size=1000, batch=4, workers=0):
    kind = "auto" if workers else "npy"  # auto knows them by their ending
    config = DataConfig(train_data=(str(url),), dataset_type=kind, workers=workers)
    shape = {"vocab_size": vocab_size, "seq_len": 4, "global_batch": batch}
    return list(build_loader(config, **shape, rank=0, world_size=1, seed=0, n_steps=n_steps).batches(0, n_steps))


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
@pytest.mark.parametrize("workers", [0, 1])
def test_every_whole_sample_of_the_arrays_is_read_once(tmp_path, vocab_size, workers):
    dtype = "<u2" if vocab_size == 1000 else "<u4"
    for k, n in enumerate((43, 62)):  # 8 samples and 3 ids, 12 samples and 2 ids
        (np.arange(n) + 100 * k).astype(dtype).tofile(tmp_path / f"{k}.npy")
    batches = read(tmp_path / "*.npy", 5, vocab_size, workers=workers)
    rows = np.concatenate([np.c_[b.inputs_BT, b.targets_BT[:, -1]] for b in batches])
    expected = [list(range(s + base, s + base + 5)) for base, n in ((0, 8), (100, 12)) for s in range(0, 5 * n, 5)]
    assert sorted(rows.tolist()) == expected


def test_more_steps_than_samples_is_said(tmp_path):
    np.arange(43, dtype="<u2").tofile(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"3 steps of 4 need 12 sequences.*gives 8"):
        read(tmp_path / "a.npy", 3)


@pytest.mark.parametrize(
    ("content", "vocab_size", "match"),
    [
        (np.arange(200, dtype="<u4").tobytes(), 1000, "looks like uint32"),
        (np.full(200, 1500, "<u2").tobytes(), 1000, "id 1500 as uint16 is outside a vocabulary of 1000"),
        (np.full(200, 1500, "<u2").tobytes(), 100_000, "as uint32 is outside a vocabulary of 100000"),
        (b"\x00" * 201, 1000, "201 bytes"),
        (b"\x93NUMPY\x01\x00v\x00" + b" " * 200, 1000, "with a header"),
        (b"\x01\x00" * 4, 1000, "4 ids make no sample of 5"),
    ],
)
def test_what_cannot_be_such_an_array_is_refused(tmp_path, content, vocab_size, match):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.npy: .*{match}"):
        read(tmp_path / "a.npy", 1, vocab_size)


def test_an_id_outside_the_vocabulary_deep_inside_is_named_when_it_is_read(tmp_path):
    tokens = np.zeros(40_000, "<u2")
    tokens[30_000] = 2000
    tokens.tofile(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"a\.npy, sample 6000: token id 2000"):
        read(tmp_path / "a.npy", 2000)


def test_flat_arrays_have_no_manifest():
    with pytest.raises(ConfigError, match="--dataset-type npy"):
        DataConfig(dataset_manifest=("a",), dataset_type="npy")


def test_shards_are_exported_as_olmo_stores_them(tmp_path):
    spec = importlib.util.spec_from_file_location("export_npy", ROOT / "datapreprocess" / "export_npy.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    samples = np.array([[5, 6, 0, 7, 8], [9, 0, 0, 1, 2]], "<u2")
    with open(tmp_path / "s.tar", "wb") as file:
        write_shard(file, samples, "json")
    args = ["--input", str(tmp_path / "s.tar"), "--output-dir", str(tmp_path / "out"), "--vocab-size", "100"]
    assert script.main(args) == 10
    assert np.fromfile(tmp_path / "out" / "s.npy", "<u2").tolist() == samples.ravel().tolist()
    with gzip.open(tmp_path / "out" / "s.csv.gz", "rt") as file:
        spans = [(int(row[0]), int(row[1])) for row in csv.reader(file)]
    assert spans == [(0, 3), (3, 7), (7, 8), (8, 10)]
    assert len(read(tmp_path / "out" / "s.npy", 1, vocab_size=100, batch=2)) == 1
    with pytest.raises(DataError, match="outside a vocabulary of 9"):
        script.main([*args, "--vocab-size", "9"])


def documents_of(tmp_path, end_of_text, name="a"):
    """An array of 24 documents of 8 ids, the last of each `end_of_text`, and its table."""
    tokens = np.tile(np.array([3, 0, 4, 5, 6, 7, 8, end_of_text], "<u2"), 24)
    tokens.tofile(tmp_path / f"{name}.npy")
    rows = "".join(f"{8 * k},{8 * k + 8},id{k},file.jsonl.gz,{k + 1}\n" for k in range(24))
    (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress(rows.encode()))


def masked(tmp_path, **flags):
    config = DataConfig(train_data=(f"{tmp_path}/*.npy",), doc_mask=True, workers=0, **flags)
    shape = {"vocab_size": 1000, "seq_len": 15, "global_batch": 12}
    batch = next(build_loader(config, **shape, rank=0, world_size=1, seed=0).batches(0, 1))
    return batch.documents_BT.tolist()


def test_dolmas_table_says_where_documents_end(tmp_path):
    documents_of(tmp_path, 9)
    assert masked(tmp_path) == [[0] * 8 + [1] * 7] * 12, "id 0 is an id like any other here"
    assert masked(tmp_path, doc_mask_token=0)[0] == [0, 0] + [1] * 8 + [2] * 5


def test_without_a_table_id_0_ends_documents_as_in_openlms_shards(tmp_path):
    documents_of(tmp_path, 9)
    (tmp_path / "a.csv.gz").unlink()
    assert masked(tmp_path)[0] == [0, 0] + [1] * 8 + [2] * 5


def test_tables_that_disagree_or_are_damaged_are_refused(tmp_path):
    documents_of(tmp_path, 9)
    documents_of(tmp_path, 10, "b")
    with pytest.raises(ConfigError, match=r"several ends of text, \[9, 10\]"):
        masked(tmp_path)
    for content, match in (
        (gzip.compress(b"start,end\n"), "no table of start,end"),
        (b"garbage", "no table of start,end"),
        (gzip.compress(b"0,8,x,y,1\n" * 9)[:-9], "no table of start,end"),
        (gzip.compress(b""), "names no documents"),
        (gzip.compress(b"0,1\n1,2\n2,3\n"), r"by .* end with several ids \(\[0, 3\]\)"),
    ):
        (tmp_path / "b.csv.gz").write_bytes(content)
        with pytest.raises(DataError, match=match):
            masked(tmp_path)
