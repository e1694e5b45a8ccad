"""The evaluation command: every checkpoint on every task, each result stored as soon as it exists."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from open_lm import storage
from open_lm.distributed import World, start_world
from open_lm.errors import ConfigError
from open_lm.evaluate.averages import accuracies, gauntlet_averages
from open_lm.evaluate.dclm import read_metadata, write_dclm
from open_lm.evaluate.eval_model import EvalModel, load_eval_model, load_hf_eval_model
from open_lm.evaluate.fingerprint import weights_fingerprint
from open_lm.evaluate.flags import DEFAULT_OUTPUT, ENGINES, EvalConfig
from open_lm.evaluate.records import CheckpointRecords, Results, terminal_table
from open_lm.evaluate.scored import ScoredFolder, ScoredTask, runs_of
from open_lm.evaluate.tasks.suite import Suite, read_suite, require_data
from open_lm.flags import as_flags
from open_lm.model.config import ModelFlags
from open_lm.precision import Precision
from open_lm.progress import progress
from open_lm.train.config import ParallelConfig, mesh_shape


def evaluate(config: EvalConfig, flags: ModelFlags) -> Results:
    """Evaluate what `config` names; rank 0 writes the files after each task, so that none is lost.

    Raises:
        OpenLMError: a flag, a file or a checkpoint is wrong; nothing is written before the first task is done.
    """
    if not config.checkpoint and not flags.hf_model:
        raise ConfigError("--checkpoint is missing: give a run folder, an epoch_K.pt, or --hf-model.")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if config.engine == "lm-eval":
        suite = Suite(tasks=())
    else:
        suite = read_suite(config.eval_yaml or "", only=config.tasks)
        require_data(suite)
    if config.dclm_json:
        read_metadata(config.dclm_metadata)  # a wrong file is refused now, not in the end
    folder = config.output_dir or DEFAULT_OUTPUT
    storage.require_writable(folder, "--output-dir")
    what = (config.tasks, config.task_path, config.limit) if config.engine == "lm-eval" else (suite,)
    data = ENGINES.load(config.engine).read(*what)
    with start_world(config.device, mesh=partial(mesh_shape, ParallelConfig(fsdp=config.fsdp))) as world:
        scored = ScoredFolder(folder, keep=config.resume)
        kept = world.broadcast(_kept(scored) if world.is_master else None)
        results = Results(config.engine, {**as_flags(config), "suite": _settings(suite)})
        began = time.perf_counter()
        torch.manual_seed(suite.seed)
        for path in config.checkpoint or (flags.hf_model,):
            eval_model = _eval_model(path, config, flags, suite, world)
            eval_model.about.weights = weights_fingerprint(eval_model.model)
            runner = ENGINES.load(config.engine)(
                eval_model, *what, world, _max_seq_len(config, suite, eval_model), _precision(config, suite, world),
                batch_tokens=config.batch_tokens, data=data,
            )  # fmt: skip
            _evaluate_one(runner, eval_model.about, suite, world, kept, results, scored)
            del eval_model, runner  # two models at once may not fit
        results.seconds = time.perf_counter() - began
        if world.is_master:
            results.write(folder)
            _show(results, scored)
            if config.dclm_json:
                write_dclm(results.runs, suite.path or config.engine, folder, config.dclm_metadata)
    return results


def _kept(scored: ScoredFolder) -> dict[tuple[str, str, str], ScoredTask]:
    """The tasks of earlier evaluations that may be kept, by what was asked."""
    if scored.keep:
        return {task.asked: task for task in scored.read()}
    if storage.exists(path := storage.join(scored.folder, "results.json")):
        logging.warning("%s is replaced; --resume would keep its finished tasks.", path)
    return {}


def _eval_model(path: str | None, config: EvalConfig, flags: ModelFlags, suite: Suite, world: World) -> EvalModel:
    precision = _precision(config, suite, world)
    dtype = Precision(precision, world.device.type).weight_dtype if precision == "bf16" else torch.float32
    shared_by = world if config.fsdp and world.size > 1 else None
    if not config.checkpoint:
        return load_hf_eval_model(flags, config.tokenizer, world.device, dtype, shared_by)
    assert path is not None
    architecture = {name: value for name, value in vars(flags).items() if value != getattr(ModelFlags(), name)}
    return load_eval_model(path, config.tokenizer, architecture, world.device, dtype, shared_by)


def _evaluate_one(
    runner: Any,
    about: CheckpointRecords,
    suite: Suite,
    world: World,
    kept: Mapping[tuple[str, str, str], ScoredTask],
    results: Results,
    scored: ScoredFolder,
) -> None:
    """Run what is not kept for one checkpoint; after each task the folder holds it."""
    total = sum(runner.n_questions(key) for key in runner.keys)
    with progress(total=total, unit="question", shown=world.is_master, delay_seconds=0) as bar:
        for key in runner.keys:
            bar.set_description(f"{about.name}: {key}")
            before, identity = bar.n, runner.identity(key)
            if known := kept.get((about.weights, key, identity)):
                scored.reuse(replace(known, about=about))
            else:
                task = ScoredTask(key, identity, about, tuple(runner.run(key, bar.update)))
                scored.add(task) if world.is_master else scored.reuse(task)
            bar.update(before + runner.n_questions(key) - bar.n)  # the other ranks' share
            if world.is_master:
                _write(results, scored, suite)
    if not world.is_master:
        results.runs = runs_of(scored.session)


def _write(results: Results, scored: ScoredFolder, suite: Suite) -> None:
    """The files that show what the folder holds."""
    results.runs = scored.runs()
    for run in results.runs if suite.gauntlet is not None else ():
        run.averages = gauntlet_averages(suite.gauntlet or {}, accuracies(run.records))
    results.write(scored.folder)


def _max_seq_len(config: EvalConfig, suite: Suite, eval_model: EvalModel) -> int:
    """The longest prompt: as asked, at most the model's context."""
    asked = config.max_seq_len or suite.max_seq_len or eval_model.seq_len
    if asked > eval_model.seq_len:
        logging.warning(
            "max_seq_len %d is above the context of %s: prompts are cut to %d tokens.",
            asked, eval_model.about.name, eval_model.seq_len,
        )  # fmt: skip
    return min(asked, eval_model.seq_len)


def _precision(config: EvalConfig, suite: Suite, world: World) -> str:
    """The number format: --eval-precision, or the YAML's; a YAML made for GPUs is computed in fp32 on a CPU."""
    if config.eval_precision:
        return config.eval_precision
    return suite.precision if world.device.type == "cuda" else "fp32"


def _settings(suite: Suite) -> dict[str, Any]:
    tasks = [{k: v for k, v in vars(task).items() if v not in (None, "", ())} for task in suite.tasks]
    return {**vars(suite), "tasks": tasks}


def _show(results: Results, scored: ScoredFolder) -> None:
    asked = {task.about.weights for task in scored.session}
    for run in (run for run in results.runs if run.weights in asked):
        trained = f", {run.tokens:,} tokens" if run.tokens else ""
        print(f"\n{run.name} ({run.model}{trained})")
        print(terminal_table(run.records))
        for name, value in run.averages.items():
            print(f"{name}: {value:.4f}")
        if truncated := sum({record.key: record.truncated or 0 for record in run.records}.values()):
            print(f"{truncated} prompts were longer than the context and lost their start.")
    print(f"\nwritten: {storage.join(scored.folder, 'results.json')}, results.csv, results.md", flush=True)
