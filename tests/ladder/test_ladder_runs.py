"""Runs of a ladder as commands: finished, stopped, killed, failed, and with a changed ladder file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from icl_setup import SAMPLES, write_tokenizer
from ladders import SIZES, write_ladder
from runs import ROOT

from open_lm.checkpoint.commit import committed
from open_lm.errors import ConfigError, OpenLMError
from open_lm.ladder import ModelLadder
from open_lm.ladder.__main__ import main
from open_lm.ladder.commands import ladder_table
from open_lm.ladder.records import collect_metrics, find_checkpoints, metrics_by_step

SHORT = {"chinchilla_multiple": 0.5, "batch_multiplier": 2.0, "lr_multiplier": 0.05}
ONE = {"a": SIZES["a"]}


def start(path):
    """`python -m open_lm.ladder run` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "open_lm.ladder", "run", "--ladder", path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for(condition, seconds=120):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.02)


def test_a_ladder_runs_to_its_end_and_keeps_every_checkpoint_it_promised(tmp_path, capsys):
    path = write_ladder(tmp_path, sizes=ONE, run=SHORT)
    main(["run", "--ladder", path])
    ladder = ModelLadder.from_file(path)
    steps = list(ladder.plan("a").checkpoint_steps)
    assert [c.info.step for c in ladder.get_checkpoints("a")] == steps == [0, 58, 65]
    assert sorted(c.step for c in committed(str(tmp_path / "out/a/checkpoints"))) == steps  # and nothing ephemeral
    frame = ladder.get_metrics()
    assert list(frame["step"]) == steps
    assert list(frame["tokens"]) == [step * ladder.plan("a").batch.tokens for step in steps]
    assert frame["loss"].is_monotonic_decreasing
    assert (frame["loss"] == frame["valid/loss"]).all()
    assert frame["train/lr"].iloc[-1] == pytest.approx(0, abs=1e-12)
    assert "5/5" not in capsys.readouterr().out
    main(["run", "--ladder", path])
    assert "a: complete" in capsys.readouterr().out
    assert "3/3          3/3      100 %    done" in main(["status", "--ladder", path])

    main(["metrics", "--ladder", path, "--output", str(tmp_path / "m.csv")])
    main(["metrics", "--ladder", path, "--output", str(tmp_path / "m.json")])
    assert len(json.loads((tmp_path / "m.json").read_text())) == (tmp_path / "m.csv").read_text().count("\n") - 1 == 3
    other = main(
        ["metrics", "--ladder", write_ladder(tmp_path, dir="elsewhere"), "--alternative-dirs", str(tmp_path / "out")]
    )
    assert set(other["description"]) == {"run folder"}  # the same runs, read as ordinary run folders
    assert set(other["num_params"]) == {6568}
    assert sorted(other["step"]) == steps

    path = write_ladder(tmp_path, sizes=ONE, run=SHORT)
    rows = [len(main(["metrics", "--ladder", path, "--prefix", begin])) for begin in ("tiny-a", "tiny", "a", "b")]
    assert rows == [3, 3, 0, 0]  # names, not sizes
    shutil.copytree(tmp_path / "out", tmp_path / "out[1] *")  # a folder may be called anything
    elsewhere = write_ladder(tmp_path, dir="elsewhere")
    others = ["--alternative-dirs", str(tmp_path / "out[1] *")]
    assert [len(main(["metrics", "--ladder", elsewhere, *others, "--prefix", begin])) for begin in "ab"] == [3, 0]
    assert ModelLadder.from_file(write_ladder(tmp_path, sizes=ONE, run=SHORT, dir="out[1] *")).is_complete("a")

    with pytest.raises(ConfigError, match=r"peak_lr was .*, is now .*"):
        main(["run", "--ladder", write_ladder(tmp_path, sizes=ONE, run={**SHORT, "lr_multiplier": 0.1})])
    with pytest.raises(ConfigError, match="seed was 3, is now 4"):
        main(["run", "--ladder", write_ladder(tmp_path, sizes=ONE, run=SHORT, seed=4)])
    metrics = tmp_path / "out/a/checkpoints/metrics_step58.json"
    before = metrics.read_text()
    metrics.unlink()  # a kill between a checkpoint and its metrics
    assert len(ladder.get_metrics()) == 3
    assert metrics.read_text() == before


