import json

import pytest

from open_lm.commands import plot_scores
from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.records import CheckpointRecords, Record, Results


def results(folder, name, tokens, value):
    record = Record(
        "task/0-shot", "task", 0, None, "InContextLearningLMAccuracy", value, 0.01, 0.25, 10, 0, 1.0, "", ""
    )
    about = CheckpointRecords(f"{name}/epoch_{tokens}", "", "", "", tokens=tokens, records=[record])
    folder.mkdir(parents=True)
    Results("native", {}, [about]).write(str(folder))
    return str(folder)


def test_the_points_of_a_run_stand_in_order_of_tokens(tmp_path):
    paths = [results(tmp_path / str(tokens), "a", tokens, value) for tokens, value in [(30, 0.3), (10, 0.1), (20, 0.2)]]
    panels = plot_scores.gather([f"{path}/results.json" for path in paths], ())
    (lines,) = panels.values()
    assert [(at, record.value) for at, record in lines["a"]] == [(10, 0.1), (20, 0.2), (30, 0.3)]


def test_a_picture_of_several_runs_is_written(tmp_path):
    paths = [results(tmp_path / name, name, 10, 0.5) for name in "ab"]
    plot_scores.main([*paths, "--output", str(tmp_path / "s.png")])
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_compares_the_checkpoints_of_several_evaluations(tmp_path):
    """Worked by hand: categories count as their mean, the average is over tasks, a gap leaves it open."""
    metric = "InContextLearningMultipleChoiceAccuracy"

    def record(key, category, value):
        label = key.split("/")[0]
        return Record(key, label, 0, category, metric, value, 0.01, 0.25, 10, 0, 1.0, "", "")

    own = [record("copa/0-shot", None, 0.6), record("mmlu/0-shot/a", "a", 0.2), record("mmlu/0-shot/b", "b", 0.4)]
    for name, records in (("a", own), ("b", own[:1])):
        Results("native", {}, [CheckpointRecords(name, "", "", "", tokens=1, records=records)]).write(
            str(tmp_path / name)
        )
    plot_scores.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "s.png"), "--table",
                      str(tmp_path / "t.md")])  # fmt: skip
    assert (tmp_path / "t.md").read_text().splitlines() == [
        "| task | a | b |",
        "|---|---|---|",
        "| copa/0-shot (accuracy) | 0.6000 ± 0.0100 | 0.6000 ± 0.0100 |",
        "| mmlu/0-shot (accuracy) | 0.3000 |  |",
        "| **average** | 0.4500 |  |",
    ]


def test_what_cannot_be_drawn_is_said(tmp_path):
    path = results(tmp_path / "a", "a", 10, 0.5)
    with pytest.raises(DataError, match="no scores of other"):
        plot_scores.main([path, "--tasks", "other"])
    with pytest.raises(ConfigError, match="no such file"):
        plot_scores.main([str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match=r"\.png"):
        plot_scores.main([path, "--output", "s.gif"])
    content = json.loads((tmp_path / "a" / "results.json").read_text())
    content["runs"][0]["tokens"] = None
    (tmp_path / "a" / "results.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="how many tokens"):
        plot_scores.main([path])
