"""inspect: shows what is there, says what is wrong, and names the samples of a step as the loader gave them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm.data.config import DataConfig
from open_lm.data.inspect import main
from open_lm.data.loader import build_loader
from open_lm.errors import ConfigError, DataError
from open_lm.utils import make_wds_manifest

ROOT = Path(__file__).resolve().parents[2]


def test_a_shard_is_shown_as_ids(data_set, capsys):
    folder = data_set([5, 9])
    main([str(folder / "00000001.tar"), "--samples", "2", "--tokens", "2"])
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/00000001.tar: 1 shards, 9 sequences",
        "00000001/000000000000.npy: 5 5",
        "00000001/000000000001.npy: 6 6",
    ]


def test_the_samples_of_a_step_are_those_the_loader_gave(data_set, capsys):
    folder = data_set([50, 90])
    config = DataConfig(dataset_manifest=(f"{folder}/manifest.jsonl",), workers=0)
    loader = build_loader(config, vocab_size=60_000, seq_len=4, global_batch=8, rank=0, world_size=1, seed=3)
    expected = next(loader.batches(5, 6)).inputs_BT[:, 0].tolist()
    main([str(folder), "--step", "5", "--seed", "3", "--global-batch-size", "8"])
    assert [int(re.search(r"npy: (\d+)", line)[1]) for line in capsys.readouterr().out.splitlines()] == expected


def test_the_samples_of_a_runs_step_are_found_from_its_folder(data_set, tmp_path, capsys):
    import yaml

    from open_lm.flags import as_flags

    manifests = tuple(f"{data_set([n], name=name)}/manifest.jsonl" for name, n in (("a", 50), ("b", 90)))
    config = DataConfig(dataset_manifest=manifests, train_data_mix_weights=(1, 3), workers=0, skip_steps=("1-2",))
    loader = build_loader(config, vocab_size=60_000, seq_len=4, global_batch=8, rank=0, world_size=1, seed=3)
    expected = next(loader.batches(4, 5)).inputs_BT[:, 0].tolist()
    params = as_flags(config) | {"seed": 3, "global_batch_size": 8, "batch_size": None, "lr": 0.1}
    (tmp_path / "params.txt").write_text(yaml.safe_dump(params))
    main(["--run", str(tmp_path), "--step", "4"])
    assert [int(re.search(r"npy: (\d+)", line)[1]) for line in capsys.readouterr().out.splitlines()] == expected
    with pytest.raises(ConfigError, match=r"no params\.txt"):
        main(["--run", str(tmp_path / "a"), "--step", "4"])


def test_a_sound_set_verifies_and_each_kind_of_damage_is_named(data_set, capsys):
    folder = data_set([5, 9, 4, 4])
    make_wds_manifest.main(["--data-dir", str(folder)])
    main([str(folder), "--verify"])
    assert "all shards OK: 110 tokens" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"token id \d+ is outside a vocabulary of 20"):
        main([str(folder), "--verify", "--vocab-size", "20"])
    flipped = bytearray((folder / "00000000.tar").read_bytes())
    flipped[700] ^= 1
    (folder / "00000000.tar").write_bytes(flipped)
    (folder / "00000001.tar").write_bytes((folder / "00000001.tar").read_bytes()[:-1024])
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    lines[2] = '{"shard": "00000002", "num_sequences": 5}'
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        main([str(folder), "--verify"])
    message = str(caught.value)
    assert "3 problems" in message
    assert re.search(r"00000000\.tar: its crc32", message)
    assert re.search(r"00000001\.tar: \d+ bytes, the manifest says", message)
    assert re.search(r"00000002\.tar: 4 samples, the manifest says 5", message)


def test_text_needs_a_tokenizer(data_set):
    with pytest.raises(ConfigError, match="--decode"):
        main([str(data_set([3])), "--decode"])


def test_the_command_line_works(data_set):
    line = [sys.executable, "-m", "open_lm.data.inspect", str(data_set([3])), "--verify"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "all shards OK" in done.stdout
