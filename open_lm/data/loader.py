"""Training loader: batch k is a function of the data, the weights, the seed and k, on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from open_lm.data.batch import IGNORED, Batch
from open_lm.data.batch_positions import BatchPositions, make_batch_positions, make_plan
from open_lm.data.cache import ShardCache
from open_lm.data.config import DataConfig
from open_lm.data.masking import batch_of
from open_lm.data.pipeline import Filled, StepSource, run_pipeline
from open_lm.data.plan import ORDER, Plan, key, mix
from open_lm.data.reader import SampleReader, mark_of
from open_lm.data.sources import Source, document_end, open_sources
from open_lm.data.validation import validation_batches
from open_lm.errors import CheckpointError, ConfigError, DataError

__all__ = ["Loader", "build_loader", "validation_batches"]

log = logging.getLogger(__name__)

_READ_AHEAD_STEPS = 16


class Loader:
    """One rank's batches. Close to a function: the only thing it holds is which data there is."""

    def __init__(
        self,
        plan: Plan,
        sources: list[Source],
        fill: Any,
        geometry: BatchPositions,
        *,
        config: DataConfig,
        seed: int,
        n_sequences: int | None,
        rows: int = 1,
    ):
        """`rows` are the sequences that one sample holds; they stay together in batches."""
        self.plan, self.sources, self.geometry = plan, sources, geometry
        self.n_sequences, self._rows = n_sequences, rows
        self.holes: list[dict[str, Any]] = []
        self._fill, self._config, self._seed = fill, config, seed
        self._planned_batch = geometry.global_batch
        self._document_end = document_end(config, sources)

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """This rank's share of the batches of steps `start_step` to `stop_step`, on the CPU, int64.

        Raises:
            DataError: the data ends before `stop_step`, or a sample cannot be read and --ignore-parse-errors is off.
        """
        self.require(stop_step)
        source = StepSource(self.geometry.positions_of, self.plan.reader_of, start_step, stop_step)
        steps = run_pipeline(
            source,
            self._fill,
            n_workers=self._config.workers,
            batch=self.geometry.local_batch,
            ahead=_READ_AHEAD_STEPS if self._config.data_cache else 0,
        )
        for step, (tokens_BS, holes, mark) in enumerate(steps, start_step):
            self._check_mark(mark, step)
            yield self._masked(tokens_BS, holes, step)

    def _check_mark(self, mark: int, step: int) -> None:
        """Compare what the readers say they read with what the plan wants, whoever read it."""
        expected = self._fill.mark(self.geometry.positions_of(step))
        if mark != expected:
            raise DataError(
                f"step {step}: the data workers read other samples than planned (mark {mark:016x}, expected "
                f"{expected:016x}). This is a bug or a broken machine: start again with --resume latest."
            )

    def require(self, n_steps: int) -> None:
        """Check that there is data for `n_steps` steps.

        Raises:
            DataError: there is not; the message has both numbers.
        """
        needed = int(self.geometry.shifted(np.array([self.geometry.consumed(n_steps) - 1]))[0]) + 1
        if self.n_sequences is not None and not self._config.multiple_data_passes and needed > self.n_sequences:
            raise DataError(
                f"too little data: {n_steps} steps of {self.geometry.global_batch} need {needed} sequences, "
                f"{', '.join(source.name for source in self.sources)} gives {self.n_sequences} before it repeats. "
                "Train on fewer tokens, add data, or give --multiple-data-passes."
            )

    def state(self, step: int) -> dict[str, Any]:
        """Where the data stands when `step` optimizer steps are done, and what its order depends on. Plain JSON."""
        consumed = self.geometry.consumed(step)
        counts = self._consumed_by_source(consumed)
        return {
            "version": 1,
            "order": ORDER,
            "seed": self._seed,
            "global_batch": self.geometry.global_batch,
            "planned_batch": self._planned_batch,
            "steps": step,
            "samples_consumed": consumed,
            "resampled": self._config.dataset_resampled,
            "pattern": len(self.plan.pattern),
            "skips": [list(span) for span in self.geometry.skipped],
            "holes": len(self.holes),
            "sources": [
                self._source_state(k, source) | {"consumed": int(counts[k])} for k, source in enumerate(self.sources)
            ],
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a saved `state` continues here. Ranks, workers and the batch may differ: another global batch goes
        on with the next unused sequence, in the order the run began with.

        Raises:
            CheckpointError: the data, the seed or another setting of the order is not the one the run began with.
        """
        planned = self._planned_batch, self.geometry.consumed(int(state.get("steps", 0)))
        if (state.get("planned_batch"), state.get("samples_consumed")) != planned:
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

    def _continue_from(self, state: dict[str, Any]) -> None:
        """Plan as the run that began with another global batch, and go on where it stood."""
        self._planned_batch = int(state.get("planned_batch") or self._planned_batch)
        if isinstance(self._fill, PlannedSamples):
            self.plan = make_plan(self.sources, self._config, seed=self._seed, global_batch=self._planned_batch)
            self._fill = PlannedSamples(self.plan, self._fill.reader)
        self.geometry = replace(
            self.geometry,
            first_step=int(state.get("steps", 0)),
            first_position=int(state.get("samples_consumed", 0)),
            skipped=tuple((first, end) for first, end in state.get("skips", [])),
        )

    def _source_state(self, number: int, source: Source) -> dict[str, Any]:
        stream = self.plan.streams[number]
        return {
            "name": source.name,
            "fingerprint": source.fingerprint,
            "sequences": source.n_sequences,
            "columns": int(self.plan.columns[number]),
            "share": self.plan.shares[number],
            "lanes": getattr(stream, "lanes", 1),
            "window": getattr(stream, "window", 1),
        }

    def _consumed_by_source(self, consumed: int) -> np.ndarray:
        end = int(self.geometry.shifted(np.array([consumed - 1]))[0]) + 1 if consumed else 0
        rows, rest = divmod(end, len(self.plan.pattern))
        return rows * self.plan.columns + np.bincount(self.plan.pattern[:rest], minlength=len(self.plan.streams))

    def _masked(self, tokens_BS: torch.Tensor, holes: list[tuple[int, str]], step: int) -> Batch:
        """The batch; the rows of holes are masked, or end the run."""
        n_rows = self._rows
        batch = batch_of(tokens_BS.view(len(tokens_BS) * n_rows, -1), self._config, self._document_end)
        batch = batch if n_rows == 1 else replace(batch, group=n_rows)
        if not holes:
            return batch
        if not self._config.ignore_parse_errors:
            raise DataError(
                f"{holes[0][1]} Repair the shard, or go on without such samples with --ignore-parse-errors."
            )
        inputs_BT, targets_BT = batch.inputs_BT.clone(), batch.targets_BT.clone()
        for number, reason in holes:
            rows = slice(number * n_rows, (number + 1) * n_rows)
            inputs_BT[rows], targets_BT[rows] = 0, IGNORED
            position = int(self.geometry.positions_of(step)[number])
            self.holes.append({"step": step, "position": position, "reason": reason})
            log.warning("step %d: %s It is masked; %d so far on this rank.", step, reason, len(self.holes))
        return replace(batch, inputs_BT=inputs_BT, targets_BT=targets_BT)


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
) -> Loader:
    """The loader of one rank. `n_steps`, when given, is checked against the data now, not in the middle of the run.

    `form` is that of the samples, which manifests state, and `rows` the sequences of `seq_len` + 1 tokens in each.

    Raises:
        ConfigError: no data was named, they are of another form, or the batch does not divide among the ranks.
        DataError: a shard or manifest is damaged, or there are fewer sequences than `n_steps` need.
    """
    if config.data_tolerate_error_p != 0.09 or config.data_tolerate_num_ckpts:
        log.warning("--data-tolerate-*: ignored, every step gets its whole batch. See --ignore-parse-errors.")
    if config.squash_mask_left:
        seq_len += 1
    sample_tokens = rows * (seq_len + 1)
    geometry = make_batch_positions(config, global_batch=global_batch, rank=rank, world_size=world_size)
    if config.dataset_type == "synthetic":
        random_ids = SyntheticSamples(vocab_size, sample_tokens - 1, seed)
        nowhere = [Source(f"synthetic {vocab_size} {sample_tokens - 1}", ())]
        endless: dict[str, Any] = {"config": config, "seed": seed, "n_sequences": None, "rows": rows}
        return Loader(Plan((random_ids,)), nowhere, random_ids, geometry, **endless)
    if not (config.train_data or config.dataset_manifest):
        raise ConfigError("--train-data or --dataset-manifest: neither was given. Name the training shards.")
    sources = open_sources(config, vocab_size=vocab_size, sample_tokens=sample_tokens)
    require_form(sources, form)
    plan = make_plan(sources, config, seed=seed, global_batch=global_batch)
    if len(sources) > 1:
        shares = ", ".join(f"{source.name} {share:.4f}" for source, share in zip(sources, plan.shares, strict=True))
        log.info("share of each source in every batch: %s", shares)
    n_sequences = None if config.dataset_resampled else plan.length([source.n_sequences for source in sources])
    reader = SampleReader(
        [source.shards for source in sources],
        data_key=config.data_key,
        vocab_size=vocab_size,
        seq_len=sample_tokens - 1,
        seed=seed,
        cache=ShardCache(config.data_cache, config.data_cache_gb * 1e9) if config.data_cache else None,
    )
    options: dict[str, Any] = {"config": config, "seed": seed, "n_sequences": n_sequences, "rows": rows}
    loader = Loader(plan, sources, PlannedSamples(plan, reader), geometry, **options)
    if n_steps is not None:
        loader.require(n_steps)
    return loader


def require_form(sources: list[Source], form: str) -> None:
    """Refuse samples of another form than the task trains on.

    Raises:
        ConfigError: a manifest states another one.
    """
    for shard in (shard for source in sources for shard in source.shards):
        if shard.form != form:
            raise ConfigError(
                f"shard {shard.name} holds {shard.form}, --task needs {form}. Name data made for this task."
            )


@dataclass(frozen=True)
class PlannedSamples:
    """Samples by position: the plan says which, the reader gets them."""

    plan: Plan
    reader: SampleReader

    def __call__(self, positions: np.ndarray) -> Filled:
        found = self.plan.locate(positions)
        return self.reader.read(found.source, found.shard, found.place, positions)

    def mark(self, positions: np.ndarray) -> int:
        """What the reader's mark of these positions must be."""
        source, shard, place = self.plan.locate(positions)
        shards = self.reader.shards
        return mark_of([shards[s][k].url for s, k in zip(source.tolist(), shard.tolist(), strict=True)], place)

    def fetch_ahead(self, positions: np.ndarray) -> None:
        """Have the shards of these positions fetched in the background."""
        found = self.plan.locate(positions)
        self.reader.fetch_ahead(found.source, found.shard)


@dataclass(frozen=True)
class SyntheticSamples:
    """Random ids, a hash of seed and place: for measuring speed and trying settings without data."""

    vocab_size: int
    seq_len: int
    seed: int

    def mark(self, positions: np.ndarray) -> int:
        """The mark of random ids is that of one shard, which nobody reads."""
        return mark_of([""] * len(positions), positions)

    def __call__(self, positions: np.ndarray) -> Filled:
        places = positions[:, None] * (self.seq_len + 1) + np.arange(self.seq_len + 1)
        hashes = mix(places.astype(np.uint64) ^ key("synthetic", self.seed))
        return Filled((hashes % np.uint64(self.vocab_size)).astype(np.int32), [], self.mark(positions))

    def lane_of(self, positions: np.ndarray) -> np.ndarray:
        return positions

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(positions), positions
