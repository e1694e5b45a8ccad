"""Rewards of the answers that a model gives to prompts: `openlm evaluate --reward … --prompts`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import orjson

from open_lm import storage
from open_lm.checkpoint.load_model import load_model, stored_tokenizer
from open_lm.data.tokenizer import Tokenizer, load_tokenizer
from open_lm.distributed import pick_device
from open_lm.generation.config import GenerateConfig
from open_lm.generation.decode import generate
from open_lm.post_training.prompts import Prompts
from open_lm.post_training.rewards import Answer, build_rewards
from open_lm.post_training.score_config import RewardScoring


def score_answers(
    config: RewardScoring, checkpoint: str, tokenizer: str | None, folder: str, device: str
) -> dict[str, Any]:
    """Write rewards.jsonl and rewards.json into `folder`; the summary.

    Raises:
        DataError: a prompt has no tokens, or a reward is no finite number.
        ConfigError: a reward does not exist, or the tokenizer is not known.
    """
    assert config.prompts is not None
    storage.require_writable(folder, "--output-dir")
    prompts = Prompts(config.prompts, seed=0, per_iteration=1, steps_per_iteration=1)
    loaded = load_tokenizer(tokenizer or prompts.ledger.get("tokenizer") or stored_tokenizer(checkpoint))
    where = str(pick_device(device, 0))
    model = load_model(checkpoint, device=where)
    scores = build_rewards(config.reward, loaded, where, next(model.parameters()).dtype)
    answers = _answers(model, prompts, loaded, config)
    columns = dict(zip(config.reward, (score(answers) for score in scores), strict=True))
    rows = [
        {**answer.row, "answer_written": answer.text, "rewards": {name: found[k] for name, found in columns.items()}}
        for k, answer in enumerate(answers)
    ]
    with storage.open_atomic(storage.join(folder, "rewards.jsonl")) as file:
        file.writelines(orjson.dumps(row) + b"\n" for row in rows)
    about = {"checkpoint": checkpoint, "prompts": config.prompts, "tokenizer": loaded.name}
    summary = {**about, **_summary(answers, columns)}
    storage.write_bytes(storage.join(folder, "rewards.json"), orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    return summary


def _answers(model: Any, prompts: Prompts, tokenizer: Tokenizer, config: RewardScoring) -> list[Answer]:
    """One answer to each prompt, in the order of the file."""
    settings = GenerateConfig(
        max_gen_len=config.answer_tokens, temperature=config.answer_temperature, top_p=1.0, seed=0
    )
    stop_ids = prompts.stop_ids(tokenizer.eot_id)
    rows = prompts.rows()
    written = generate(model, [row["prompt_ids"] for row in rows], settings, stop_ids=stop_ids)
    return [
        Answer(row["prompt_ids"], ids, tokenizer.decode(ids), row, len(ids) < _room(model, row, config))
        for row, ids in zip(rows, written, strict=True)
    ]


def _room(model: Any, row: dict[str, Any], config: RewardScoring) -> int:
    """Tokens that an answer can have, in the context behind its prompt."""
    return min(config.answer_tokens, model.config.seq_len - len(row["prompt_ids"]))


def _summary(answers: Sequence[Answer], columns: dict[str, list[float]]) -> dict[str, Any]:
    n = len(answers)
    return {
        "answers": n,
        "finished_share": sum(answer.finished for answer in answers) / n,
        "answer_tokens": sum(len(answer.tokens) for answer in answers) / n,
        "rewards": {name: _mean(found) for name, found in columns.items()},
    }


def _mean(found: Sequence[float]) -> dict[str, float]:
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return {"mean": statistics.fmean(found), "stderr": error}


def shown(summary: dict[str, Any]) -> str:
    """The summary, a line for each reward."""
    lines = [f"{name}: {one['mean']:.4f} ± {one['stderr']:.4f}" for name, one in summary["rewards"].items()]
    about = (
        f"{summary['answers']:,} answers of {summary['answer_tokens']:.1f} tokens, "
        f"{summary['finished_share']:.1%} ended by themselves"
    )
    return "\n".join([about, *lines])
