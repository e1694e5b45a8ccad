"""Metrics of a run while it trains: the progress line, every sink, results.jsonl."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from open_lm import text
from open_lm.distributed import World
from open_lm.errors import TrainingDiverged
from open_lm.evaluate.validation import ValidationResult
from open_lm.progress import Progress, progress
from open_lm.report.rows import TOKENS, read_rows
from open_lm.run.watchdog import LEEWAY, Watchdog
from open_lm.tracking.devices import peak_flops
from open_lm.tracking.meter import Meter, peak_memory_gib
from open_lm.tracking.sink import Resumed, RewindingSink, Sink, TableSink
from open_lm.train.state import TrainState
from open_lm.train.step import StepReport
from open_lm.train.timing import Timing

MIN_LOSS_SCALE = 1e-4
"""Below it fp16 gradients have overflowed step after step, and no update has been applied for a long time."""


class Recorder:
    """Adds up the reports of steps and writes them out when asked. `sinks` is empty on every rank but 0."""

    def __init__(
        self,
        world: World,
        state: TrainState,
        sinks: Sequence[Sink],
        watchdog: Watchdog,
        *,
        flops_per_token: int,
        peak_tflops: float | None,
    ):
        """`peak_tflops` None: that of the device, if it is a known one."""
        self._world = world
        self._sinks = sinks
        self._watchdog = watchdog
        self._meter = Meter(world, state.run_length.tokens_per_step, flops_per_token, _peak(world, peak_tflops))
        self._bar: Progress | None = None
        self._total_steps = state.run_length.last_step
        if world.is_master and os.isatty(2) and state.step < self._total_steps:
            self._bar = progress(total=self._total_steps, done=state.step, unit="step", delay_seconds=0)

    def add(self, report: StepReport, timing: Timing) -> None:
        """Count one step, without waiting for its figures; `timing` has been running since the last `write`."""
        self._timing = timing
        self._watchdog.beat()
        self._meter.add(report.parts, report.grad_norm.reshape(1).to(report.parts))
        if self._bar is not None:
            self._bar.update()

    def write(self, state: TrainState, lr: float) -> None:
        """Write the means over the steps since the last call; every rank must call this.

        Raises:
            TrainingDiverged: the loss or the gradient norm is not finite; all ranks raise together.
        """
        n_steps = self._meter.n_steps
        if not n_steps:
            return
        times = {f"train/{name}_time": total / n_steps for name, total in self._timing.read().items()}
        (*parts, grad_norm), seconds = self._meter.read()
        loss, scale = parts[0], state.precision.loss_scale
        metrics = {
            **{f"train/{name}": part for name, part in zip(state.task.names, parts, strict=True)},
            "train/grad_norm": grad_norm,
            **({"train/loss_scale": scale} if scale is not None else {}),
            "train/lr": lr,
            TOKENS: state.tokens,
            **self._meter.rates(seconds),
            "train/batch_time": seconds,
            **times,
            "train/peak_memory_gib": peak_memory_gib(self._world.device),
        }
        self.log(state, metrics)
        self._say(state.step, metrics)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)) or (scale is not None and scale < MIN_LOSS_SCALE):
            raise TrainingDiverged(
                f"loss {loss}, gradient norm {grad_norm}, loss scale {scale} in {n_steps} steps up to {state.step}. "
                "The checkpoints written before are good: lower --lr or raise --warmup, and --resume from one."
            )

    def _say(self, step: int, metrics: Mapping[str, float]) -> None:
        mfu = f" | MFU {metrics['train/mfu']:.1%}" if "train/mfu" in metrics else ""
        logging.info(
            "step %d/%d | loss %.4f | lr %.3g | grad norm %.2f | %s tokens/s%s | %s tokens | %.2f GiB | %s left",
            step, self._total_steps, metrics["train/loss"], metrics["train/lr"], metrics["train/grad_norm"],
            text.count(metrics["train/tokens_per_second"]), mfu, text.count(metrics["train/tokens"]),
            metrics["train/peak_memory_gib"], text.duration((self._total_steps - step) * metrics["train/batch_time"]),
        )  # fmt: skip

    def write_validation(self, state: TrainState, results: Sequence[ValidationResult]) -> None:
        """Write the validation losses: `valid/loss` of the first set, `valid/NAME/loss` of each further one."""
        metrics: dict[str, float] = {}
        for index, result in enumerate(results):
            prefix = "valid" if index == 0 else f"valid/{result.name}"
            metrics |= {f"{prefix}/loss": result.loss, f"{prefix}/tokens": result.tokens}
            bits = result.bits_per_byte
            if bits is not None:
                metrics[f"{prefix}/bits_per_byte"] = bits
            logging.info(
                "validation %s | loss %.4f%s | perplexity %.2f%s | %s sequences, %s tokens",
                result.name, result.loss, _interval(result), result.perplexity,
                "" if bits is None else f" | {bits:.4f} bits per byte", text.count(result.sequences),
                text.count(result.tokens),
            )  # fmt: skip
        self.log(state, metrics)

    def write_scores(self, state: TrainState, scores: Mapping[str, float]) -> None:
        """Write the scores on tasks, each as `icl/TASK/METRIC`."""
        logging.info("tasks | %s", " | ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        self.log(state, {f"icl/{name}": value for name, value in scores.items()})

    def rewind(self, state: TrainState, metrics_path: str) -> None:
        """Forget what was written of later tokens, which this run measures again; `metrics_path` holds all of it."""
        if not self._sinks or not os.path.isfile(metrics_path):
            return
        rows = [
            row for row in read_rows(metrics_path, state.tokens_per_step) if row.step and row.tokens <= state.tokens
        ]
        last = max(rows, key=lambda row: row.tokens, default=None)
        before = round(state.tokens * last.step / last.tokens) if last and last.tokens else state.step
        for sink in self._sinks:
            if isinstance(sink, RewindingSink):
                sink.rewind(Resumed(state.step, state.tokens, before))

    def log(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Give `metrics` and the tokens trained on to every sink; one that cannot write does not end the run."""
        for sink in self._sinks:
            try:
                sink.log(state.step, {**metrics, TOKENS: state.tokens})
            except OSError as error:
                logging.warning("%s could not write step %d: %s", type(sink).__name__, state.step, error)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Give rows of text and figures to the sinks that show tables."""
        for sink in self._sinks:
            if isinstance(sink, TableSink):
                sink.log_table(step, name, columns, rows)

    def untimed(self, work: Callable[[], Any]) -> Any:
        """Do `work` (a validation, a save) without counting its time as training."""
        began = time.perf_counter()
        self._watchdog.beat(LEEWAY)
        try:
            return work()
        finally:
            self._watchdog.beat()
            self._meter.skip(time.perf_counter() - began)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()


def close_quietly(sink: Sink) -> None:
    """Close a sink; one that fails to does not hide how the run ended."""
    try:
        sink.close()
    except Exception as error:
        logging.warning("%s did not close: %s", type(sink).__name__, error)


def _peak(world: World, tflops: float | None) -> float | None:
    if tflops is not None:
        return tflops * 1e12
    return peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None


def result_rows(
    results: Sequence[ValidationResult], *, step: int, tokens: int, model: str, checkpoint: str | None
) -> list[dict[str, Any]]:
    """One row per validation set under OpenLM's keys; -1.0 stands for an interval that was not asked for."""
    return [
        {
            "loss": result.loss if math.isfinite(result.loss) else None,
            **_bounds("sequences", result.sequence_interval),
            **_bounds("tokens", result.token_interval),
            "bits_per_byte": result.bits_per_byte,
            "sequences": result.sequences,
            "tokens": result.tokens,
            "bytes": result.bytes,
            "train_tokens": tokens,
            "step": step,
            "name": result.name,
            "val_data": [result.url],
            "model": model,
            "checkpoint_path": checkpoint,
        }
        for result in results
    ]


def _bounds(kind: str, interval: tuple[float, float] | None) -> dict[str, float]:
    low, high = interval if interval and all(map(math.isfinite, interval)) else (-1.0, -1.0)
    return {f"loss_{kind}_lower_95": low, f"loss_{kind}_upper_95": high}


def _interval(result: ValidationResult) -> str:
    """The interval as it stands behind the loss: that over tokens, else that over sequences."""
    interval = result.token_interval or result.sequence_interval
    return f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else ""


def append_json_line(path: str, value: Any) -> None:
    """Add `value` as one line to the file at `path`; I/O errors are logged, not raised."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        logging.warning("%s: a line could not be written: %s", path, error)
