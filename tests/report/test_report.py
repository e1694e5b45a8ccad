"""The page about a run: it shows the figures of the files, needs nothing from outside, names what is wrong."""

import html.parser
import json
import re
from pathlib import Path

import pytest

from open_lm.commands import report
from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.records import CheckpointRecords, Record, Results
from open_lm.report.charts import Rule, Series, line_chart, ticks
from open_lm.report.compare import read_metric
from open_lm.report.facts import read_run, smoothed


class Page(html.parser.HTMLParser):
    """Collects the text, the tags and the attributes of a page."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture
def run(tmp_path):
    """A run of 4 steps of 100 tokens, resumed after step 2, which was logged by both."""
    folder = tmp_path / "logs" / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    rows = [
        {"step": 1, "train/loss": 4.0, "train/lr": 0.5, "train/tokens": 100, "train/tokens_per_second": 50},
        {"step": 2, "train/loss": 99.0, "train/lr": 0.5, "train/tokens": 200, "train/tokens_per_second": 50},
        {"step": 2, "train/loss": 3.0, "train/lr": 0.5, "train/tokens": 200, "train/tokens_per_second": 50},
        {"step": 2, "valid/loss": 3.25, "valid/tokens": 60},
        {"step": 4, "train/loss": 2.0, "train/lr": 0.1, "train/tokens": 400, "train/tokens_per_second": 1234},
        {"step": 4, "valid/loss": 2.125, "valid/tokens": 60, "train/grad_norm": None},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"vocab_size": 64, "n_layers": 3, "hidden_dim": 48, "seq_len": 10}
    for label, step in (("1", 2), ("2", 4)):
        commit = {"label": label, "step": step, "files": {}, "facts": {"config": {"model": model}}}
        (folder / "checkpoints" / f"epoch_{label}.commit.json").write_text(json.dumps(commit))
    return folder


def test_facts_are_read_in_order_and_a_step_logged_twice_counts_as_last_logged(run):
    facts = read_run(str(run))
    assert facts.over_tokens("train/loss") == [(100, 4.0), (200, 3.0), (400, 2.0)]
    assert facts.over_tokens("valid/loss") == [(200, 3.25), (400, 2.125)]
    assert (facts.name, facts.vocab_size, facts.checkpoints, facts.steps) == ("tiny", 64, (200, 400), 4)
    assert facts.uniform_loss == pytest.approx(4.1588831)


def test_the_page_shows_the_last_figures_and_stands_alone(run, tmp_path):
    report.main(["--run", str(run), "--output", str(tmp_path / "page.html"), "--title", "A <b>bold</b> run"])
    content = (tmp_path / "page.html").read_text()
    page = Page(content)
    for shown in ("2.125", "51%", "ln(64) = 4.16", "400", "1.23k", "A <b>bold</b> run", "3 layers, 48 wide"):
        assert shown in page.text, shown
    assert page.tags.count("svg") == 3 and "script" not in page.tags and "link" not in page.tags
    assert not [value for name, value in page.attributes if name in ("href", "src")]
    assert not re.search(r"https?://|url\(", content)


def test_every_optional_part_appears_with_its_counts(run, tmp_path):
    files = {
        "corpus": {"documents": 1200, "bytes": 3_400_000, "sources": {"a": {}, "b": {}}, "rejected": {"test": 7}},
        "ledger": {
            "documents": {"in": 1200, "tokenized": 1190, "rejected": {"empty": 10}}, "samples": 77,
            "tokens": {"in": 850_000, "in_shards": 849_900, "tail": 100}, "tokens_per_sample": 11,
        },
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "def <x>", "text": ": pass<|endoftext|>"}) + "\n")
    (tmp_path / "commands.txt").write_text("# first\npython a.py --x '1 & 2'\n")
    (tmp_path / "timings.tsv").write_text("first\t5\nfirst\t61\nsecond\t2\n")
    report.main([
        "--run", str(run), "--output", str(tmp_path / "page.html"), "--corpus", str(tmp_path / "corpus.json"),
        "--ledgers", str(tmp_path / "ledger.json"), str(tmp_path / "ledger.json"),
        "--samples", str(tmp_path / "samples.jsonl"), "--commands", str(tmp_path / "commands.txt"),
        "--timings", str(tmp_path / "timings.tsv"),
    ])  # fmt: skip
    shown = Page((tmp_path / "page.html").read_text()).text
    for piece in (
        "3.4 MB", "1,200 documents", "2 sources", "7 files left out", "850k tokens", "1,190 documents, 10 rejected",
        "77 samples of 11", "100 tokens of tail", "validation shards", "def <x>", "python a.py --x '1 & 2'",
        "1m01s", "1m03s",
    ):  # fmt: skip
        assert piece in shown, piece
    assert "<|endoftext|>" not in shown


def test_answers_of_the_first_and_last_iteration_stand_side_by_side(run, tmp_path):
    rows = [
        {"iteration": k, "prompt": f"{n}+1=<b>", "answer": str(n + (k > 0)), "reward": float(k > 0)}
        for k in (0, 5, 10)
        for n in range(20)
    ]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.main(["--run", str(run), "--output", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text())
    assert "iteration 0: mean reward 0.000 of 20 answers" in page.text
    assert "iteration 10: mean reward 1.000 of 20 answers" in page.text and "iteration 5" not in page.text
    assert "3+1=<b>" in page.text and page.tags.count("tr") == 2 * (1 + 7)


def test_answers_of_several_models_are_compared_with_their_mean_rewards(run, tmp_path):
    for name, right in (("sft", 0), ("grpo", 1)):
        rows = [
            {
                "question": f"{n}+1=?",
                "prompt_ids": [n, 1],
                "answer_written": f"{name} {n}",
                "rewards": {"m:exact": right},
            }
            for n in range(20)
        ]
        rewards = {"m:exact": {"mean": right, "stderr": 0.015}}
        summary = {"answers": 20, "finished_share": 0.75, "answer_tokens": 3.25, "rewards": rewards}
        (tmp_path / name).mkdir()
        (tmp_path / name / "rewards.json").write_text(json.dumps(summary))
        (tmp_path / name / "rewards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = ["--output", str(tmp_path / "page.html")]
    report.main(["--run", str(run), "--answers", str(tmp_path / "sft"), str(tmp_path / "grpo"), *out])
    page = Page((tmp_path / "page.html").read_text())
    for shown in ("exact", "0.000 ± 0.015", "1.000 ± 0.015", "3.2", "75%", "3+1=?", "sft 3", "grpo 3"):
        assert shown in page.text, shown
    with pytest.raises(ConfigError, match=r"holds no rewards\.json"):
        report.main(["--run", str(run), "--answers", str(tmp_path), *out])
    (tmp_path / "sft" / "rewards.json").write_text(json.dumps({"rows": 3}))
    with pytest.raises(DataError, match="is of files, not of answers"):
        report.main(["--run", str(run), "--answers", str(tmp_path / "sft"), *out])


def test_scores_are_bars_with_their_chance_and_error(run, tmp_path):
    asked = {
        "label": "odd",
        "shots": 0,
        "category": None,
        "truncated": 0,
        "seconds": 1.0,
        "data_sha256": "",
        "identity": "",
    }
    records = [
        Record(key="odd/0-shot", metric="InContextLearningMultipleChoiceAccuracy", value=0.625, stderr=0.0125,
               chance=0.25, questions=1500, **asked),
    ]  # fmt: skip
    results = Results("native", {}, [CheckpointRecords("run", "epoch_1.pt", "tiny", "tok", records=records)], 1.0)
    results.write(str(tmp_path))
    report.main(
        ["--run", str(run), "--output", str(tmp_path / "page.html"), "--scores", str(tmp_path / "results.json")]
    )
    content = (tmp_path / "page.html").read_text()
    for piece in ("odd/0-shot, accuracy", "0.625 ± 0.013", "1,500"):
        assert piece in Page(content).text, piece
    assert 'style="width:62.5%"' in content and 'style="left:25.0%"' in content


def test_a_run_without_checkpoint_or_validation_still_has_a_page(run, tmp_path):
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 4.0, "train/tokens": 100}) + "\n")
    report.main(["--run", str(run), "--output", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags.count("svg") == 1 and "ln(" not in page.text


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        ([], ConfigError, "--run is missing"),
        (["--run", "nowhere"], DataError, "--run nowhere: no metrics.jsonl"),
        (["--run", "RUN", "--samples", "none.jsonl"], ConfigError, "--samples none.jsonl: no such file"),
        (["--run", "RUN", "--corpus", "RUN/metrics.jsonl"], DataError, "--corpus .*metrics.jsonl: not JSON"),
    ],
)
def test_what_is_missing_or_damaged_is_named(run, tmp_path, flags, error, said):
    with pytest.raises(error, match=said):
        report.main([flag.replace("RUN", str(run)) for flag in flags] + ["--output", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_line_of_metrics_is_named(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo\n{"step": 6}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:7"):
        read_run(str(run))


def test_points_lie_where_the_figures_say():
    """Worked by hand: the plot is 1000 - 58 - 18 wide and 380 - 14 - 40 high; y from 0 to 10 with 4 % above."""
    series = [Series("loss", [(0, 0), (50, 5), (100, 10)], "train")]
    drawn = line_chart(series, label="", x_name="", write_x=str, write_y=str, rules=[Rule("half", x=50)])
    (line,) = re.findall(r'polyline class="line train" points="([^"]+)"', drawn)
    places = [tuple(map(float, place.split(","))) for place in line.split()]
    assert places == [
        (58, 340),
        (520, pytest.approx(340 - 326 * 5 / 10.4, abs=0.1)),
        (982, pytest.approx(26.5, abs=0.1)),
    ]
    assert re.search(r'class="rule" x1="520.0" x2="520.0"', drawn)


@pytest.mark.parametrize(
    ("low", "high", "wanted", "expected"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (3.4, 8.5, 6, [4, 5, 6, 7, 8]),
        (0, 0.003, 4, [0, 0.001, 0.002, 0.003]),
        (7, 7, 4, [7]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, wanted, expected):
    assert ticks(low, high, wanted) == pytest.approx(expected)


def test_smoothing_keeps_a_line_and_the_ends():
    line = [(x, 3 * x + 1) for x in range(20)]
    assert smoothed(line, 7) == [(x, pytest.approx(y)) for x, y in line]
    assert smoothed([(0, 5), (1, 1), (2, 3)], 3) == [(0, 5), (1, 3), (2, 3)]


def test_long_numbers_at_the_axis_have_room():
    series = [Series("lr", [(0, 0.00013), (10, 0.00031)], "train")]
    chart = line_chart(series, label="", x_name="tokens", write_x=str, write_y=lambda y: f"{y:.7f}")
    (place, *_), *_ = ends = re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]+)<', chart)
    assert len(ends) > 2 and all(float(x) > 9 * len(label) for x, label in ends) and float(place) > 80


def test_a_run_without_validation_has_none_in_its_legend(run, tmp_path):
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines(True) if "valid/" not in line]
    (run / "metrics.jsonl").write_text("".join(lines))
    content = Path(report.main(["--run", str(run), "--output", str(tmp_path / "page.html")])).read_text()
    assert ">validation<" not in content and "training, smoothed" in content


def test_a_value_under_the_mouse_that_was_measured_elsewhere_says_where():
    lines = [Series("loss", [(x, 9 - x) for x in range(6)], "train"), Series("valid", [(5, 4.5)], "run1", dots=True)]
    chart = line_chart(lines, label="", x_name="tokens", write_x="{:.0f}".format, write_y="{:.1f}".format)
    assert "valid 4.5 (at 5 tokens)<" in chart and "valid 4.5<" in chart and "loss 9.0<" in chart


def test_a_last_line_that_is_being_written_waits_for_its_end(run, tmp_path):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo')
    assert read_run(str(run)).steps == 4
    assert read_metric(run, "train/loss") == {1: 4.0, 2: 3.0, 4: 2.0}


def test_a_loss_beyond_every_perplexity_has_a_page(run, tmp_path):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "valid/loss": 900.0, "train/tokens": 500}\n')
    for runs in ([run], [run, run]):
        report.main(["--run", *map(str, runs), "--output", str(tmp_path / "page.html")])
        assert "∞" in Page((tmp_path / "page.html").read_text()).text
