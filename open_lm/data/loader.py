"""The loader: batch k is a function of the data, the weights, the seed and k, whoever reads it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from open_lm.data.batch import IGNORED, Batch
from open_lm.data.columns import Column
from open_lm.data.config import DataConfig
from open_lm.data.masking import batch_of
from open_lm.data.mixture import BatchPositions, Plan, make_batch_positions, make_plan
from open_lm.data.pipeline import StepRows, StepSource, run_pipeline
from open_lm.data.plan import ORDER
from open_lm.data.reader import PlannedSamples, SampleReader, SyntheticSamples
from open_lm.data.rows import changed_row
from open_lm.data.shard_files import open_files
from open_lm.data.shards import OUTSIDE
from open_lm.data.sources import Source, document_end, named_tokenizer, open_sources
from open_lm.data.validation import validation_batches
from open_lm.errors import CheckpointError, ConfigError, DataError

__all__ = ["Loader", "build_loader", "validation_batches"]

log = logging.getLogger(__name__)

_READ_AHEAD_STEPS = 16
_TOGETHER_BYTES = 4 << 20
_MOST_TOGETHER = 16
_FEWEST_SAMPLES = 64
"""So many unreadable samples at the start, and none that can be read, are no accident."""


class Loader:
    """One rank's batches. Nearly stateless: batch k is a function of k."""

    def __init__(
        self,
        plan: Plan,
        sources: list[Source],
        fill: Any,
        batch_positions: BatchPositions,
        *,
        config: DataConfig,
        seed: int,
        document_end: int | None = None,
        rows: int = 1,
    ):
        """`document_end` is the id after which attention restarts, None where it does not; `rows` are the sequences of
        one sample, which stay together in batches."""
        self.plan, self.sources, self.batch_positions = plan, sources, batch_positions
        self.n_sequences, self._rows = plan.n_sequences, rows
        self.unreadable: list[dict[str, Any]] = []
        self.columns: dict[str, Column] = {}
        """Numbers beside the samples, which become `extras` of the batches under these names."""
        self._fill, self._config, self._seed = fill, config, seed
        self._planned_batch = batch_positions.global_batch
        self._document_end = document_end

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """This rank's share of the batches of steps `start_step` to `stop_step`, on the CPU, int64.

        Raises:
            DataError: the data ends before `stop_step`, or a sample cannot be read and --ignore-parse-errors is off.
        """
        self.require(stop_step)
        source = StepSource(self.batch_positions.positions_of, self.plan.reader_of, start_step, stop_step)
        steps = run_pipeline(
            source,
            self._fill,
            n_workers=self._config.workers,
            batch=self.batch_positions.local_batch,
            ahead=_READ_AHEAD_STEPS if self._fill.reads_remote else 0,
            together=self._steps_together(),
        )
        for step, rows in enumerate(steps, start_step):
            self._check(rows, step)
            batch = self._masked(rows, step)
            n_samples = (step + 1 - start_step) * self.batch_positions.local_batch
            self._require_some(n_samples, at_end=step + 1 == stop_step)
            yield batch if self._rows == 1 else self._with_columns(batch, step).trimmed()

    def _steps_together(self) -> int:
        """Number of steps that a worker sends at a time, large enough to hide the cost of sending."""
        if self._fill.reads_remote:
            return 1
        part_bytes = 2 * self._fill.sample_tokens * self.batch_positions.local_batch // max(1, self._config.workers)
        return max(1, min(_MOST_TOGETHER, _TOGETHER_BYTES // max(1, part_bytes)))

    def _check(self, rows: StepRows, step: int) -> None:
        """Compare what was read with what the plan wants, and ids with the checksums of their writer."""
        expected = self._fill.expected_checksum(self.batch_positions.positions_of(step))
        if rows.read_checksum != expected:
            raise DataError(
                f"step {step}: the data workers read other samples than planned (checksum {rows.read_checksum:016x}, "
                f"expected {expected:016x}). This is a bug or a broken machine: start again with --resume latest."
            )
        changed = changed_row(rows.tokens.numpy(), rows.stored, rows.widths, step)
        if changed is not None:
            position = self.batch_positions.positions_of(step)[changed : changed + 1]
            raise DataError(
                f"step {step}: {self._fill.describe(position)}: its ids are not those that were written (checksum). "
                "Copy the shard again; if it is whole, this is a broken machine."
            )

    def require(self, n_steps: int) -> None:
        """Check that there is data for `n_steps` steps.

        Raises:
            DataError: there is not; the message has both numbers.
        """
        needed = int(self.batch_positions.shifted(np.array([self.batch_positions.consumed(n_steps) - 1]))[0]) + 1
        if self.n_sequences is not None and not self._config.multiple_data_passes and needed > self.n_sequences:
            raise DataError(
                f"too little data: {n_steps} steps of {self.batch_positions.global_batch} need {needed} sequences, "
                f"{', '.join(source.name for source in self.sources)} gives {self.n_sequences} before it repeats. "
                "Train on fewer tokens, add data, or give --multiple-data-passes."
            )

    def state(self, step: int) -> dict[str, Any]:
        """Position in the data after `step` optimizer steps, and the settings that fix its order. Plain JSON."""
        consumed = self.batch_positions.consumed(step)
        counts = self._consumed_by_source(consumed)
        return {
            "version": 1,
            "order": ORDER,
            "seed": self._seed,
            "global_batch": self.batch_positions.global_batch,
            "planned_batch": self._planned_batch,
            "steps": step,
            "samples_consumed": consumed,
            "resampled": self._config.dataset_resampled,
            "pattern": self.plan.mixture.period,
            "skips": [list(span) for span in self.batch_positions.skipped],
            "holes": len(self.unreadable),
            "sources": [
                self._source_state(k, source) | {"consumed": int(counts[k])} for k, source in enumerate(self.sources)
            ],
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a saved `state` continues here. Ranks, workers and the batch may differ: another global batch goes
        on with the next unused sequence. The order is that the run began with, also where today's choice is another.

        Raises:
            CheckpointError: the data, the seed or another setting of the order is not the one the run began with.
        """
        if self._order(state) != self._order(self.state(int(state.get("steps", 0)))):
            self._continue_from(state)
        here = self.state(int(state.get("steps", 0)))
        for name in ("version", "order", "seed", "samples_consumed", "resampled", "pattern"):
            if state.get(name) != here[name]:
                raise CheckpointError(_differs(name, state.get(name), here[name]))
        saved, mine = state.get("sources", []), here["sources"]
        if len(saved) != len(mine):
            raise CheckpointError(_differs("number of sources", len(saved), len(mine)))
        for before, now in zip(saved, mine, strict=True):
            for name in ("fingerprint", "sequences", "columns", "lanes", "window", "consumed"):
                if before.get(name) != now[name]:
                    raise CheckpointError(_differs(f"{name} of source {now['name']}", before.get(name), now[name]))
            contents = before.get("content"), now["content"]
            if None not in contents and contents[0] != contents[1]:
                what = f"content of source {now['name']} (bytes or checksums of its shards)"
                raise CheckpointError(_differs(what, *contents))

    def _order(self, state: dict[str, Any]) -> tuple[Any, ...]:
        """The settings of a state's order that this loader can take over."""
        shapes = [(source.get("lanes"), source.get("window")) for source in state.get("sources", [])]
        return state.get("planned_batch"), state.get("samples_consumed"), state.get("pattern"), shapes

    def _continue_from(self, state: dict[str, Any]) -> None:
        """Plan as the run that began with other settings of the order, and go on where it stood."""
        self._planned_batch = int(state.get("planned_batch") or self._planned_batch)
        shapes = [(source.get("lanes"), source.get("window")) for source in state.get("sources", [])]
        chosen = self._config.shuffle_lanes or self._config.shuffle_window or self._config.disable_buffer
        if isinstance(self._fill, PlannedSamples):
            self.plan = make_plan(
                self.sources,
                self._config,
                seed=self._seed,
                global_batch=self._planned_batch,
                shapes=shapes if len(shapes) == len(self.sources) and not chosen else None,
                period=state.get("pattern"),
            )
            self._fill = PlannedSamples(self.plan, self._fill.reader)
        self.batch_positions = replace(
            self.batch_positions,
            first_step=int(state.get("steps", 0)),
            first_position=int(state.get("samples_consumed", 0)),
            skipped=tuple((first, end) for first, end in state.get("skips", [])),
        )

    def _source_state(self, number: int, source: Source) -> dict[str, Any]:
        stream = self.plan.streams[number]
        mixture = self.plan.mixture
        return {
            "name": source.name,
            "fingerprint": source.fingerprint,
            "content": source.content_fingerprint,
            "sequences": source.n_sequences,
            "columns": int(mixture.used(mixture.period)[number]),
            "share": float(mixture.shares[number]),
            "lanes": getattr(stream, "stripes", 1),
            "window": getattr(stream, "shuffle_block", 1),
        }

    def _consumed_by_source(self, consumed: int) -> np.ndarray:
        end = int(self.batch_positions.shifted(np.array([consumed - 1]))[0]) + 1 if consumed else 0
        return self.plan.mixture.used(end)

    def _with_columns(self, batch: Batch, step: int) -> Batch:
        """The batch with the numbers that stand beside its samples."""
        if not self.columns:
            return batch
        found = self.plan.locate(self.batch_positions.positions_of(step))
        extras = {name: torch.from_numpy(column.rows(found, self._rows)) for name, column in self.columns.items()}
        return replace(batch, extras={**batch.extras, **extras})

    def _masked(self, read: StepRows, step: int) -> Batch:
        """The batch; the rows of unreadable samples are masked, or end the run."""
        n_rows, unreadable = self._rows, read.unreadable
        samples_BS = read.tokens.view(len(read.tokens) * n_rows, -1)
        batch = batch_of(samples_BS, self._config, self._document_end, plain=read.is_plain)
        batch = batch if n_rows == 1 else replace(batch, group=n_rows)
        if not unreadable:
            return batch
        if not self._config.ignore_parse_errors:
            raise DataError(f"{unreadable[0][1]} {self._advice(unreadable[0][1])}")
        inputs_BT, targets_BT = batch.inputs_BT.clone(), batch.targets_BT.clone()
        for number, reason in unreadable:
            rows = slice(number * n_rows, (number + 1) * n_rows)
            inputs_BT[rows], targets_BT[rows] = 0, IGNORED
            position = int(self.batch_positions.positions_of(step)[number])
            self.unreadable.append({"step": step, "position": position, "reason": reason})
            log.warning("step %d: %s It is masked; %d so far on this rank.", step, reason, len(self.unreadable))
        return replace(batch, inputs_BT=inputs_BT, targets_BT=targets_BT)

    def _advice(self, reason: str) -> str:
        """Advice for a sample that cannot be read for `reason`."""
        if OUTSIDE not in reason:
            return "Repair the shard, or go on without such samples with --ignore-parse-errors."
        name = named_tokenizer(self.sources)
        return (
            f"The data were made with {f'the tokenizer {name}' if name else 'another tokenizer'}, which has more "
            "tokens than the model: give a --model with its vocab_size, or prepare the data with the model's tokenizer."
        )

    def _require_some(self, n_samples: int, *, at_end: bool) -> None:
        """Refuse data of which nothing can be read, however much --ignore-parse-errors lets pass.

        Raises:
            DataError: each of the first samples of this rank, `n_samples` by now, is unreadable.
        """
        if 0 < n_samples == len(self.unreadable) and (at_end or n_samples >= _FEWEST_SAMPLES):
            reason = self.unreadable[0]["reason"]
            raise DataError(f"none of {n_samples} samples can be read; the first: {reason} {self._advice(reason)}")


def _differs(what: str, before: object, now: object) -> str:
    return (
        f"the checkpoint's data differs: {what} was {before!r}, is now {now!r}. "
        "Give the data, weights, seed and batch the run began with."
    )


def build_loader(
    config: DataConfig,
    *,
    vocab_size: int,
    seq_len: int,
    global_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    n_steps: int | None = None,
    form: str = "samples",
    rows: int = 1,
    on_rank0: Callable[[Callable[[], list[Source]]], list[Source]] = lambda work: work(),
) -> Loader:
    """The loader of one rank. `n_steps`, when given, is checked against the data now, not in the middle of the run.

    `form` is that of the samples, which manifests state, and `rows` the sequences of `seq_len` + 1 tokens in each.
    `on_rank0` runs its argument on one rank and gives the outcome to all: shards are looked at once.

    Raises:
        ConfigError: no data was named, they are of another form, or the batch does not divide among the ranks.
        DataError: a shard or manifest is damaged, or there are fewer sequences than `n_steps` need.
    """
    if config.data_tolerate_error_p != 0.09 or config.data_tolerate_num_ckpts:
        log.warning("--data-tolerate-*: ignored, every step gets its whole batch. See --ignore-parse-errors.")
    sample_tokens = rows * (seq_len + 1)
    if global_batch % world_size:
        raise ConfigError(
            f"--global-batch-size {global_batch} does not divide among {world_size} ranks. "
            "Choose a multiple of the number of processes."
        )
    place = {"global_batch": global_batch, "rank": rank, "world_size": world_size}
    options: dict[str, Any] = {"config": config, "seed": seed, "rows": rows}
    if config.dataset_type == "synthetic":
        random_ids = SyntheticSamples(vocab_size, sample_tokens - 1, seed)
        nowhere = [Source(f"synthetic {vocab_size} {sample_tokens - 1}", ())]
        options["document_end"] = document_end(config, nowhere)
        return Loader(Plan((random_ids,)), nowhere, random_ids, make_batch_positions(config, **place), **options)
    opening = {"vocab_size": vocab_size, "sample_tokens": sample_tokens, "world_size": world_size}
    sources = on_rank0(lambda: open_sources(config, **opening, form=form))
    options["document_end"] = document_end(config, sources)
    batch_positions = make_batch_positions(config, **place)
    plan = make_plan(sources, config, seed=seed, global_batch=global_batch)
    if len(sources) > 1:
        shares = zip(sources, plan.mixture.shares.tolist(), strict=True)
        log.info("share of each source: %s", ", ".join(f"{source.name} {share:.4f}" for source, share in shares))
    reader = SampleReader(
        [source.shards for source in sources],
        files=open_files(sources, config, world_size),
        data_key=config.data_key,
        vocab_size=vocab_size,
        sample_tokens=sample_tokens,
        seed=seed,
    )
    loader = Loader(plan, sources, PlannedSamples(plan, reader), batch_positions, **options)
    if n_steps is not None:
        loader.require(n_steps)
    return loader
