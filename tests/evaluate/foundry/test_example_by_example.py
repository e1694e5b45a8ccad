"""Each single example is LLM Foundry's: its ids, its span, its likelihoods and its verdict, not only the mean."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from icl_setup import sample, task_of, tiny_model, tiny_tokenizer, write_rows
from shared import SHARED

from open_lm.distributed import World
from open_lm.errors import DataError
from open_lm.evaluate.engine.runner import NativeRunner
from open_lm.evaluate.eval_model import EvalModel
from open_lm.evaluate.records import CheckpointRecords
from open_lm.evaluate.tasks.suite import Suite

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llmfoundry") is None, reason="LLM Foundry is not installed: `make install-eval`"
    ),
]
ICL = SHARED / "data" / "icl"
SEQ_LEN = 160
"""Short enough that prompts of most files lose their start."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return Suite(tasks=tuple(tasks(tmp_path_factory.mktemp("examples"))), batch_size=6)


def tasks(folder):
    """Every available file with and without examples, some rows of each; generated answers, too."""
    from foundry_examples import settings_of

    yield task_of(sample("python_choices"), "multiple_choice", label="choices", num_fewshot=[0, 2])
    yield task_of(sample("python_imports"), "schema", label="schema", num_fewshot=[0, 3], prelimiter="> ")
    yield task_of(sample("python_words"), "language_modeling", label="words", num_fewshot=[0, 1])
    yield task_of(
        sample("short_answers"), "generation_task_with_answers", label="answers", num_fewshot=[0, 2],
        continuation_delimiter=" is ", early_stopping_criteria=["\n\n"],
    )  # fmt: skip
    for path in sorted(ICL.glob("*.jsonl")):
        lines = path.read_text().split("\n")
        rows = [json.loads(line) for line in lines[:: len(lines) // 10][:10] if line]
        settings = settings_of(rows[0])
        kind, file = settings.pop("kind"), write_rows(folder / path.name, rows)
        yield task_of(file, kind, label=path.stem, num_fewshot=[0, 1], **settings)


@pytest.fixture(scope="module")
def one_that_read_the_samples(tokenizer):
    """A model that knows some answers."""
    from foundry_examples import trained

    text = "\n".join(Path(sample(name)).read_text() for name in ("python_words", "python_choices", "short_answers"))
    return trained(tiny_model(seed=1, seq_len=SEQ_LEN), torch.tensor(tokenizer.encode(text)))


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_every_example_of_every_task_is_llm_foundrys(tokenizer, suite, kind, one_that_read_the_samples):
    from foundry_examples import differences, ours, theirs

    from open_lm.evaluate.foundry.runner import FoundryRunner

    model = tiny_model(seed=3, seq_len=SEQ_LEN) if kind == "random" else one_that_read_the_samples
    eval_model = EvalModel(model, tokenizer, SEQ_LEN, 400, CheckpointRecords("tiny", "", "", tokenizer.name))
    native, foundry = (runner(eval_model, suite, World(), SEQ_LEN, "fp32") for runner in (NativeRunner, FoundryRunner))
    wrong, verdicts, truncated = {}, set(), 0
    for key in native.keys:
        mine, other = ours(native, key), theirs(foundry, key)
        wrong[key] = differences(mine, other)
        verdicts |= {example.right for example in mine}
        truncated += sum(len(ids) == SEQ_LEN for example in mine for ids, _ in example.rows)
    assert {key: found for key, found in wrong.items() if found} == {}
    assert verdicts == {True, False}
    assert truncated > 0


ODD = {
    "letters": ("multiple_choice", [
        {"query": "Ñandú — 中文 \U0001f9d1\u200d\U0001f33e e\u0301 \u202eabc", "choices": ["naïve", "日本"], "gold": 1},
        {"query": "\U0001f600", "choices": ["\U0001f600", "\U0001f600\U0001f601"], "gold": 1},
        {"query": "a line\nand\ta tab  two spaces ", "choices": ["x ", "x\n\ny"], "gold": 1},
        {"query": "the same twice", "choices": ["y", "y"], "gold": 1},
        {"query": "<|endoftext|> inside", "choices": ["<|endoftext|>", "end"], "gold": 0},
        {"query": "", "choices": ["nothing", "something"], "gold": 1},
    ]),
    "one": ("multiple_choice", [{"query": f"only {n}", "choices": ["one"], "gold": 0} for n in range(3)]),
    "many": ("multiple_choice", [
        {"query": "many", "choices": [f"number {n}" for n in range(12)], "gold": gold} for gold in (0, 11)
    ]),
    "long": ("multiple_choice", [
        {"query": "long " * 300, "choices": ["one two", "three " * 40], "gold": 0},
        {"query": "short", "choices": ["word " * 30, "w"], "gold": 1},
    ]),
    "named groups": ("language_modeling", [
        {"context": f"{n} and", "continuation": f"{n + 1}", "category": category}
        for category in ("two words", "a-b (c)", "Ünï", "x") for n in range(3)
    ]),
    "pronouns": ("schema", [
        {"context_options": ["Tom", "The  very old\u00a0man from Łódź"], "continuation": "sat.", "gold": 1},
        {"context_options": ["a", "a b"], "continuation": "a b c d", "gold": 0},
    ]),
    "answers": ("generation_task_with_answers", [
        {"context": "Q: ¿qué?", "answer": "é", "aliases": ["é", "e\u0301", "The É!"]},
        {"context": "x " * 200, "answer": "y", "aliases": ["y", "a y"]},
    ]),
}  # fmt: skip
"""What a file may hold: letters of all kinds, one choice, many, equal ones, empty queries, names with spaces. (A slash
in a category, or rows with different numbers of choices, LLM Foundry itself does not take.)"""


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_as_llm_foundry_reads_them(name, tokenizer, tmp_path, one_that_read_the_samples):
    from foundry_examples import compare_file

    kind, rows = ODD[name]
    eval_model = EvalModel(
        one_that_read_the_samples, tokenizer, SEQ_LEN, 400, CheckpointRecords("tiny", "", "", tokenizer.name)
    )
    path = write_rows(tmp_path / f"{name}.jsonl", rows)
    categories = {"has_categories": True} if "category" in rows[0] else {}
    for delimiter in (" ", "\nAnswer: "):
        settings = {"kind": kind, "continuation_delimiter": delimiter, "prompt_string": "Now:\n", **categories}
        n_examples, n_wrong = compare_file(eval_model, path, [0, 1], SEQ_LEN, settings)
        assert (n_examples, n_wrong) == (2 * len(rows), 0)


def test_a_row_longer_than_the_context_is_refused_by_both_and_left_out_by_name(tokenizer, tmp_path):
    from foundry_examples import compare_file, fitting

    from open_lm.evaluate.foundry.runner import FoundryRunner

    rows = [{"query": f"row {n}", "choices": ["a", "b" * n], "gold": 0} for n in (1, SEQ_LEN, 20, SEQ_LEN - 2)]
    lines = [json.dumps(row) for row in rows]
    kept, too_long = fitting(lines, tokenizer, SEQ_LEN)
    assert too_long == [2] and len(kept) == 3
    records = CheckpointRecords("tiny", "", "", tokenizer.name)
    eval_model = EvalModel(tiny_model(seed=3, seq_len=SEQ_LEN), tokenizer, SEQ_LEN, 400, records)
    path = write_rows(tmp_path / "kept.jsonl", [json.loads(line) for line in kept])
    assert compare_file(eval_model, path, [0, 1], SEQ_LEN, {"kind": "multiple_choice"}) == (6, 0)
    path = write_rows(tmp_path / "whole.jsonl", rows)
    suite = Suite(tasks=(task_of(path, "multiple_choice"),), batch_size=2)
    for runner, error, message in (
        (NativeRunner, DataError, "whole.jsonl:2: a continuation of"),
        (FoundryRunner, RuntimeError, "equal size"),
    ):
        with pytest.raises(error, match=message):
            runner(eval_model, suite, World(), SEQ_LEN, "fp32").run("task/0-shot", lambda n: None)
