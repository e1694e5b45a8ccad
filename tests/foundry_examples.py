"""LLM Foundry and our engine, example by example: ids, the span that is scored, its likelihood, the verdict.

`python tests/foundry_examples.py FOLDER [--tokenizer T] [--trained] [--rows N] [--shots N…] [--max-seq-len N]` compares
all task files of a folder, under random weights or those of a model that has read some of their rows. A row whose
continuation leaves no room for a context is refused by both engines: such rows are left out, named and counted.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from open_lm.evaluate.engine.encode import PromptEncoder, Question
from open_lm.evaluate.engine.generation import AnswerWriter, is_right, plan_generation
from open_lm.evaluate.engine.icl import LoglikelihoodRequest
from open_lm.evaluate.engine.metrics import measure
from open_lm.evaluate.engine.ranks import score_questions
from open_lm.evaluate.tasks.task import EXACT_MATCH, LM_ACCURACY, MC_ACCURACY


@dataclass
class Example:
    """One question: the ids of each choice with the place where the continuation starts, their mean log-likelihoods,
    and whether it counts as right. Of a written answer there are the text and the verdict alone."""

    rows: list[tuple[tuple[int, ...], int]]
    cross_entropies: list[float]
    right: bool
    text: str = ""


def theirs(runner: Any, key: str) -> list[Example]:
    """Each example of job `key` as LLM Foundry's own datasets make it and its own metrics judge it."""
    found: list[Example] = []
    with _watched(found):
        runner.run(key, lambda n: None)
    return found


def ours(runner: Any, key: str) -> list[Example]:
    """The same of the native engine."""
    engine, job = runner.engine, runner.jobs[key]
    prepared = engine.prepare(job, runner.book)
    if not isinstance(prepared, LoglikelihoodRequest):
        batches = plan_generation(prepared.asked, prepared.n_new, engine.batch_tokens)
        writer = AnswerWriter(engine.scorer, engine.encoder, engine.world, prepared.sampling)
        texts = writer.write(batches, prepared.n_new, job.task.early_stopping_criteria, lambda n: None)
        judged = [(texts[n], is_right(texts[n], aliases, job.task)) for n, aliases in enumerate(prepared.aliases)]
        return [Example([], [], right, text) for text, right in judged[: len(prepared.asked)]]
    metric = LM_ACCURACY if job.task.icl_task_type == "language_modeling" else MC_ACCURACY
    scores = score_questions(engine.scorer, engine.world, prepared.questions, engine.batch_tokens)
    return [_ours(question, n, scores, metric) for n, question in enumerate(prepared.questions)]


def _ours(question: Question, number: int, scores: Any, metric: str) -> Example:
    rows = [(choice.context + choice.continuation, len(choice.context)) for choice in question.choices]
    own = {(0, c): scores[number, c] for c in range(len(rows))}
    entropies = [score.cross_entropy for score in own.values()]
    return Example(rows, entropies, measure([metric], [question], own)[metric].value == 1)


def differences(mine: list[Example], other: list[Example], tolerance: float = 2e-5) -> list[str]:
    """Differences, example by example; likelihoods relative to their size."""
    found = [] if len(mine) == len(other) else [f"{len(mine)} examples, LLM Foundry has {len(other)}"]
    for number, (a, b) in enumerate(zip(mine, other, strict=False)):
        if a.rows != b.rows:
            found.append(f"example {number}: ids or spans {a.rows} {b.rows}")
        elif not np.allclose(a.cross_entropies, b.cross_entropies, rtol=tolerance, atol=tolerance):
            found.append(f"example {number}: cross-entropies {a.cross_entropies} {b.cross_entropies}")
        if a.right != b.right:
            found.append(f"example {number}: right {a.right}, {b.right} ({a.cross_entropies} {b.cross_entropies})")
        if a.text.strip() != b.text.strip():
            found.append(f"example {number}: wrote {a.text!r}, {b.text!r}")
    return found


def greatest(mine: list[Example], other: list[Example]) -> float:
    """The greatest difference of two likelihoods of one choice, relative to their size where that is above 1."""
    both = [
        pair
        for a, b in zip(mine, other, strict=False)
        for pair in zip(a.cross_entropies, b.cross_entropies, strict=False)
    ]
    return max((abs(a - b) / max(1.0, abs(b)) for a, b in both), default=0.0)


@contextlib.contextmanager
def _watched(found: list[Example]) -> Iterator[None]:
    """LLM Foundry's metrics tell `found` of each example while the block runs."""
    from llmfoundry.eval.metrics import nlp

    watched = {
        nlp.InContextLearningLMAccuracy: _likelihoods,
        nlp.InContextLearningMultipleChoiceAccuracy: _likelihoods,
        nlp.InContextLearningGenerationExactMatchAccuracy: _texts,
    }
    plain = {metric: metric.update for metric in watched}

    def watching(metric: Any) -> Any:
        def update(self: Any, *, batch: Any, outputs: Any, labels: Any, **more: Any) -> Any:
            verdicts = plain[metric](self, batch=batch, outputs=outputs, labels=labels, **more)
            found.extend(watched[metric](batch, outputs, verdicts["result"]))
            return verdicts

        return update

    for metric in watched:
        metric.update = watching(metric)
    try:
        yield
    finally:
        for metric, update in plain.items():
            metric.update = update


def _likelihoods(batch: Any, logits_BTV: torch.Tensor, results: list[int]) -> list[Example]:
    rows, entropies = [], []
    for i, span in enumerate(batch["continuation_indices"]):
        ids = batch["input_ids"][i]
        log_p = logits_BTV[i, span - 1].double().log_softmax(-1)
        entropies.append(-log_p.gather(1, ids[span][:, None]).mean().item())
        rows.append((tuple(ids[: int(span[-1]) + 1].tolist()), int(span[0])))
    groups = batch.get("choice_groupings", [(i, i + 1) for i in range(len(rows))])
    return [Example(rows[a:b], entropies[a:b], bool(right)) for (a, b), right in zip(groups, results, strict=True)]