def test_without_validation_the_training_loss_at_the_end_of_a_decay_counts_and_tasks_are_scored(tmp_path, caplog):
    task = {"label": "choices", "icl_task_type": "multiple_choice", "num_fewshot": [0]}
    task["dataset_uri"] = str(SAMPLES / "python_choices.jsonl")
    (tmp_path / "tasks.yaml").write_text(json.dumps({"icl_tasks": [task]}))
    write_tokenizer(tmp_path / "tokenizer.json")
    own = {"icl_tasks": "tasks.yaml", "tokenizer": "tokenizer.json", "vocab_size": 400, "val_data": []}
    path = write_ladder(tmp_path, sizes=ONE, run=SHORT, **own)
    main(["run", "--ladder", path])
    ladder = ModelLadder.from_file(path)
    assert ladder.is_complete("a")
    frame = ladder.get_metrics()
    logged = metrics_by_step(str(tmp_path / "out/a"))
    plan = ladder.plan("a")
    window = range(plan.steps - plan.loss_steps(plan.steps) + 1, plan.steps + 1)
    assert set(window) <= set(logged)  # reported often enough
    mean = sum(logged[step]["train/loss"] for step in window) / len(window)
    assert frame["loss"].iloc[-1] == pytest.approx(mean)
    for at in plan.checkpoint_steps:
        kept = json.loads((tmp_path / f"out/a/checkpoints/metrics_step{at}.json").read_text())
        assert 0 <= kept["icl/choices/accuracy"] <= 1
    assert list(ladder_table(ladder, ["a"])["step"]) == [plan.steps]
    assert list(ladder_table(ladder, ["a"], all_checkpoints=True)["step"]) == list(plan.checkpoint_steps)[1:]  # not 0
    assert "training loss" in caplog.text


def test_metrics_wait_until_what_they_hold_was_measured(tmp_path):
    plan = ModelLadder.from_file(write_ladder(tmp_path, sizes=ONE, run=SHORT)).plan("a")
    folder = tmp_path / "out/a"
    (folder / "checkpoints").mkdir(parents=True)
    commit = {"label": "0-step58", "step": 58, "files": {}, "facts": {}}
    (folder / "checkpoints/epoch_0-step58.commit.json").write_text(json.dumps(commit))
    log = folder / "metrics.jsonl"
    log.write_text('{"step": 58, "train/loss": 2.0}\n{"step": 58, "valid/lo')  # cut off by a kill
    collect_metrics(plan, str(folder))
    assert find_checkpoints(plan, [str(folder)])[1].metrics_path is None
    log.write_text(
        '{"step": 58, "train/loss": 2.0}\n{"step": 58, "valid/loss": 2.5}\n{"step": 58, "valid/loss": 2.25}\n'
    )
    collect_metrics(plan, str(folder))
    found = find_checkpoints(plan, [str(folder)])[1]
    assert json.loads((folder / "checkpoints/metrics_step58.json").read_text())["loss"] == 2.25
    assert found.metrics_path is not None


def test_a_size_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    sizes = {"bad": {**SIZES["a"], "n_heads": 4}, "good": SIZES["a"]}
    path = write_ladder(tmp_path, sizes=sizes, run=SHORT, flags={"precision": "fp32", "workers": 0})
    done = []

    def train(self, size):
        if size == "bad":
            raise OpenLMError("no memory left")
        done.append(size)

    monkeypatch.setattr(ModelLadder, "run", train)
    with pytest.raises(OpenLMError, match="bad: no memory left"):
        main(["run", "--ladder", path])
    assert done == ["good"]


def test_a_trainer_that_fails_is_reported_with_its_log(tmp_path):
    path = write_ladder(tmp_path, sizes=ONE, run=SHORT, data={"manifests": ["nowhere/manifest.jsonl"]})
    with pytest.raises(OpenLMError, match=r"exit code \d+; see .*out.log"):
        main(["run", "--ladder", path])


@pytest.mark.slow
def test_a_ladder_killed_at_any_moment_goes_on_and_loses_nothing(tmp_path):
    (tmp_path / "whole").mkdir()
    reference = write_ladder(tmp_path / "whole", sizes=ONE)
    main(["run", "--ladder", reference])
    expected = ModelLadder.from_file(reference).get_metrics()[["step", "tokens", "loss"]]
    (tmp_path / "killed").mkdir()
    path = write_ladder(tmp_path / "killed", sizes=ONE)
    log = tmp_path / "killed/out/a/metrics.jsonl"

    def logged():
        return log.read_text().count("\n") if log.exists() else 0

    def reached(process, at_least):
        return logged() >= at_least or process.poll() is not None

    for at_least, how in ((1, signal.SIGKILL), (30, signal.SIGTERM), (50, signal.SIGKILL)):
        process = start(path)
        wait_for(partial(reached, process, at_least))
        process.send_signal(how)
        process.wait(120)
    assert start(path).wait(300) == 0
    found = ModelLadder.from_file(path)
    assert found.is_complete("a")
    assert found.get_metrics()[["step", "tokens", "loss"]].equals(expected)  # bit-equal to the run that nobody stopped


@pytest.mark.slow
def test_a_benchmark_measures_speed_and_leaves_only_its_figures(tmp_path, capsys):
    path = write_ladder(tmp_path, sizes=ONE)
    main(["run-benchmark", "--ladder", path, "--steps", "12"])
    found = json.loads((tmp_path / "out/benchmarks/a.json").read_text())
    assert found["steps"] == 12
    assert found["tokens_per_second"] > 0
    assert not (tmp_path / "out/benchmarks/a-benchmark").exists()
    main(["dry-run", "--ladder", path])
    assert "tokens/s" in capsys.readouterr().out
    assert ModelLadder.from_file(path).steps_done("a") == 0
