"""Three engines, one task in a local file: our own, LLM Foundry and lm-eval must give the same number."""

import importlib.util
import json
import random

import pytest
import torch
from icl_setup import task_of, tiny_model, tiny_tokenizer, write_rows

from open_lm.distributed import World
from open_lm.evaluate.eval_model import EvalModel
from open_lm.evaluate.records import CheckpointRecords
from open_lm.evaluate.tasks.suite import Suite

MISSING = [name for name in ("llmfoundry", "lm_eval") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]

WORDS = ["red", "blue", "green", "list", "dict", "def", "return", "self", "name", "value"]
HARNESS = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Questions whose answer is the word before the last, and whose choices have equally many tokens each: sums and
    means of log-likelihoods, which the harness and LLM Foundry take, then order them alike."""
    folder = tmp_path_factory.mktemp("three")
    rng, rows = random.Random(0), []
    while len(rows) < 60:
        right, wrong = rng.sample(WORDS, 2)
        choices = [f"{right} {wrong}", f"{wrong} {right}"]
        if len({len(tokenizer.encode(f" {choice}")) for choice in choices}) == 1:
            gold = rng.randrange(2)
            query = f"{right} {wrong} then {right} {wrong} then"
            rows.append({"query": query, "choices": choices[:: -1 if gold else 1], "gold": gold})
    continuations = [{"context": row["query"], "continuation": row["choices"][row["gold"]]} for row in rows]
    for name, content in (("choices", rows), ("words", continuations)):
        write_rows(folder / f"{name}.jsonl", content)
    choice = {**HARNESS, "task": "choices", "dataset_kwargs": {"data_files": {"test": str(folder / "choices.jsonl")}}}
    (folder / "choices.yaml").write_text(json.dumps({**choice, "doc_to_text": "{{query}}"}))
    greedy = {key: value for key, value in choice.items() if key != "doc_to_choice"}
    greedy |= {"task": "words", "dataset_kwargs": {"data_files": {"test": str(folder / "words.jsonl")}}}
    greedy |= {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": " {{continuation}}"}
    (folder / "words.yaml").write_text(json.dumps(greedy))
    return folder, rows


def trained(tokenizer, rows):
    """A model that has learned most of the task."""
    model = tiny_model(seed=1, seq_len=64).train()
    texts = [tokenizer.encode(f"{row['query']} {row['choices'][row['gold']]}") for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        batch = texts[step % 4 :: 4]
        width = max(map(len, batch))
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in batch])
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def scores(model, tokenizer, folder):
    """The accuracy of each task by each engine."""
    from open_lm.evaluate.engine.runner import NativeRunner
    from open_lm.evaluate.foundry.runner import FoundryRunner
    from open_lm.evaluate.lm_harness.runner import HarnessRunner

    eval_model = EvalModel(model, tokenizer, 64, 400, CheckpointRecords("model", "", "", tokenizer.name))
    kinds = {"choices": "multiple_choice", "words": "language_modeling"}
    suite = Suite(tasks=tuple(task_of(folder / f"{name}.jsonl", kind, label=name) for name, kind in kinds.items()))
    found = {}
    for engine in (NativeRunner, FoundryRunner):
        runner = engine(eval_model, suite, World(), 64, "fp32")
        found[engine] = {key.split("/")[0]: runner.run(key, lambda n: None)[0].value for key in runner.keys}
    harness = HarnessRunner(eval_model, tuple(kinds), str(folder), None, World(), 64, "fp32")
    found[HarnessRunner] = {
        key: next(r.value for r in harness.run(key, lambda n: None) if r.metric == "acc") for key in harness.keys
    }
    return list(found.values())


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_three_engines_give_the_same_numbers(files, tokenizer, kind):
    folder, rows = files
    model = tiny_model(seed=1, seq_len=64) if kind == "random" else trained(tokenizer, rows)
    native, foundry, harness = scores(model, tokenizer, folder)
    assert native == pytest.approx(foundry, abs=1e-6)
    assert native == pytest.approx(harness, abs=1e-6)
    assert 0.2 < native["choices"] < 0.8 if kind == "random" else 0 < native["words"] <= native["choices"]


def test_a_model_of_transformers_scores_alike_in_ours_and_llm_foundry(files, tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    from open_lm.evaluate.engine.runner import NativeRunner
    from open_lm.evaluate.eval_model import load_hf_eval_model
    from open_lm.evaluate.foundry.runner import FoundryRunner
    from open_lm.model.config import ModelFlags

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=64, **shape))
    model.lm_head.weight.data.mul_(20)
    model.save_pretrained(tmp_path / "llama")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    flags = ModelFlags(hf_model=str(tmp_path / "llama"), hf_seq_len=64)
    eval_model = load_hf_eval_model(flags, str(tmp_path / "tokenizer.json"), torch.device("cpu"), torch.float32)
    answers = [{"context": f"{word} is", "answer": word} for word in WORDS]
    path = write_rows(tmp_path / "answers.jsonl", answers)
    tasks = (
        task_of(files[0] / "choices.jsonl", "multiple_choice", label="choices"),
        task_of(path, "generation_task_with_answers", label="answers", num_fewshot=[1]),
    )
    runners = [engine(eval_model, Suite(tasks=tasks), World(), 64, "fp32") for engine in (NativeRunner, FoundryRunner)]
    native, foundry = ([runner.run(key, lambda n: None)[0].value for key in runner.keys] for runner in runners)
    assert native == pytest.approx(foundry, abs=1e-6)
    assert 0 < native[0] < 1
