"""Manifests: what the tool writes is true, what is damaged is named, what lies is refused."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from shared import SHARED, needs_shared

from open_lm.data.manifest import fingerprint, read_manifest
from open_lm.errors import DataError, StorageError
from open_lm.utils.make_wds_manifest import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("key", ["npy", "json.gz"])
def test_the_manifest_of_a_folder_is_true(data_set, key):
    folder = data_set([5, 9], key, manifest=False)
    (folder / "sub dir").mkdir()
    (folder / "00000001.tar").rename(folder / "sub dir" / "x.tar")
    rows = [json.loads(line) for line in Path(main(["--data-dir", str(folder)])).read_text().splitlines()]
    assert [(row["shard"], row["num_sequences"], row["data_key"], row["seq_len"]) for row in rows] == [
        ("00000000", 5, key, 4),
        ("sub dir/x", 9, key, 4),
    ]
    content = (folder / "00000000.tar").read_bytes()
    assert (rows[0]["bytes"], rows[0]["crc32"]) == (len(content), f"{zlib.crc32(content):08x}")
    assert (rows[1]["first_key"], rows[1]["last_key"]) == ("000000000000", "000000000008")
    shards = read_manifest(str(folder / "manifest.jsonl"))
    assert [Path(shard.url).exists() for shard in shards] == [True, True]
    assert key != "npy" or (shards[0].layout and shards[1].layout)


@needs_shared
def test_the_counts_of_openlms_own_manifest_are_found_again(tmp_path):
    folder = SHARED / "fixtures" / "openlm_shards" / "jsongz"
    for tar in folder.glob("*.tar"):
        (tmp_path / tar.name).symlink_to(tar)
    ours = [json.loads(line) for line in Path(main(["--data-dir", str(tmp_path)])).read_text().splitlines()]
    theirs = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in ("shard", "num_sequences")} for row in ours] == theirs


def test_every_damaged_shard_is_named_and_nothing_is_written(data_set):
    folder = data_set([5, 5, 5, 5], manifest=False)
    (folder / "00000000.tar").write_bytes(b"")
    cut = folder / "00000002.tar"
    cut.write_bytes(cut.read_bytes()[:-3000])
    with pytest.raises(
        DataError, match=r"2 of 4 shards(.|\n)*00000000\.tar: an empty file(.|\n)*00000002\.tar: cut off"
    ):
        main(["--data-dir", str(folder)])
    assert not (folder / "manifest.jsonl").exists()


def test_a_folder_without_shards_is_an_error_with_a_code(tmp_path):
    line = [sys.executable, "-m", "open_lm.utils.make_wds_manifest", "--data-dir", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == StorageError.exit_code
    assert done.stderr.startswith("error: --data-dir") and "no *.tar" in done.stderr


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n"])
def test_the_last_line_counts_with_or_without_its_end(tmp_path, end):
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"shard": "a", "num_sequences": 1}\n{"shard": "b", "num_chunks": 2, "new": []}' + end, newline="")
    assert [(shard.name, shard.n_sequences) for shard in read_manifest(str(path))] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize(
    "row",
    [
        {"shard": "../a", "num_sequences": 1},
        {"shard": "/etc/a", "num_sequences": 1},
        {"shard": "s3://x/a", "num_sequences": 1},
        {"shard": "pipe:rm", "num_sequences": 1},
        {"shard": "a\nb", "num_sequences": 1},
        {"shard": "", "num_sequences": 1},
        {"shard": 5, "num_sequences": 1},
        {"shard": "a", "num_sequences": -1},
        {"shard": "a", "num_sequences": 1.5},
        {"shard": "a", "num_sequences": "1"},
        {"shard": "a"},
        {"shard": "a", "num_sequences": 1, "layout": [1, 2]},
        [],
    ],
)
def test_a_line_that_cannot_be_true_is_refused_with_its_number(tmp_path, row):
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"shard": "fine", "num_sequences": 1}\n' + json.dumps(row))
    with pytest.raises(DataError, match=r"manifest\.jsonl, line 2"):
        read_manifest(str(path))


def test_a_shard_named_twice_is_refused(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"shard": "a", "num_sequences": 1}\n' * 2)
    with pytest.raises(DataError, match="line 2: duplicate shard a"):
        read_manifest(str(path))


def test_the_fingerprint_is_that_of_the_data_not_of_its_place_or_order(data_set):
    one, other = data_set([5, 9], name="one"), data_set([5, 9], name="other")
    shards = read_manifest(f"{one}/manifest.jsonl")
    assert fingerprint(shards) == fingerprint(shards[::-1]) == fingerprint(read_manifest(f"{other}/manifest.jsonl"))
    assert fingerprint(shards) != fingerprint(read_manifest(f"{data_set([5, 8], name='third')}/manifest.jsonl"))
