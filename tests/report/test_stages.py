"""Post-training in the report: stages with what they measured, and no chart that takes another loss for a guess's."""

import json

import pytest

from open_lm.commands import report
from open_lm.report.facts import read_run
from open_lm.report.figures import _rate
from open_lm.report.stages import stage_table


@pytest.fixture
def stage(tmp_path):
    """`stage(name, task, rows)`: the folder of a run that logged `rows` after its steps 1, 2, …"""

    def made(name, task, rows):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        lines = [json.dumps({"step": k, "train/tokens": 10 * k, **row}) for k, row in enumerate(rows, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        facts = {"config": {"model": {"vocab_size": 64, "n_layers": 1, "hidden_dim": 8, "seq_len": 9}}}
        facts["config"]["flags"] = {"task": task, "pretrained": "base.pt"}
        (folder / "checkpoints/epoch_1.commit.json").write_text(
            json.dumps({"label": "1", "step": len(rows), "files": {}, "facts": facts})
        )
        return str(folder)

    return made


@pytest.fixture
def stages(stage):
    sft = stage("sft", "sft", [{"train/loss": 3.0}, {"train/loss": 2.0, "valid/loss": 2.5}, {"valid/loss": 1.25}])
    accuracies = [{"train/loss": 0.7, "train/preference_accuracy": a} for a in (0.2, 0.4, 0.6, 0.8, 1.0, 0.9)]
    grpo = [{"train/loss": 0.01, "train/reward": r} for r in (0.25, 0.75)]
    return [sft, stage("dpo", "dpo", accuracies), stage("grpo", "grpo", grpo)]


def test_each_stage_shows_what_its_task_measures_first_and_last(stages, stage):
    table = stage_table([read_run(folder) for folder in [*stages, stage("bare", "pretrain", [{"train/loss": 5.0}])]])
    rows = [row.replace('<td class="number">', "<td>") for row in table.split("<tr>")[2:]]
    cells = [[cell.split("</td>")[0] for cell in row.split("<td>")[1:]] for row in rows]
    assert cells == [
        ["sft", "sft", "3", "validation loss, nats a token", "2.500", "1.250"],
        ["dpo", "dpo", "6", "pairs ordered rightly", "40.0%", "90.0%"],
        ["grpo", "grpo", "2", "mean reward of a sampled answer", "0.250", "0.750"],
        ["bare", "pretrain", "1", "training loss", "5.000", "5.000"],
    ]


def test_small_learning_rates_fit_beside_their_axis():
    assert [_rate(y) for y in (0, 1e-4, 5e-5, 2.5e-5, 1e-3, 0.003, 1.0)] == [
        "0", "1e-4", "5e-5", "2.5e-5", "0.001", "0.003", "1",
    ]  # fmt: skip


def test_the_page_of_a_reinforced_model_draws_no_loss_of_a_guess(stages, tmp_path):
    report.main(["--run", stages[-1], "--stages", *stages[:-1], "--output", str(tmp_path / "page.html")])
    content = (tmp_path / "page.html").read_text()
    assert "Stage by stage" in content and "post-trained by grpo" in content and "Loss of grpo" in content
    assert "over steps" in content and "over tokens" not in content and "tokens a second" not in content
    assert "ln(64)" not in content and "from scratch" not in content and "0.750" in content
