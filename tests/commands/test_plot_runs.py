"""One picture of several runs, from their metrics alone."""

import subprocess
import sys

import pytest
from runs import ROOT, folder_of, run, write_data

from open_lm.commands.plot import placed


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
    tokens = {10: 1000, 20: 2000, 30: 3000}
    validated = {5: 3.0, 10: 2.5, 15: 2.4, 30: 2.0, 32: 1.9}
    assert placed(validated, tokens, "tokens") == ([500, 1000, 1500, 3000, 3200], [3.0, 2.5, 2.4, 2.0, 1.9])
    assert placed(validated, tokens, "steps") == ([5, 10, 15, 30, 32], [3.0, 2.5, 2.4, 2.0, 1.9])


def test_what_is_no_run_is_said_by_name(tmp_path):
    assert "does not exist. Name a run folder" in plot(tmp_path / "none", cwd=tmp_path).stderr
    assert "need a name that ends in" in plot(tmp_path, "--output", "a.txt", cwd=tmp_path).stderr
    assert not list(tmp_path.iterdir())
