"""Relative paths that manifests and runs hold are found from folders above the one where they were made."""

import pytest
import tokenizers
import yaml
from runs import write_data

from open_lm import storage
from open_lm.data.inspect import main
from open_lm.data.manifest import read_manifest, write_manifest
from open_lm.errors import ConfigError


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`own/`, where a data set with a tokenizer beside it, and a run on it, were made; the working folder is above."""
    own = tmp_path / "own"
    manifest = write_data(own / "shards", (20,))
    words = {f"w{k}": k for k in range(16)} | {"<|endoftext|>": 16}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    (own / "tokenizer").mkdir()
    tokenizers.Tokenizer(model).save(str(own / "tokenizer" / "tokenizer.json"))
    rows = [
        {"shard": s.name, "num_sequences": s.n_sequences, "tokenizer": "tokenizer"} for s in read_manifest(manifest)
    ]
    write_manifest(manifest, rows)
    (own / "logs" / "mine").mkdir(parents=True)
    flags = {"dataset_manifest": ["shards/manifest.jsonl"], "seed": 0, "global_batch_size": 2, "tokenizer": None}
    (own / "logs" / "mine" / "params.txt").write_text(yaml.safe_dump(flags))
    monkeypatch.chdir(tmp_path)
    return own


def test_a_data_set_is_shown_as_text_from_one_folder_up(made, capsys):
    main(["own/shards", "--decode", "--samples", "1"])
    assert "w" in capsys.readouterr().out.splitlines()[1]


def test_the_samples_of_a_run_are_found_from_one_folder_up(made, capsys):
    main(["--run", "own/logs/mine", "--step", "3", "--decode"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_runs_manifest_that_is_nowhere_is_named_with_what_to_do(made):
    (made / "shards" / "manifest.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"--run .*mine: its --dataset-manifest shards/manifest.jsonl is not there"):
        main(["--run", "own/logs/mine", "--step", "3"])


def test_patterns_and_addresses_keep_their_form(made):
    shards, run = "shards/{00000000..00000001}.tar", "own/logs/mine"
    assert storage.found_near(shards, run) == str(made / shards)
    assert storage.found_near("own/shards/*.tar", run) == "own/shards/*.tar"  # found from here
    for kept in ("s3://bucket/shards/*.tar", "nowhere/*.tar", str(made / "shards")):
        assert storage.found_near(kept, run) == kept