def _texts(batch: Any, texts: list[str], results: list[int]) -> list[Example]:
    return [Example([], [], bool(right), text) for text, right in zip(texts, results, strict=True)]


METRICS = {"language_modeling": [LM_ACCURACY], "generation_task_with_answers": [EXACT_MATCH]}


def trained(model: torch.nn.Module, ids: torch.Tensor, *, steps: int = 60) -> torch.nn.Module:
    """`model` after it has read parts of `ids` until it knows some answers."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        starts = torch.randint(len(ids) - 97, (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[start : start + 97] for start in starts.tolist()])
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1])[0].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> int:
    """Compare every task file of a folder; returns how many examples differ."""
    import argparse
    import tempfile

    from icl_setup import tiny_model, tiny_tokenizer

    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.evaluate.eval_model import EvalModel
    from open_lm.evaluate.records import CheckpointRecords

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", help="without one: 400 tokens of Python")
    parser.add_argument("--trained", action="store_true", help="the model has read some of the rows")
    parser.add_argument("--files", nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=None, help="only the first N rows of each file")
    parser.add_argument("--shots", type=int, nargs="+", default=[0])
    parser.add_argument("--max-seq-len", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else tiny_tokenizer(Path(folder))
        n_embeddings = -(-tokenizer.vocab_size // 64) * 64
        model = tiny_model(seed=3, seq_len=args.max_seq_len, vocab_size=n_embeddings)
        paths = [p for p in sorted(args.folder.glob("*.jsonl")) if not args.files or p.stem in args.files]
        if args.trained:
            some = "\n".join(line for path in paths for line in path.read_text().split("\n")[:40])
            model = trained(model, torch.tensor(tokenizer.encode(some)), steps=150)
        about = CheckpointRecords("tiny", "", "", tokenizer.name)
        eval_model = EvalModel(model, tokenizer, args.max_seq_len, n_embeddings, about)
        for path in paths:
            lines = [line for line in path.read_text().split("\n") if line][: args.rows]
            settings = settings_of(json.loads(lines[0]))
            kept, too_long = fitting(lines, tokenizer, args.max_seq_len)
            if too_long:
                print(f"{path.stem}: {len(too_long)} rows longer than the context: lines {too_long}", flush=True)
            (Path(folder) / path.name).write_text("\n".join(kept) + "\n")
            compared = compare_file(eval_model, Path(folder) / path.name, args.shots, args.max_seq_len, settings)
            found = [a + b for a, b in zip(found, compared, strict=True)]
    print(f"{found[0]} examples, {found[1]} differences")
    return found[1]


def fitting(lines: list[str], tokenizer: Any, max_seq_len: int) -> tuple[list[str], list[int]]:
    """The rows whose continuations leave room for a context, and the line numbers of those that do not."""
    encoder, kept, too_long = PromptEncoder(tokenizer), [], []
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        texts = row.get("choices") or [row[key] for key in ("continuation",) if key in row]
        longest = max((len(ids) for ids in encoder.plain([f" {text.strip()}" for text in texts])), default=0)
        if longest < max_seq_len:
            kept.append(line)
        else:
            too_long.append(number)
    return kept, too_long


def compare_file(
    eval_model: Any, path: Path, shots: list[int], max_seq_len: int, settings: dict[str, Any]
) -> tuple[int, int]:
    """How many examples the jobs of a task file have, and how many differences."""
    from icl_setup import task_of

    from open_lm.distributed import World
    from open_lm.evaluate.engine.runner import NativeRunner
    from open_lm.evaluate.foundry.runner import FoundryRunner
    from open_lm.evaluate.tasks.suite import Suite

    kind = settings["kind"]
    more = {key: value for key, value in settings.items() if key != "kind"}
    suite = Suite(tasks=(task_of(path, kind, label=path.stem, num_fewshot=shots, **more),), batch_size=8)
    parts = (eval_model, suite, World(), max_seq_len, "fp32")
    native, foundry = NativeRunner(*parts), FoundryRunner(*parts)
    n_examples = n_wrong = 0
    for key in native.keys:
        mine, other = ours(native, key), theirs(foundry, key)
        wrong = differences(mine, other)
        right = sum(example.right for example in mine)
        cut = sum(any(len(ids) >= max_seq_len for ids, _ in example.rows) for example in mine)
        counts = f"{len(mine)} examples, {right} right, {cut} cut, {len(wrong)} differences"
        print(f"{key}: {counts}, the greatest {greatest(mine, other):.1e}", *wrong[:3], sep="\n  ", flush=True)
        n_examples, n_wrong = n_examples + len(mine), n_wrong + len(wrong)
    return n_examples, n_wrong


def settings_of(row: dict[str, Any]) -> dict[str, Any]:
    """The type of a file's task, from its first row, and the delimiter that LLM Foundry's YAMLs give it."""
    if "context_options" in row:
        return {"kind": "schema"}
    if "choices" in row:
        return {"kind": "multiple_choice", "continuation_delimiter": "\nAnswer: " if "\n" in row["query"] else " "}
    if "continuation" in row:
        with_categories = {"continuation_delimiter": "\nAnswer: ", "has_categories": True} if "category" in row else {}
        return {"kind": "language_modeling", **with_categories}
    return {"kind": "generation_task_with_answers", "continuation_delimiter": "\nAnswer: "}


if __name__ == "__main__":
    sys.exit(min(main(), 1))
