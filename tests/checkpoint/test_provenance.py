"""A checkpoint says what made it: versions, the commit of the code, the tokenizer, the data."""

import json
import platform
import subprocess

import pytest
import torch
from runs import folder_of, run, run_command, write_data

from open_lm.checkpoint.describe import main
from open_lm.checkpoint.provenance import git_commit


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data", (200,))


def test_the_checkpoint_holds_config_tokenizer_versions_commit_and_data(tmp_path, manifest, capsys):
    run(tmp_path, manifest, "--tokenizer", "some/tokenizer", steps=2)
    path = folder_of(tmp_path) / "checkpoints" / "epoch_1.pt"
    config = torch.load(path, weights_only=True)["config"]
    assert config["flags"]["lr"] == 1e-2 and config["tokenizer"] == "some/tokenizer"
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["python"] == platform.python_version()
    state = torch.load(path.with_name("stats_1.pt"), weights_only=True)["data_state"]
    assert list(config["data"].values()) == [state["sources"][0]["fingerprint"]]
    main([str(folder_of(tmp_path))])
    said = json.loads(capsys.readouterr().out)
    assert said["step"] == 2 and said["config"] == json.loads(json.dumps(config))
    assert said["path"] == str(path) and set(said["files"]) == {"epoch_1.pt", "optimizer_1.pt", "stats_1.pt"}


def test_the_commit_of_a_checkout(tmp_path):
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes"
    (tmp_path / "inside").mkdir()
    assert git_commit(tmp_path / "inside") is None


def test_ranks_agree_on_a_run_without_a_known_tokenizer(tmp_path, manifest):
    from runs import flags

    assert run_command(flags(tmp_path, manifest, steps=2), ranks=2).returncode == 0
    config = torch.load(folder_of(tmp_path) / "checkpoints" / "epoch_1.pt", weights_only=True)["config"]
    assert config["tokenizer"] is None
