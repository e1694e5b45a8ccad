"""Errors at the flags say what was found and what to do."""

import shutil

import pytest
from runs import ROOT, write_data

from open_lm.checkpoint import consolidate
from open_lm.commands import download_tasks
from open_lm.data.config import DataConfig
from open_lm.data.sources import open_sources
from open_lm.errors import CheckpointError, ConfigError, DataError
from open_lm.evaluate.records import read_results
from open_lm.evaluate.tasks.suite import SUITES, read_suite, require_data
from open_lm.model.config import ModelFlags, resolve_architecture
from open_lm.weights.hf_folder import from_transformers


def test_a_folder_for_a_manifest_is_answered_with_the_manifest_in_it(tmp_path):
    manifest = write_data(tmp_path / "data", (4,))
    with pytest.raises(ConfigError, match=rf"--dataset-manifest {tmp_path}/data: is a folder. Give {manifest}."):
        open_sources(DataConfig(dataset_manifest=(str(tmp_path / "data"),)))
    with pytest.raises(ConfigError, match=r"--dataset-manifest none.jsonl: no such file. Make it with"):
        open_sources(DataConfig(dataset_manifest=("none.jsonl",)))


def test_a_mistyped_suite_is_answered_with_the_nearest_or_all(tmp_path):
    with pytest.raises(ConfigError, match=r"--eval-yaml quikstart: no such file.* or a suite: quickstart"):
        read_suite("quikstart")
    with pytest.raises(ConfigError, match=r"no such file.*dclm_core, .*light"):
        read_suite(str(tmp_path / "x.yaml"))


def test_a_copied_task_file_finds_the_samples_of_the_package(tmp_path, monkeypatch, capsys):
    """And where nothing is to be fetched, `openlm download tasks` says so, or what is missing."""
    monkeypatch.chdir(tmp_path)
    own = shutil.copy(SUITES / "in_memory_hf_eval.yaml", tmp_path / "own.yaml")
    require_data(read_suite(str(own)))
    asked = ["--eval-yaml", str(own), "--output-dir", str(tmp_path / "data")]
    assert download_tasks.main(asked) == []
    assert "already there, nothing to fetch" in capsys.readouterr().out
    own.write_text(own.read_text().replace("samples/", "mine/"))
    with pytest.raises(ConfigError, match=r"no data for .*\(mine/.*put the files there"):
        download_tasks.main(asked)
    with pytest.raises(ConfigError, match=r"no data for .*\(mine/.*\. Correct dataset_uri, or put the files there"):
        require_data(read_suite(str(own)))


def test_openlms_paths_of_model_files_name_models_where_the_link_is_not_there():
    named = resolve_architecture(ModelFlags(model="open_lm_test_tiny"))
    assert resolve_architecture(ModelFlags(model="../nowhere/model_configs/open_lm_test_tiny.json")) == named
    with pytest.raises(ConfigError, match=r"no such file"):
        resolve_architecture(ModelFlags(model="../nowhere/model_configs/none.json"))


def test_files_of_another_kind_are_named_with_what_is_needed(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: no config.json in it. Give a folder"):
        from_transformers(tmp_path)
    with pytest.raises(DataError, match=r"not a results.json of `openlm evaluate`.*Give another"):
        read_results(str(ROOT / "open_lm/model/configs/open_lm_test_tiny.json"))
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is one file of weights already: use or copy it"):
        consolidate.main([str(tmp_path / "w.pt"), "--out", str(tmp_path / "x.pt")])
