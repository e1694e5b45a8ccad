"""`openlm train` (also `torchrun -m open_lm.main`): train a language model on shards, or evaluate a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from open_lm.flags import late_names
from open_lm.params import RunConfig, command_line, parse_args, read_config

if TYPE_CHECKING:
    from open_lm.run.dry_run import Forecast
    from open_lm.run.opened import OpenRun
    from open_lm.run.run import RunResult

__getattr__ = late_names(__name__, "open_lm.compat.model", ("load_model",))


def main(argv: Sequence[str] | None = None) -> RunResult | Forecast:
    """Train, or evaluate a checkpoint, as the flags ask.

    Raises:
        OpenLMError: a flag, a file or the training went wrong; the message says what to do.
    """
    config = read_config(parse_args(argv))
    if config.tracking.dry_run:
        return describe(config)
    return execute(config, command_line(argv))


def describe(config: RunConfig) -> Forecast:
    """Print what the run would do."""
    from open_lm.run.dry_run import forecast

    expected = forecast(config)
    print(expected)
    return expected


def execute(config: RunConfig, command: str) -> RunResult:
    """Run `config`; `command` is the command line to log. Of several checkpoints to evaluate, the last one's
    result is given back."""
    from open_lm.run.build import architecture_of
    from open_lm.run.opened import start_run

    each = each_checkpoint(config)
    with start_run(each[0], architecture_of(each[0]), command) as opened:
        result = carry_out(opened)
        for config in each[1:]:
            result = carry_out(opened.another(config, architecture_of(config)))
    return result


def each_checkpoint(config: RunConfig) -> list[RunConfig]:
    """`config` itself; with --val-checkpoints the evaluation of each of them."""
    from open_lm.checkpoint.resolve import all_checkpoints

    if not config.validation.val_checkpoints:
        return [config]
    paths = all_checkpoints(config.validation.val_checkpoints, "--val-checkpoints")
    return [replace(config, checkpoint=replace(config.checkpoint, pretrained=path)) for path in paths]


def carry_out(opened: OpenRun) -> RunResult:
    """Build what the run works on, train if it is to, and evaluate."""
    from open_lm.checkpoint.provenance import provenance
    from open_lm.checkpoint.restore import restore
    from open_lm.post_training.prompts import Prompts
    from open_lm.run.build import build_loader_and_length, build_state, chat_template_of, tokenizer_name
    from open_lm.run.evaluation_setup import build_tasks, build_validation_sets
    from open_lm.run.rollout_setup import build_rollouts
    from open_lm.run.run import Run
    from open_lm.train.loop import train

    config, architecture, world = opened.config, opened.architecture, opened.world
    loader: Any
    loader, steps = build_loader_and_length(config, architecture, world)
    val_sets = build_validation_sets(config, architecture, world, loader)
    state = build_state(config, architecture, world, steps)
    tasks = build_tasks(config, architecture, state, loader)
    opened.checkpoints.config |= provenance(tokenizer_name(config, loader), loader.state(0) if loader else None)
    opened.checkpoints.config["chat_template"] = chat_template_of(config, loader, world)
    restore(opened.checkpoints, state, loader)
    run = Run(opened, state, loader, val_sets, tasks)
    opened.begin_copying()
    if loader is not None:
        source = loader
        if isinstance(loader, Prompts):
            source = build_rollouts(config, architecture, state, loader, run.folder, run.recorder.log_table)
        batches = source.batches(state.step, steps.last_step)
        with run.stop_requests.while_training():
            train(state, batches, run, accum=config.train.accum_freq, clip=config.optimizer.grad_clip_norm)
    return run.finish(state)


if __name__ == "__main__":
    from open_lm.command import run as run_command

    run_command(main)
