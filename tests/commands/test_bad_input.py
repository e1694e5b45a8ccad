"""Bad input to `open_lm.main`: the flag or file, what was found and what to do, before anything is half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import ROOT, flags, folder_of, metrics, run, run_command, weights, write_data

from open_lm.data.shards import write_shard
from open_lm.errors import ConfigError, DataError, OpenLMError, StorageError
from open_lm.main import main


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "open_lm_1bb"], r"--model open_lm_1bb"),
        (["--model", "none.json"], r"none\.json"),
        (
            ["--global-batch-size", "9", "--accum-freq", "2"],
            r"--global-batch-size 9.*nearest batch that does is (8|10)",
        ),
        (["--ddp-static-graph", "--accum-freq", "2"], "--ddp-static-graph"),
        (["--precision", "banana"], "banana"),
        (["--lr", "fast"], "--lr"),
        (["--lr-sceduler", "cosine"], "did you mean --lr-scheduler"),
        (["--warmup", "-1"], "--warmup -1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--train-tokens", "-5"], "--train-tokens -5"),
        (["--lr", "nan"], "--lr nan"),
        (["--wd", "-1"], "--wd -1"),
        (["--num-checkpoints", "-1"], "--num-checkpoints -1"),
        (["--val-frequency", "-1"], "--val-frequency -1"),
        (["--seed", str(2**64)], "--seed"),
        (["--logs", "s3://bucket/logs"], "--logs s3://"),
        (["--epochs", "0"], "--epochs 0"),
        (["--name", "a/b"], "--name"),
        (["--report-to", "tensorbaord"], "tensorbaord"),
        (["--resume", "/nowhere/epoch_1.pt"], "/nowhere/epoch_1.pt"),
        (["--resume", "y.pt", "--pretrained", "x.pt"], "mutually exclusive"),
        (["--pretrained", "x.pt", "--average", "y.pt"], "mutually exclusive"),
        (["--average", "x.pt", "y.pt", "--average-coefficients", "1"], "1 shares for 2"),
        (["--average", "x.pt", "y.pt", "--average-coefficients", "1", "3"], "Give 0.25 0.75"),
        (["--load-pretrained-state"], "--pretrained"),
        (["--val-data", "/nowhere/{0..1}.tar"], "/nowhere"),
        (["--train-tokens", "10"], "without a step"),
    ],
)
def test_flags_are_refused_by_name(tmp_path, manifest, arguments, message):
    with pytest.raises(OpenLMError, match=message):
        main([*flags(tmp_path, manifest), *arguments])
    assert not list(tmp_path.rglob("epoch_*"))


def test_missing_shards_and_empty_globs_are_named(tmp_path):
    for url in (str(tmp_path / "shard-{000..003}.tar"), str(tmp_path / "*.tar")):
        with pytest.raises(OpenLMError, match="tar"):
            main(
                [
                    "--train-data",
                    url,
                    "--model",
                    "open_lm_test_tiny",
                    "--device",
                    "cpu",
                    "--logs",
                    str(tmp_path),
                    "--name",
                    "x",
                ]
            )


def test_nothing_to_do_and_nothing_to_evaluate(tmp_path):
    with pytest.raises(ConfigError, match="nothing to do"):
        main([])
    with pytest.raises(ConfigError, match="--resume, --pretrained or --average"):
        main(["--val-data", str(tmp_path)])


@pytest.mark.parametrize("problem", ["short", "range"])
def test_a_shard_that_does_not_fit_the_model_is_named(tmp_path, problem):
    samples = np.full((8, 12 if problem == "short" else 17), 3 if problem == "short" else 99, "<u2")
    with open(tmp_path / "0.tar", "wb") as file:
        write_shard(file, samples, "npy")
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"shard": "0", "num_sequences": 8}) + "\n")
    with pytest.raises(DataError, match=r"0\.tar.*(12|99)"):
        run(tmp_path, str(tmp_path / "manifest.jsonl"), steps=1)
    assert not list(folder_of(tmp_path).rglob("epoch_*"))


def test_a_cut_shard_is_named(tmp_path, manifest):
    shard = tmp_path / "data" / "00000000.tar"
    shard.write_bytes(shard.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"00000000\.tar"):
        run(tmp_path, manifest)


def test_an_unwritable_folder_is_named(tmp_path, manifest):
    (tmp_path / "logs").write_text("a file is in the way")
    with pytest.raises(StorageError, match="--logs"):
        run(tmp_path, manifest)


def test_a_command_prints_one_line_and_exits_with_the_code_of_the_error(tmp_path, manifest):
    done = run_command(flags(tmp_path, manifest, "--model", "open_lm_1bb"))
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith("error: --model open_lm_1bb") and len(done.stderr.splitlines()) == 1


def test_ranks_agree_that_a_folder_is_taken(tmp_path, manifest):
    folder_of(tmp_path).mkdir(parents=True)
    (folder_of(tmp_path) / "metrics.jsonl").write_text("{}")
    done = run_command(flags(tmp_path, manifest), ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("already holds a run") == 1


def test_a_full_disk_keeps_the_run_going_and_the_end_reports_it(tmp_path, manifest):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from open_lm.command import run; from open_lm.main import main; run(lambda: main(sys.argv[1:]))"
    )
    arguments = flags(tmp_path, manifest, "--num-checkpoints", "2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == StorageError.exit_code, done.stderr
    assert "checkpoint 1 was not written" in done.stderr and "step 12/12" in done.stderr
    assert not list((folder_of(tmp_path) / "checkpoints").iterdir())


LONG = {"steps": 400}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run long enough to be interrupted, and its data."""
    folder = tmp_path_factory.mktemp("straight")
    manifest = write_data(folder / "data")
    run(folder, manifest, "--multiple-data-passes", **LONG)
    return folder, manifest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_saves_and_the_resumed_run_is_the_same_run(tmp_path, straight, number):
    folder, manifest = straight
    extra = ["--multiple-data-passes", "--resume", "latest"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "open_lm.main", *flags(tmp_path, manifest, *extra, "--workers", "1", **LONG)],
        env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    log, deadline = folder_of(tmp_path) / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    if number == signal.SIGTERM:
        os.killpg(process.pid, number)  # as schedulers do: the workers get it too
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 85, errors
    assert f"stopped by {number.name}" in errors
    assert 0 < max(metrics(tmp_path)) < LONG["steps"]
    run(tmp_path, manifest, *extra, **LONG)
    assert metrics(tmp_path) == metrics(folder)
    assert all((weights(tmp_path)[name] == w).all() for name, w in weights(folder).items())
