"""Runs compared on one page: every measured point is there, with its value under the mouse, and no NaN."""

import html.parser
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from open_lm.commands import plot, report
from open_lm.errors import ConfigError
from open_lm.report.charts import Series, line_chart
from open_lm.report.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]


class Texts(html.parser.HTMLParser):
    def __init__(self, content):
        super().__init__()
        self.words = []
        self.feed(content)

    def handle_data(self, data):
        self.words.append(data)


def make_run(folder, losses, *, validated=(), **more):
    """A run folder: one training loss a step of 100 tokens (None: not logged), validation losses at other steps."""
    folder.mkdir(parents=True)
    rows = [
        {"step": k, "train/loss": loss, "train/lr": 0.5, "train/tokens": 100 * k, "train/tokens_per_second": 50.0}
        | {f"train/{name}": values[k - 1] for name, values in more.items() if name != "icl"}
        for k, loss in enumerate(losses, 1)
        if loss is not None
    ]
    rows += [{"step": step, "valid/loss": loss} for step, loss in validated]
    rows += [{"step": step, "icl/odd/0-shot/accuracy": score} for step, score in more.get("icl", ())]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def polylines(content):
    return [points.split() for points in re.findall(r'<polyline class="line [^"]*" points="([^"]*)"', content)]


@pytest.mark.parametrize("spelled", [["--run", "A", "B"], ["--run", "A", "--run", "B"]])
def test_two_runs_stand_on_one_page(tmp_path, spelled):
    make_run(
        tmp_path / "fast", [4.0, 3.0, 2.5], validated=[(3, 2.625)], grad_norm=[1.0, 2.0, 0.5], mfu=[0.4, 0.4, 0.41]
    )
    make_run(tmp_path / "slow", [4.5, 4.0, 3.5], validated=[(3, 3.75)])
    paths = {"A": str(tmp_path / "fast"), "B": str(tmp_path / "slow")}
    report.main([*(paths.get(word, word) for word in spelled), "--output", str(tmp_path / "page.html")])
    shown = " ".join(Texts((tmp_path / "page.html").read_text()).words)
    for piece in (
        "fast and slow",
        "2.6250",
        "3.7500",
        "Gradient norm",
        "Model FLOPs utilisation",
        "41.0%",
        "fast 2.500",
    ):
        assert piece in shown, piece


def test_a_validation_between_two_reports_is_drawn(tmp_path):
    run = make_run(tmp_path / "run", [4.0, None, None, 3.0], validated=[(1, 4.5), (2, 4.0), (3, 3.5), (4, 3.25)])
    report.main(["--run", str(run), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text().count('class="dot held-out"') == 4
    rows = read_rows(str(run / "metrics.jsonl"))
    assert plot.placed(rows, "valid/loss", "tokens") == ([100, 200, 300, 400], [4.5, 4.0, 3.5, 3.25])


def test_what_is_not_a_number_leaves_a_gap_and_never_reaches_the_markup(tmp_path):
    losses = [4.0, 3.5, float("nan"), 3.0, float("inf"), 2.5]
    run = make_run(tmp_path / "run", losses, validated=[(2, float("nan")), (4, 3.125)], grad_norm=[float("nan")] * 6)
    report.main(["--run", str(run), "--output", str(tmp_path / "page.html")])
    content = (tmp_path / "page.html").read_text()
    assert not re.search(r"\b(nan|inf)\b", content, re.IGNORECASE)
    assert [len(points) for points in polylines(content)][:3] == [2, 1, 1]
    assert "3.125" in " ".join(Texts(content).words)


def test_scores_while_training_are_dots_of_a_figure_each(tmp_path):
    run = make_run(tmp_path / "run", [4.0, 3.0], icl=[(1, 0.25), (2, 0.625)])
    report.main(["--run", str(run), "--output", str(tmp_path / "page.html")])
    content = (tmp_path / "page.html").read_text()
    assert "odd/0-shot/accuracy" in content and content.count('class="dot run0"') == 2


def test_the_value_under_the_mouse_is_the_nearest_measured_one():
    points = [(float(x), x / 1000) for x in range(1, 20_001)]
    chart = line_chart(
        [Series("loss", points, "train")],
        label="",
        x_name="tokens",
        write_x=lambda x: f"at {x:.0f}",
        write_y=lambda y: f"{y}",
    )
    tips = re.findall(r">at (\d+) tokens</text><text [^>]*>loss ([\d.]+)<", chart)
    assert 100 < len(tips) <= 160
    assert all(float(value) == int(x) / 1000 for x, value in tips)
    (drawn,) = polylines(chart)
    assert len(drawn) < 4000


def test_a_spike_between_many_points_stays_in_the_picture():
    points = [(float(x), 1.0) for x in range(20_000)]
    points[7_777] = (7_777.0, 9.0)
    chart = line_chart([Series("loss", points, "train")], label="", x_name="", write_x=str, write_y=str)
    heights = [float(place.split(",")[1]) for place in polylines(chart)[0]]
    assert min(heights) < 40 < 300 < max(heights)


def test_more_runs_than_colours_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--run names 7 runs"):
        report.main(["--run", *map(str, range(7)), "--output", str(tmp_path / "page.html")])


def test_a_watched_page_follows_the_run_and_reloads_itself(tmp_path):
    run, page = make_run(tmp_path / "run", [4.0]), tmp_path / "page.html"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "report.py"),
        "--run",
        str(run),
        "--output",
        str(page),
        "--watch",
        "1",
    ]
    program = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        program.stdout.readline()
        assert 'http-equiv="refresh" content="1"' in page.read_text()
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 2, "valid/loss": 1.2345, "train/tokens": 200}) + "\n")
        end = time.monotonic() + 60
        while "1.234" not in page.read_text() and time.monotonic() < end:
            time.sleep(0.2)
        assert "1.234" in page.read_text()
    finally:
        program.kill()
        program.wait()
