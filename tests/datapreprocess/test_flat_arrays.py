"""make_2048 --format npy-flat: flat arrays and their .csv.gz as dolma writes them; every document where it says."""

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import orjson
import pytest
import tokenizers

from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.errors import ConfigError


@pytest.fixture
def build(make_2048, raw, tmp_path, tokenizer_json, texts, monkeypatch):
    """`build(*flags)`: the ledger and folder of two raw files, one packed, in blocks of 2000 bytes."""
    from open_lm.preprocess import job

    monkeypatch.setattr(job, "choose_block_bytes", lambda total: 2000)
    files = [
        raw("a.jsonl", [{"id": f"a{k}", "text": text} for k, text in enumerate(texts[:40])] + [{"text": ""}]),
        raw("b.jsonl.zst", [{"id": k, "text": text} for k, text in enumerate(texts[40:80])]),
        raw("c.jsonl", [{"id": "one, \"quoted\"", "text": "small"}]),
        raw("d.jsonl", ["nameless"]),
    ]  # fmt: skip

    def run(*flags, folder=None):
        folder = folder or tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        common = ["--tokenizer", str(tokenizer_json), "--output-dir", str(folder), "--seqlen", "15"]
        ledger = make_2048(["--input-files", *files, *common, "--format", "npy-flat", "--shard-size", "100", *flags])
        return ledger, folder

    return run


def documents(folder, dtype):
    """(id, source, line, ids) of all documents, those cut by the end of an array joined again."""
    found = []
    for path in sorted(folder.glob("*.npy")):
        tokens = np.fromfile(path, dtype)
        with gzip.open(f"{path.with_suffix('')}.csv.gz", "rt", newline="") as file:
            rows = [(int(start), int(end), *rest) for start, end, *rest in csv.reader(file)]
        assert [row[0] for row in rows] == [0, *(row[1] for row in rows[:-1])] and rows[-1][1] == len(tokens)
        for start, end, name, source, line in rows:
            ids = tokens[start:end].tolist()
            if found and found[-1][:3] == (name, source, int(line)) and found[-1][3][-1] != 0:
                ids = found.pop()[3] + ids
            found.append((name, source, int(line), ids))
    return found


@pytest.mark.parametrize("flags", [(), ("--dtype", "uint32"), ("--num-workers", "2")])
def test_every_document_is_there_whole_with_its_id_file_and_line(build, tokenizer_json, flags):
    ledger, folder = build(*flags)
    encode = tokenizers.Tokenizer.from_file(str(tokenizer_json)).encode
    found = documents(folder, "<u4" if "uint32" in flags else "<u2")
    assert ledger["documents"]["rejected"] == {"empty": 1}
    assert len(found) == ledger["documents"]["tokenized"] == 82
    for name, source, line, ids in found:
        path = Path(source)
        import zstandard

        content = path.read_bytes()
        lines = (zstandard.decompress(content) if path.suffix == ".zst" else content).splitlines()
        row = orjson.loads(lines[line - 1])
        assert name == str(row.get("id", ""))
        assert ids == [*encode(row["text"], add_special_tokens=False).ids, 0]
    assert len({(source, line) for _, source, line, _ in found}) == 82
    assert [line for _, source, line, _ in found if source.endswith("a.jsonl")] != sorted(range(1, 41)), "shuffled"


def test_arrays_are_of_equal_length_and_the_ledger_counts_their_tokens(build):
    ledger, folder = build()
    sizes = [os.path.getsize(path) // 2 for path in sorted(folder.glob("*.npy"))]
    assert set(sizes[:-1]) == {100 * 16} and 0 < sizes[-1] <= 1600 and len(sizes) > 2
    assert sum(sizes) == ledger["tokens"]["in"] == ledger["tokens"]["in_shards"]
    assert not (folder / "manifest.jsonl").exists()


def test_the_bytes_do_not_depend_on_workers_and_do_on_the_seed(build):
    trees = [
        {p.name: p.read_bytes() for p in build(*flags)[1].iterdir() if p.name != "ledger.json"}
        for flags in (("--num-workers", "1"), ("--num-workers", "2"), ("--seed", "7"))
    ]
    assert trees[0] == trees[1] != trees[2]


def test_the_loader_trains_on_them(build):
    ledger, folder = build()
    config = DataConfig(train_data=(f"{folder}/*.npy",), workers=0)
    shape = {"vocab_size": 600, "seq_len": 15, "global_batch": 4}
    n_steps = ledger["samples"] // 4
    batches = build_loader(config, **shape, rank=0, world_size=1, seed=0, n_steps=n_steps).batches(0, n_steps)
    assert sum(len(batch) for batch in batches) == 4 * n_steps


def test_shards_may_hold_wider_ids_than_they_need(make_2048, raw, tmp_path, tokenizer_json, texts):
    from open_lm.data.shards import read_samples

    out = {}
    for dtype in ("auto", "uint32"):
        flags = ["--output-dir", str(tmp_path / dtype), "--tokenizer", str(tokenizer_json), "--seqlen", "15"]
        make_2048(["--input-files", raw("a.jsonl", texts), *flags, "--dtype", dtype])
        out[dtype] = [ids for _, ids in read_samples(str(tmp_path / dtype / "00000000.tar"))]
    assert {ids.dtype.name for ids in out["uint32"]} == {"uint32"} != {ids.dtype.name for ids in out["auto"]}
    assert [ids.tolist() for ids in out["uint32"]] == [ids.tolist() for ids in out["auto"]]


def test_ids_that_do_not_fit_the_type_are_refused(make_2048, raw, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "x": 70_000}, "x"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    flags = ["--input-files", raw("a.jsonl", ["x"]), "--output-dir", str(tmp_path / "out"), "--dtype", "uint16"]
    with pytest.raises(ConfigError, match=r"--dtype uint16: holds no ids of a vocabulary of 70001"):
        make_2048([*flags, "--tokenizer", str(tmp_path / "tokenizer.json")])


@pytest.mark.parametrize("n_tables", [1, 3])
def test_a_killed_job_of_arrays_is_gone_on_with_byte_for_byte(build, monkeypatch, tmp_path, n_tables):
    from open_lm.preprocess import write_flat

    _, straight = build("--num-workers", "1")
    real, calls = write_flat._table, []

    def dies(rows):
        calls.append(rows)
        if len(calls) > n_tables:
            raise KeyboardInterrupt
        return real(rows)

    monkeypatch.setattr(write_flat, "_table", dies)
    with pytest.raises(KeyboardInterrupt):
        build("--num-workers", "1", folder=tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    os.truncate(tmp_path / "killed.unfinished" / "shards" / "part-00000.npy", 10)
    next((tmp_path / "killed.unfinished").glob("block-*.docs")).unlink()
    monkeypatch.setattr(write_flat, "_table", real)
    build("--num-workers", "1", "--resume", folder=tmp_path / "killed")
    assert {p.name: p.read_bytes() for p in straight.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()
    }
