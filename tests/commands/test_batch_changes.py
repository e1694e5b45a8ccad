"""A run that goes on with another batch: all that was measured stays, and stands where it was measured, in tokens."""

import csv
import json
from pathlib import Path

import pytest
from runs import SEQ_LEN, folder_of, run, write_data

from open_lm.checkpoint.resolve import all_checkpoints
from open_lm.commands import plot
from open_lm.report.facts import read_run
from open_lm.report.rows import read_rows
from open_lm.tracking.config import SINKS


class Plain:
    """A sink as CONTRIBUTING says: a name, a figure, an end."""

    def __init__(self, run):
        self.path = Path(run.folder, "plain.txt")

    def log(self, step, metrics):
        with open(self.path, "a") as file:
            file.write(f"{step} {metrics['train/tokens']}\n")

    def close(self):
        with open(self.path, "a") as file:
            file.write("closed\n")


def test_a_sink_without_rewind_goes_through_a_resumed_run(tmp_path, monkeypatch):
    monkeypatch.setitem(SINKS, "plain", f"{__name__}:Plain")
    manifest = write_data(tmp_path / "data", (200,))
    for more in ((), ("--resume", "latest")):
        run(tmp_path, manifest, "--report-to", "plain", *more, steps=2 + len(more))
    lines = (folder_of(tmp_path) / "plain.txt").read_text().splitlines()
    assert lines == ["1 128", "2 256", "closed", "3 384", "4 512", "closed"]


FIRST, SECOND = 8, 32
"""Batches: twelve steps of the first, of which eight are done, are three of the second, of which two are."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 8 steps of 8 sequences, validated every 2, that goes on to step 3 with 32 sequences."""
    tmp_path = tmp_path_factory.mktemp("batches")
    manifest = write_data(tmp_path / "data", (200,))
    more = ["--val-data", str(tmp_path / "data" / "00000000.tar"), "--report-to", "tensorboard"]
    run(tmp_path, manifest, *more, "--val-every-steps", "2", "--num-checkpoints", "3", "--stop-at-step", "8")
    kept = (folder_of(tmp_path) / "metrics.jsonl").read_text()
    (folder_of(tmp_path) / "before.jsonl").write_text(kept)
    more += ["--val-every-steps", "1", "--num-checkpoints", "1", "--resume", "latest"]
    run(tmp_path, manifest, *more, steps=3, batch=SECOND)
    return folder_of(tmp_path)


def tokens_of(steps, batch):
    return [step * batch * SEQ_LEN for step in steps]


VALIDATED = tokens_of((2, 4, 6, 8), FIRST) + tokens_of((3,), SECOND)
TRAINED = tokens_of(range(1, 9), FIRST) + tokens_of((3,), SECOND)


def test_every_measured_row_is_kept_and_says_its_tokens(folder):
    before, after = (folder / name for name in ("before.jsonl", "metrics.jsonl"))
    assert after.read_text().startswith(before.read_text())
    rows = [json.loads(line) for line in after.read_text().splitlines()]
    assert [row["train/tokens"] for row in rows if "train/loss" in row] == TRAINED
    assert [row["train/tokens"] for row in rows if "valid/loss" in row] == VALIDATED
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["train/tokens"]) for row in table if row["train/loss"]] == TRAINED
    assert [int(row["train/tokens"]) for row in table if row["valid/loss"]] == VALIDATED
    assert [row["step"] for row in table][-2:] == ["8", "3"]


def test_the_report_and_the_plot_place_points_by_tokens(folder):
    facts = read_run(str(folder))
    assert [x for x, _ in facts.over_tokens("train/loss")] == TRAINED
    assert [x for x, _ in facts.over_tokens("valid/loss")] == VALIDATED
    assert facts.checkpoints == tuple(tokens_of((4, 8), FIRST) + tokens_of((3,), SECOND))
    rows = read_rows(str(folder / "metrics.jsonl"))
    assert plot.placed(rows, "valid/loss", "tokens")[0] == VALIDATED
    assert plot.placed(rows, "valid/loss", "steps")[0] == [2, 4, 6, 8, 3]


def test_checkpoints_stand_in_the_order_they_were_made(folder):
    paths = all_checkpoints([str(folder)], "--val-checkpoints")
    assert [path.rpartition("/")[2] for path in paths] == ["epoch_1.pt", "epoch_2.pt", "epoch_1-step3.pt"]


def test_tensorboard_hides_nothing_that_was_measured(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = {}
    for part in ("tensorboard", "tensorboard/part_2"):
        events = event_accumulator.EventAccumulator(str(folder / part))
        events.Reload()
        shown[part] = [event.step for event in events.Scalars("train/loss")]
    assert shown == {"tensorboard": list(range(1, 9)), "tensorboard/part_2": [3]}
