"""What a process computes with, made ready before its model is built."""

from __future__ import annotations

import logging

import torch

from open_lm.kernels.native import use_cpu_kernels
from open_lm.train.config import ParallelConfig

WORTH_IT = 1 << 20
"""Logits of one sequence from which on the C++ kernels are compiled and used."""


def prepare_backends(config: ParallelConfig, device: torch.device, seq_len: int, vocab_size: int) -> None:
    """On a CPU: the C++ kernels, as --cpu-kernels says."""
    wanted = device.type == "cpu" and config.cpu_kernels == "auto" and seq_len * vocab_size >= WORTH_IT
    if use_cpu_kernels(wanted):
        logging.info("attention and loss are computed by C++ kernels for the CPU; --cpu-kernels off: by plain torch")
