"""Our models in EleutherAI's harness, on tasks that need no network."""

import importlib.util
import json
import os

import pytest
import torch
from icl_setup import SAMPLES, task_of, tiny_model, tiny_tokenizer, write_rows

from open_lm.distributed import World
from open_lm.evaluate.eval_model import EvalModel
from open_lm.evaluate.records import CheckpointRecords

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
]

CHOICES = """
task: choices_here
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
task: writing_here
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""

WORDS = """
task: words_here
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: " {{continuation}}"
metric_list: [{metric: perplexity}]
"""


@pytest.fixture(scope="module")
def eval_model(tmp_path_factory):
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return EvalModel(tiny_model(), tokenizer, 128, 400, CheckpointRecords("tiny", "", "", tokenizer.name))


@pytest.fixture(scope="module")
def runner(eval_model, tmp_path_factory):
    from open_lm.evaluate.lm_harness.runner import HarnessRunner

    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choices.yaml").write_text(CHOICES % (SAMPLES / "python_choices.jsonl"))
    rows = [{"context": "two plus two is", "answer": "4"}, {"context": "def f", "answer": "x"}]
    (folder / "writing.yaml").write_text(WRITING % write_rows(folder / "writing.jsonl", rows))
    (folder / "words.yaml").write_text(WORDS % (SAMPLES / "python_words.jsonl"))
    tasks = ("choices_here", "writing_here", "words_here")
    return HarnessRunner(eval_model, tasks, str(folder), None, World(), 128, "fp32")


def test_multiple_choice_by_sums_equals_a_plain_forward_pass(runner, eval_model):
    records = {record.metric: record for record in runner.run("choices_here", lambda n: None)}
    rows = [json.loads(line) for line in (SAMPLES / "python_choices.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            context = eval_model.tokenizer.encode(row["query"])
            ids = eval_model.tokenizer.encode(f"{row['query']} {choice}")
            with torch.no_grad():
                log_p = eval_model.model(torch.tensor([ids]))[0][0].log_softmax(-1)
            sums.append(sum(float(log_p[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        right += sums.index(max(sums)) == row["gold"]
    assert records["acc"].value == pytest.approx(right / len(rows))
    assert records["acc"].questions == len(rows)
    assert "acc_norm" in records


def test_greedy_writing_runs_offline(runner):
    (record,) = [r for r in runner.run("writing_here", lambda n: None) if r.metric == "exact_match"]
    assert record.questions == 2


def test_error_bars_are_drawn_without_a_fork(runner, monkeypatch):
    """A fork inherits a training run's handler of SIGTERM: a pool of processes then waits for its end for ever."""

    def fork():
        raise AssertionError("a fork")

    monkeypatch.setattr(os, "fork", fork)
    (record,) = runner.run("words_here", lambda n: None)
    assert record.metric == "perplexity" and record.stderr > 0


def test_a_rolling_text_longer_than_the_context_is_summed_over_windows(eval_model):
    from types import SimpleNamespace

    from open_lm.evaluate.lm_harness.adapter import OpenLMHarness

    model = OpenLMHarness(eval_model=eval_model, max_seq_len=17)
    text = "the list of items is sorted and then returned to the caller " * 3
    (found,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids = [eval_model.tokenizer.eot_id, *eval_model.tokenizer.encode(text)]
    with torch.no_grad():
        expected, at = 0.0, 0
        while at < len(ids) - 1:
            stop = min(at + 17, len(ids) - 1)
            start = 0 if at == 0 else max(0, stop - 17)
            log_p = eval_model.model(torch.tensor([ids[start : stop + 1]]))[0][0].log_softmax(-1)
            expected += sum(float(log_p[i - 1 - start, ids[i]]) for i in range(at + 1, stop + 1))
            at = stop
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_row_of_a_group_stands_beside_those_of_its_tasks_and_counts_once(eval_model, tmp_path):
    from open_lm.evaluate.lm_harness.runner import HarnessRunner
    from open_lm.evaluate.records import markdown

    rows = (SAMPLES / "python_choices.jsonl").read_text().splitlines(keepends=True)
    for name, chosen in (("one", rows[:4]), ("two", rows[4:12]), ("alone", rows[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(chosen))
        text = CHOICES.replace("choices_here", name) % (tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.yaml").write_text(text.replace(", {metric: acc_norm}", ""))
    group = "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tmp_path / "both.yaml").write_text(group)
    harness = HarnessRunner(eval_model, ("both", "alone"), str(tmp_path), None, World(), 128, "fp32")
    records = [record for key in harness.keys for record in harness.run(key, lambda n: None)]
    found = {record.label: record for record in records}
    assert {name: record.part_of for name, record in found.items()} == {
        "both": None, "one": "both", "two": "both", "alone": None,
    }  # fmt: skip
    assert found["both"].value == pytest.approx((4 * found["one"].value + 8 * found["two"].value) / 12)
    table = markdown([CheckpointRecords("run", "", "", "", records=records)])
    mean = (found["both"].value + found["alone"].value) / 2
    assert f"| **average** | {mean:.4f} |" in table


def test_an_unknown_task_is_named(eval_model, tmp_path):
    from open_lm.errors import ConfigError
    from open_lm.evaluate.lm_harness.runner import HarnessRunner

    (tmp_path / "choices.yaml").write_text(CHOICES % "x.jsonl")
    with pytest.raises(ConfigError, match="--tasks nothing: no task in"):
        HarnessRunner(eval_model, ("nothing",), str(tmp_path), None, World(), 128, "fp32")


def test_the_harness_accuracy_is_llm_foundrys_where_choices_are_equally_long(eval_model, runner, tmp_path):
    """Sums and means of the same number of tokens order the choices alike; the native engine takes means."""
    from open_lm.evaluate.engine.icl import evaluate_icl
    from open_lm.evaluate.lm_harness.runner import HarnessRunner

    encode = eval_model.tokenizer.encode
    rows = [json.loads(line) for line in (SAMPLES / "python_choices.jsonl").read_text().splitlines()]
    rows += [
        {"query": "count", "choices": ["a b", "b a"], "gold": 0},
        {"query": "if", "choices": ["x y", "y x"], "gold": 1},
    ]
    even = [row for row in rows if len({len(encode(" " + choice)) for choice in row["choices"]}) == 1]
    path = write_rows(tmp_path / "even.jsonl", even)
    (tmp_path / "choices.yaml").write_text(CHOICES % path)
    harness = HarnessRunner(eval_model, ("choices_here",), str(tmp_path), None, World(), 128, "fp32")
    (theirs,) = [r.value for r in harness.run("choices_here", lambda n: None) if r.metric == "acc"]
    task = task_of(path, "multiple_choice")
    (ours,) = evaluate_icl(eval_model.model, eval_model.tokenizer, [task], world=World(), max_seq_len=128).values()
    assert theirs == pytest.approx(ours)
    assert len(even) >= 2
