"""The programs of examples/, each run as its first lines say."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT, write_data


def example(name, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_shards_are_read_without_the_package(tmp_path):
    manifest = write_data(tmp_path / "data", counts=(5, 6))
    assert example("read_shards", manifest) == "11 samples, 187 tokens\n"


def test_every_example_is_listed():
    names = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    listed = (ROOT / "examples" / "README.md").read_text()
    assert len(names) == 5 and all(f"[{name}]({name})" in listed for name in names)


@pytest.mark.slow
def test_a_run_from_python_writes_text(tmp_path):
    out = example("train_from_python", tmp_path)
    assert "\n---\n" in out


@pytest.mark.slow
def test_a_layer_from_outside_is_trained_and_stored(tmp_path):
    example("own_architecture", tmp_path)
    flags = (tmp_path / "own_architecture" / "params.txt").read_text()
    assert "ffn_type: squared_relu" in flags


@pytest.mark.slow
def test_an_objective_from_outside_reports_its_losses(tmp_path):
    example("own_task", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "own_task" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    assert len(trained) == 5 and all(row["train/smoothed_loss"] > 0 for row in trained)


@pytest.mark.slow
def test_a_model_of_transformers_gets_scores(tmp_path):
    assert "python_choices/0-shot" in example("evaluate_transformers", tmp_path)
