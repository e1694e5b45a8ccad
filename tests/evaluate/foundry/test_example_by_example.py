"""Each single example is LLM Foundry's: its ids, its span, its likelihoods and its verdict, not only the mean."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from icl_setup import sample, task_of, tiny_model, tiny_tokenizer, write_rows
from shared import SHARED

from open_lm.distributed import World
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


def trained(tokenizer):
    """A model that has read the sample files until it knows some answers."""
    model = tiny_model(seed=1, seq_len=SEQ_LEN).train()
    text = "\n".join(Path(sample(name)).read_text() for name in ("python_words", "python_choices", "short_answers"))
    ids = torch.tensor(tokenizer.encode(text))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        starts = torch.randint(len(ids) - 97, (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[start : start + 97] for start in starts.tolist()])
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1])[0].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_every_example_of_every_task_is_llm_foundrys(tokenizer, suite, kind):
    from foundry_examples import differences, ours, theirs

    from open_lm.evaluate.foundry.runner import FoundryRunner

    model = tiny_model(seed=3, seq_len=SEQ_LEN) if kind == "random" else trained(tokenizer)
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
