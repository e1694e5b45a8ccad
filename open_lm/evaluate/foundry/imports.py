"""Imports of LLM Foundry, with the shims current torch needs, or the command that installs it."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch

from open_lm.errors import ConfigError

INSTALL = "`make install-eval`"


def require_llm_foundry() -> None:
    """Import LLM Foundry and Composer, so that later imports of their parts work.

    Raises:
        ConfigError: they are not installed, or something they need is missing.
    """
    _declare_torchvision_operators()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import composer  # noqa: F401
            import llmfoundry
            import llmfoundry.utils.builders  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"--engine llm-foundry: cannot import LLM Foundry ({error}). Install it with {INSTALL}, "
            "or take --engine native, which gives the same numbers."
        ) from error


_declared: list[Any] = []


def _declare_torchvision_operators() -> None:
    """Composer imports torchvision, whose compiled part may not match torch; newer ones then look for these two."""
    if _declared or torch.cuda.is_available():  # beside a CUDA torch the matching torchvision brings them
        return
    with contextlib.suppress(Exception):  # a torchvision that loads its own
        import torchvision  # noqa: F401

        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
