"""A run at work: what is due after each step."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass

from open_lm.checkpoint.manager import DataOrder
from open_lm.checkpoint.save_policy import SaveClock, SaveKind, SaveSteps
from open_lm.data.batch import Batch
from open_lm.errors import Preempted, StorageError, everywhere
from open_lm.evaluate.in_loop import InLoopEvaluator
from open_lm.evaluate.validation import ValidationResult, ValidationSet
from open_lm.model.describe import model_size
from open_lm.run.claims import Agreement, Claims
from open_lm.run.evaluations import Evaluations
from open_lm.run.opened import OpenRun
from open_lm.run.recorder import Recorder, append_json_line
from open_lm.train.state import TrainState
from open_lm.train.step import StepReport, average_losses
from open_lm.train.timing import Timing


@dataclass(frozen=True)
class RunResult:
    """The result of a run: its folder, the steps taken, the last validation losses and scores on tasks."""

    folder: str
    step: int
    validation: tuple[ValidationResult, ...]
    scores: dict[str, float]


class Run:
    """One run on one rank, built on what `start_run` opened. The loop calls it after every step, and it decides what is
    due."""

    def __init__(
        self,
        opened: OpenRun,
        state: TrainState,
        loader: DataOrder | None,
        val_sets: list[ValidationSet],
        tasks: InLoopEvaluator | None = None,
    ):
        """`state` is restored already; without a `loader` the run only evaluates."""
        self.config, self.architecture, self.world = opened.config, opened.architecture, opened.world
        self.folder, self.checkpoints, self.stop_requests = opened.folder, opened.checkpoints, opened.stop_requests
        self._observer, self._loader = opened.observer, loader
        self.recorder = Recorder(
            self.world,
            state,
            opened.sinks,
            opened.watchdog,
            flops_per_token=model_size(self.architecture).flops_per_token,
            peak_tflops=self.config.tracking.peak_tflops,
        )
        opened.closing.callback(self.recorder.close)
        results = os.path.join(self.checkpoints.folder, "results.jsonl")
        self.evaluations = Evaluations(self.config, self.world, results, self.recorder, val_sets, tasks)
        self._saved_at: int | None = state.step
        self._due: tuple[int, SaveKind | None] = (-1, None)
        self._late: SaveKind | None = None
        """A save that was due inside an iteration of reinforcement learning."""
        self._save_clock = SaveClock(self.config.checkpoint.save_every_minutes)
        self._agreement = Agreement(self.world)
        if loader is not None:
            self._before_training(state)

    def _before_training(self, state: TrainState) -> None:
        """Work before the first step: evaluations and a checkpoint of step 0; a resumed run drops later figures."""
        self.recorder.rewind(state, os.path.join(self.folder, "metrics.jsonl"))
        self._save_clock.restart()
        if state.step == 0:
            self.evaluations.before_training(state)
            if 0 in self.config.checkpoint.fixed_steps:
                self._save(state, "fixed")
        if state.step >= state.run_length.last_step:
            logging.info("step %d of %d: nothing left to train", state.step, state.run_length.last_step)

    def claims(self) -> Claims:
        """This rank's requests as the next step begins."""
        self._agreement.step_begins()
        return Claims(self._why_stop() is not None, self.world.is_master and self._save_clock.is_up())

    def _why_stop(self) -> str | None:
        """A signal, or a time limit that leaves just twice the time of a save, and that until all ranks know."""
        return self.stop_requests.asked(2 * self.checkpoints.seconds + 1 + self._agreement.delay_seconds)

    def observe(self, state: TrainState) -> contextlib.AbstractContextManager[None]:
        """Around the step that comes next: the profile and the traces that were asked for."""
        return self._observer(state.model, state.step + 1)

    def record(self, report: StepReport, state: TrainState, timing: Timing) -> None:
        """Count one step; write the figures every --log-every-n-steps, before each save, and at the end."""
        self._agreement.read(report.claims)
        self.recorder.add(report, timing)
        if not report.taken:
            self._note_skipped(report, state)
        every = self.config.tracking.log_every_n_steps
        if state.step % every == 0 or state.step == state.run_length.last_step or self._save_due(state):
            self.recorder.write(state, report.lr)

    def _note_skipped(self, report: StepReport, state: TrainState) -> None:
        loss, norm = self.world.sum(report.loss).item(), report.grad_norm.item()
        logging.warning("step %d skipped: outlier loss %.4f or gradient norm %.3g.", state.step, loss, norm)
        if self.world.is_master:
            line = {"step": state.step, "loss": loss, "grad_norm": norm}
            append_json_line(os.path.join(self.folder, "skipped_steps.jsonl"), line)

    def score_averages_if_due(self, state: TrainState, batch: Batch) -> None:
        """Every --log-avg-model-training-loss steps: the loss of each average on the batch just trained on."""
        every = self.config.optimizer.log_avg_model_training_loss
        if every and state.step % every == 0:
            losses = self.recorder.untimed(lambda: average_losses(state, batch, accum=self.config.train.accum_freq))
            self.recorder.log(state, {f"train/{name}_loss": loss for name, loss in losses.items()})

    def validate_if_due(self, state: TrainState) -> None:
        """Measure validation loss and scores at ends of intervals, or every --val-every-steps, --icl-every-steps."""
        self.evaluations.if_due(state)

    def save_if_due(self, state: TrainState) -> None:
        """Write a checkpoint where the flags --save-* and --ephemeral-every-steps ask for one."""
        kind = self._save_due(state)
        if kind is not None:
            self._save(state, kind)

    def _save_due(self, state: TrainState) -> SaveKind | None:
        """The kind of checkpoint due after this step; the same on every rank and at every call."""
        if self._due[0] != state.step:
            agreed = self._agreement.on(Claims(save=self._save_clock.is_up()))
            kind = self._save_steps(state).kind_at(state.step, time_is_up=agreed.save)
            if not self._can_stop(state):  # saved at the end of the iteration
                self._late, kind = self._late or kind, None
            else:
                kind, self._late = kind or self._late, None
            self._due = state.step, kind
        return self._due[1]

    def _can_stop(self, state: TrainState) -> bool:
        """Whether a checkpoint after this step can be continued from: not between the steps on one set of rollouts."""
        return state.step % getattr(self._loader, "steps_per_iteration", 1) == 0

    def _save_steps(self, state: TrainState) -> SaveSteps:
        return SaveSteps(self.config.checkpoint, state.run_length.interval_ends, state.run_length.last_step)

    def _save(self, state: TrainState, kind: SaveKind, *, wait: bool = False) -> bool:
        loader, is_last = self._loader, state.step == state.run_length.last_step
        assert loader is not None
        stats = {
            "is_final_checkpoint": state.step == state.run_length.total_steps,
            "evaluation_metrics": self.evaluations.rows(state),
            "samples_seen": state.tokens // self.architecture.seq_len,
            "percentage_of_data_seen": state.step / state.run_length.total_steps,
            "shard_shuffle_seed": self.config.train.seed,
            "train_data_string": " ".join((*self.config.data.train_data, *self.config.data.dataset_manifest)),
            "next_shard_per_source": None,
        }
        label = self._save_steps(state).label(state.step)
        wait = wait or is_last
        saved = self.recorder.untimed(
            lambda: self.checkpoints.save(state, loader, label=label, stats=stats, kind=kind, wait=wait)
        )
        if is_last and not saved:
            why = f"checkpoint {label} was not written: {self.checkpoints.problem} Then --resume latest."
            raise everywhere(StorageError(why))
        self._save_clock.restart()
        self._agreement.forget_save()
        self._saved_at = state.step if saved else self._saved_at
        return saved

    def stop_if_asked(self, state: TrainState) -> None:
        """After a stop signal on any rank, or when a time limit leaves just twice the time of a save: save and leave.

        Raises:
            Preempted: the run stopped; the checkpoint just written holds everything.
            StorageError: it stopped and could not be saved.
            TrainingDiverged: it stopped, and what it would have saved is not finite.
        """
        if not self._can_stop(state):
            return
        self.checkpoints.wait_if_done()
        asked = self._why_stop()
        agreed = self._agreement.on(Claims(stop=asked is not None))
        if not agreed.stop or state.step == state.run_length.last_step:
            return
        self.recorder.write(state, state.lr_at(state.step - 1))
        reason = next((why for why in self.world.gather(asked) if why), "a time limit")
        is_saved = self._saved_at == state.step and self.recorder.untimed(self.checkpoints.wait)
        if not is_saved and not self._save(state, self._save_due(state) or "ephemeral", wait=True):
            why = f"stopped by {reason} after step {state.step}; not saved, see the log. Earlier ones are good."
            raise everywhere(StorageError(why))
        raise Preempted(f"stopped by {reason} after step {state.step}, saved. Continue with --resume latest.")

    def finish(self, state: TrainState) -> RunResult:
        """The last validation and scores, where there is anything to evaluate on, and what the run came to.

        Raises:
            Preempted: a signal came meanwhile, so that some of it is left out; the checkpoints are complete.
        """
        for evaluate in (self.evaluations.validate, self.evaluations.score):
            if not self.evaluations.are_done(state) and self.world.any(self.stop_requests.received is not None):
                raise Preempted("stopped by a signal before the last evaluation. Continue with --resume latest.")
            evaluate(state)
        logging.info("done: %s", self.folder)
        return RunResult(self.folder, state.step, self.evaluations.results, self.evaluations.scores)
