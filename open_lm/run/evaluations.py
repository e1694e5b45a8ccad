"""Evaluations of a run while it trains and at its end: validation losses and task scores."""

from __future__ import annotations

import math
from typing import Any

from open_lm import faults
from open_lm.distributed import World
from open_lm.errors import TrainingDiverged
from open_lm.evaluate.bootstrap import Bootstrap
from open_lm.evaluate.in_loop import InLoopEvaluator
from open_lm.evaluate.validation import ValidationResult, ValidationSet, evaluate
from open_lm.flags import parse_steps
from open_lm.params import RunConfig
from open_lm.run.recorder import Recorder, append_json_line, result_rows
from open_lm.train.state import TrainState


class Evaluations:
    """Decides when to evaluate, and keeps the last results. Rank 0 adds a line to `results_path` each time."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        results_path: str,
        recorder: Recorder,
        val_sets: list[ValidationSet],
        tasks: InLoopEvaluator | None,
    ):
        self.recorder = recorder
        self.results: tuple[ValidationResult, ...] = ()
        self.scores: dict[str, float] = {}
        self._config = config
        self._world = world
        self._results_path = results_path
        self._val_sets = val_sets
        self._tasks = tasks
        self._bootstrap = bootstrap_of(config)
        self._at_steps = parse_steps(config.validation.eval_at_steps, "--eval-at-steps", least=0)
        self._validated_at: int | None = None
        self._scored_at: int | None = None

    def if_due(self, state: TrainState) -> None:
        """Measure validation loss and scores at ends of intervals, or every --val-every-steps, --icl-every-steps."""
        flags, named = self._config.validation, state.step in self._at_steps
        if named or evaluation_due(state, flags.val_frequency, flags.val_every_steps):
            self.validate(state)
        if named or evaluation_due(state, flags.icl_frequency, flags.icl_every_steps):
            self.score(state)

    def before_training(self, state: TrainState) -> None:
        """Measure the model as it begins, where --eval-at-steps names step 0."""
        if 0 in self._at_steps:
            self.validate(state)
            self.score(state)

    def are_done(self, state: TrainState) -> bool:
        """Whether this step has been measured and scored, as far as there is anything to evaluate on."""
        validated = not self._val_sets or self._validated_at == state.step
        return validated and (self._tasks is None or self._scored_at == state.step)

    def validate(self, state: TrainState) -> None:
        """Measure and record the validation loss, unless this step has been measured."""
        if not self._val_sets or self._validated_at == state.step:
            return
        faults.at("validation", state.step)
        results = self.recorder.untimed(
            lambda: evaluate(state.model, self._val_sets, self._world, state.precision, self._bootstrap)
        )
        self.results, self._validated_at = tuple(results), state.step
        self.recorder.write_validation(state, results)
        if self._world.is_master:
            append_json_line(self._results_path, self.rows(state))
        for result in results:
            if not math.isfinite(result.loss):
                raise TrainingDiverged(
                    f"the validation loss on {result.name} is {result.loss}: the weights are not usable."
                )

    def score(self, state: TrainState) -> None:
        """Score the model on --icl-tasks and record it, unless that was done at this step."""
        if self._tasks is None or self._scored_at == state.step:
            return
        self.scores, self._scored_at = self.recorder.untimed(self._tasks.score), state.step
        self.recorder.write_scores(state, self.scores)

    def rows(self, state: TrainState) -> list[dict[str, Any]]:
        """The last validation losses as results.jsonl and checkpoints keep them."""
        path = " ".join(self._config.checkpoint.start) or self._config.checkpoint.resume
        name = self._config.model.model or ""
        return result_rows(self.results, step=state.step, tokens=state.tokens, model=name, checkpoint=path)


def bootstrap_of(config: RunConfig) -> Bootstrap | None:
    """The intervals of validation losses that are asked for, if any."""
    flags = config.validation
    if not (flags.val_seq_ci or flags.val_tok_ci):
        return None
    return Bootstrap(
        flags.val_seq_ci, flags.val_tok_ci, flags.val_iter_ci, flags.val_max_pop_ci, seed=config.train.seed
    )


def evaluation_due(state: TrainState, every_intervals: int, every_steps: int | None) -> bool:
    """Whether to evaluate after this step: every so many steps and at the end, or else every so many intervals."""
    steps = state.run_length
    if every_steps:
        return state.step % every_steps == 0 or state.step == steps.last_step
    ends = state.step in steps.interval_ends and every_intervals > 0
    return ends and steps.intervals_done(state.step) % every_intervals == 0
