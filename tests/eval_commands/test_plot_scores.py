import json

import pytest

from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.icl.records import CheckpointRecords, Record, Results
from scripts import plot_scores


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
