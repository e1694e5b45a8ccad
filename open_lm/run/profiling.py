"""Profiles and traces of selected steps."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Trace = dict[str, Tensor]
"""The tensors of one step in the order they were computed, by `MICRO_BATCH MODULE input|output K`."""


class Observer:
    """Profiles or traces selected steps; files are written into `folder`.

    `profile_steps` become one chrome trace (chrome://tracing, or ui.perfetto.dev), `trace_steps` a file each with the
    inputs and outputs of every module in the forward pass. Steps are counted as in the log, from 1.
    """

    def __init__(self, folder: str, rank: int, *, profile_steps: frozenset[int], trace_steps: frozenset[int]):
        self._folder, self._rank = folder, rank
        self._profile_steps, self._trace_steps = profile_steps, trace_steps
        self._profiler: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def __call__(self, model: nn.Module, step: int) -> Iterator[None]:
        """Around the step numbered `step`."""
        if step in self._profile_steps and self._profiler is None:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        if step in self._trace_steps:
            with traced(model) as trace:
                yield
            self._write(trace, os.path.join("traces", f"step{step}-rank{self._rank}.pt"))
        else:
            yield
        if self._profiler is not None and step + 1 not in self._profile_steps:
            self._end_profile(step)

    def _end_profile(self, step: int) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        path = self._path(os.path.join("profile", f"step{step}-rank{self._rank}.json.gz"))
        self._profiler.export_chrome_trace(path)
        logging.info("profile up to step %d: %s", step, path)
        self._profiler = None

    def _write(self, trace: Trace, name: str) -> None:
        path = self._path(name)
        torch.save(trace, path)
        logging.info("traced %d tensors: %s", len(trace), path)

    def _path(self, name: str) -> str:
        path = os.path.join(self._folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path


@contextlib.contextmanager
def traced(model: nn.Module) -> Iterator[Trace]:
    """Collect the inputs and outputs of every module of `model`, copied to the CPU, while the block runs.

    Blocks that are computed again in the backward pass are not collected twice.
    """
    root = model.module if isinstance(model, DistributedDataParallel) else model
    trace: Trace = {}
    forwards = {"begun": 0, "open": 0}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
            if module is root:
                forwards["begun"] += 1
                forwards["open"] = 1
            note(f"{forwards['begun']} {name} input", (args, kwargs))

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
            note(f"{forwards['begun']} {name} output", output)
            if module is root:
                forwards["open"] = 0

        return hook

    def note(place: str, values: Any) -> None:
        if forwards["open"]:
            for k, tensor in enumerate(_tensors(values)):
                trace[f"{place} {k}"] = tensor.detach().to("cpu", copy=True)

    with contextlib.ExitStack() as hooks:
        for name, module in root.named_modules():
            shown = name or "model"
            hooks.callback(module.register_forward_pre_hook(before(shown), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after(shown), with_kwargs=True).remove)
        yield trace


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
