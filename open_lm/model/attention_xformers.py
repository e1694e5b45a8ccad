"""Attention through xformers, on GPUs where its kernels run; everywhere else the equal one of torch.

Shapes: B batch, T queries, S keys, H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

import logging
from functools import cache

from torch import Tensor

from open_lm.errors import ConfigError
from open_lm.model.attention_core import Attend, scaled_dot_product
from open_lm.model.config import ModelConfig
from open_lm.model.mask import Mask


def xformers_attention(config: ModelConfig) -> Attend:
    """Softmax attention by xformers' memory-efficient kernels.

    Raises:
        ConfigError: xformers is not installed.
    """
    try:
        from xformers import ops
    except ImportError as error:
        raise ConfigError(
            f"--attn-name {config.attn_name} needs xformers, which is not installed: pip install xformers, "
            "or use --attn-name auto, which computes the same."
        ) from error

    def attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask) -> Tensor:
        if not runs_for(q_BTHK, k_BSGK, mask):
            return scaled_dot_product(q_BTHK, k_BSGK, v_BSGK, mask)
        bias = ops.LowerTriangularMask() if q_BTHK.shape[1] > 1 else None
        try:
            return ops.memory_efficient_attention(q_BTHK, k_BSGK, v_BSGK, attn_bias=bias)
        except NotImplementedError as error:  # built for another torch, or for other devices, types or widths
            _say_once(config.attn_name, str(error).strip().splitlines()[0])
            return scaled_dot_product(q_BTHK, k_BSGK, v_BSGK, mask)

    return attend


@cache
def _say_once(name: str, reason: str) -> None:
    logging.warning("--attn-name %s: xformers has no kernel here (%s); torch computes the same.", name, reason)


def runs_for(q_BTHK: Tensor, k_BSGK: Tensor, mask: Mask) -> bool:
    """Whether xformers computes this call: on a GPU, plain causal, all heads, whole sequences or one query."""
    whole = q_BTHK.shape[1] in (1, k_BSGK.shape[1])
    return q_BTHK.is_cuda and mask.is_causal and whole and q_BTHK.shape[2] == k_BSGK.shape[2]
