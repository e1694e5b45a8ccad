"""Every sink gets every metric once, a resumed run continues the same record, and a missing package is named."""

import csv
import json

import pytest
import yaml

from open_lm.errors import ConfigError
from open_lm.tracking.config import SINKS, TrackingConfig
from open_lm.tracking.csv import CsvSink
from open_lm.tracking.sink import Resumed, RunFacts, TableSink, open_sinks


def facts(folder, report_to):
    return RunFacts("run", str(folder), {"lr": 0.1}, TrackingConfig(report_to=report_to))


def test_metrics_jsonl_holds_a_line_a_step_and_a_resumed_run_appends(tmp_path):
    for step in (1, 2):
        sink, _ = open_sinks(facts(tmp_path, ""))
        sink.log(step, {"train/loss": 2.0 / step, "bad": float("nan")})
        sink.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "train/loss": 2.0, "bad": None}, {"step": 2, "train/loss": 1.0, "bad": None}]


def test_metrics_csv_has_a_row_a_step_and_a_column_a_metric_however_they_came(tmp_path):
    sink = CsvSink(facts(tmp_path, ""))
    sink.log(1, {"train/loss": 2.5})
    sink.log(2, {"train/loss": 0.1 + 0.2, "empty": float("inf")})
    sink.log(2, {"valid/loss": 3.0})
    sink.log(3, {"train/loss": 1.0})
    sink.close()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,0.")  # a kill in the middle of a line
    sink = CsvSink(facts(tmp_path, ""))
    sink.rewind(Resumed(2, 200, 2))
    sink.log(3, {"train/loss": 1.5})
    sink.close()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "train/loss": "2.5", "valid/loss": ""},
        {"step": "2", "train/loss": "0.30000000000000004", "valid/loss": "3.0"},
        {"step": "3", "train/loss": "1.5", "valid/loss": ""},
    ]


def test_a_resumed_run_drops_what_it_measures_again_by_tokens_and_nothing_else(tmp_path):
    """Steps 1 to 6 of 100 tokens, the last validation of an older program without its tokens; resumed after 400 tokens
    as step 2, since a step now has 200."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": k, "train/loss": 1.0 / k, "train/tokens": 100 * k} for k in range(1, 7)]
    rows.insert(4, {"step": 4, "valid/loss": 0.5})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "trai')
    sinks = open_sinks(facts(tmp_path, ""))
    for sink in sinks:
        sink.log(5, {"train/loss": 9.0, "train/tokens": 500})
        sink.rewind(Resumed(2, 400, 4))
        sink.log(3, {"train/loss": 0.125, "train/tokens": 600})
        sink.close()
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [*rows[:5], {"step": 3, "train/loss": 0.125, "train/tokens": 600}]
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["train/tokens"] for row in csv.DictReader(file)] == ["600"]


def test_tensorboard_events_read_back(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    *_, sink = open_sinks(facts(tmp_path, "tensorboard"))
    sink.log(7, {"train/loss": 1.5})
    sink.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (7, 1.5)


def test_wandb_offline_writes_one_run_across_restarts(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (1, 2):
        *_, sink = open_sinks(facts(tmp_path, "wandb"))
        sink.log(step, {"train/loss": 1.0})
        sink.close()
        ids.append((tmp_path / "wandb_id.txt").read_text())
    assert ids[0] == ids[1]
    recorded = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert recorded and all(ids[0] in file.name for file in recorded)
    configs = list(tmp_path.glob("wandb/offline-run-*/files/config.yaml"))
    assert all(yaml.safe_load(c.read_text())["lr"]["value"] == 0.1 for c in configs)


def test_wandb_is_called_once_a_step_with_all_of_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    calls, real = [], wandb.sdk.wandb_run.Run.log

    def counted(run, data, step):
        calls.append((step, dict(data)))
        return real(run, data, step=step)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", counted)
    *_, sink = open_sinks(facts(tmp_path, "wandb"))
    sink.log(1, {"train/loss": 2.0})
    sink.log(1, {"valid/loss": 3.0})
    sink.log(2, {"train/loss": 1.0})
    sink.close()
    assert calls == [(1, {"train/loss": 2.0, "valid/loss": 3.0}), (2, {"train/loss": 1.0})]


def test_on_wandb_the_steps_of_a_larger_batch_go_on_from_those_before(tmp_path, monkeypatch):
    """There a step that is not above the last one would be thrown away: steps 19 and 20, then 6 and 7 of four times as
    many tokens, through a restart."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    calls = []
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", lambda run, data, step: calls.append(step))
    for resumed, steps in ((None, (19, 20)), (Resumed(5, 4000, 20), (6,)), (Resumed(6, 4800, 6), (7,))):
        *_, sink = open_sinks(facts(tmp_path, "wandb"))
        if resumed:
            sink.rewind(resumed)
        for step in steps:
            sink.log(step, {"train/loss": 1.0})
        sink.close()
    assert calls == [19, 20, 21, 22]


def test_tables_reach_the_sinks_that_show_them(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    calls, real = [], wandb.sdk.wandb_run.Run.log

    def counted(run, data, step):
        calls.append((step, dict(data)))
        return real(run, data, step=step)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", counted)
    sinks = open_sinks(facts(tmp_path, "wandb,tensorboard"))
    shown = [sink for sink in sinks if isinstance(sink, TableSink)]
    assert [type(sink).__name__ for sink in shown] == ["WandbSink", "TensorboardSink"]
    for sink in shown:
        sink.log_table(4, "rollouts", ("prompt", "reward"), [("a|b\nc", 0.5), ("d", 1.0)])
        sink.log(4, {"train/loss": 1.0})
    for sink in sinks:
        sink.close()
    ((step, data),) = calls
    assert step == 4 and data["train/loss"] == 1.0
    assert (data["rollouts"].columns, data["rollouts"].data) == (["prompt", "reward"], [["a|b\nc", 0.5], ["d", 1.0]])
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("rollouts/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    assert written == "| prompt | reward |\n| --- | --- |\n| a\\|b⏎c | 0.5 |\n| d | 1 |"


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch, name):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else "wandb", None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        open_sinks(facts(tmp_path, name))


def test_all_means_every_sink():
    assert set(TrackingConfig(report_to="all").sinks) == set(SINKS)
    assert TrackingConfig(report_to="wandb,tensorboard").sinks == ("jsonl", "csv", "wandb", "tensorboard")


def test_wandb_without_a_login_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="wandb login"):
        open_sinks(facts(tmp_path, "wandb"))
