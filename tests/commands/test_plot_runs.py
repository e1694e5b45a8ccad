"""One picture of several runs, from their metrics alone."""

import subprocess
import sys

import pytest
from runs import ROOT, folder_of, run, write_data

from open_lm.commands.plot import placed
from open_lm.report.rows import LoggedRow, tokens_at


def plot(*arguments, cwd):
    command = [sys.executable, str(ROOT / "scripts" / "plot_runs.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def test_two_runs_in_one_picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    manifest = write_data(tmp_path / "data")
    for name, lr in (("slow", "1e-3"), ("fast", "1e-2")):
        run(
            tmp_path,
            manifest,
            "--lr",
            lr,
            "--val-data",
            str(tmp_path / "data" / "00000000.tar"),
            "--val-every-steps",
            "4",
            name=name,
        )
    done = plot(folder_of(tmp_path, "slow"), folder_of(tmp_path, "fast"), "--smooth", "3", "--log-loss", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written: runs.png (2 runs)" in done.stdout
    with image.open(tmp_path / "runs.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_every_validation_is_drawn_also_at_steps_without_a_train_row():
    counted = [(5, None), (10, 1000), (10, None), (15, None), (20, 2000), (30, 3000), (32, None)]
    rows = [LoggedRow(step, at, {"m": step / 8}) for (step, _), at in zip(counted, tokens_at(counted), strict=True)]
    values = [5 / 8, 10 / 8, 15 / 8, 20 / 8, 30 / 8, 32 / 8]
    assert placed(rows, "m", "tokens") == ([500, 1000, 1500, 2000, 3000, 3200], values)
    assert placed(rows, "m", "steps") == ([5, 10, 15, 20, 30, 32], values)


def test_old_rows_without_tokens_stand_between_their_neighbours_when_the_batch_changed():
    """Twenty steps of 2 tokens, counted as 80 of half a token from there on."""
    assert tokens_at([(10, 20), (20, 40), (20, None), (84, None), (88, 44)]) == [20, 40, 40, 42, 44]


def test_what_is_no_run_is_said_by_name(tmp_path):
    assert "does not exist. Name a run folder" in plot(tmp_path / "none", cwd=tmp_path).stderr
    assert "need a name that ends in" in plot(tmp_path, "--output", "a.txt", cwd=tmp_path).stderr
    assert not list(tmp_path.iterdir())
