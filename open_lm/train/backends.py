"""Compute back ends of a process: C++ kernels and the memory allocator."""

from __future__ import annotations

import ctypes
import logging
import os

import torch

from open_lm.kernels.native import use_cpu_kernels
from open_lm.train.config import ParallelConfig

MIN_LOGITS = 1 << 20
"""Logits of one sequence from which on a model is large enough for the C++ kernels and for keeping freed memory."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's numbers for what `mallopt` sets."""


def prepare_backends(config: ParallelConfig, device: torch.device, seq_len: int, vocab_size: int) -> None:
    """On a CPU, for models that are not tiny: the C++ kernels, as --cpu-kernels says, and an allocator that keeps."""
    on_cpu = device.type == "cpu" and seq_len * vocab_size >= MIN_LOGITS
    if use_cpu_kernels(on_cpu and config.cpu_kernels == "auto"):
        logging.info("attention and loss are computed by C++ kernels for the CPU; --cpu-kernels off: by plain torch")
    if on_cpu and keep_freed_memory():
        logging.info("freed memory is kept for the next step: mallopt M_MMAP_MAX 0; set MALLOC_MMAP_MAX_ to decide it")


def keep_freed_memory() -> bool:
    """Let glibc reuse the memory of large tensors, whose pages it would return and fetch again, zeroed, every step.

    Returns whether it now does; not where another allocator is loaded or the environment sets one of glibc's MALLOC_*.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    if "malloc" in preloaded or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
