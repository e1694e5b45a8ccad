"""Divergence of a student's next-token distributions from a teacher's, without the logits of a whole batch.

Shapes: N positions, D and E the widths of student and teacher, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 24
"""Logits of the student (and as many of the teacher) that are held at once: 64 MB in fp32."""


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_VE: Tensor,
    counted_N: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Summed KL(teacher || student) over the counted positions, both at `temperature`, times its square, so that the
    gradients keep their size (Hinton et al., arXiv:1503.02531). Only the student gets gradients.

    The backward pass recomputes the logits, some positions at a time.
    """
    n_rows = max(1, CHUNK_LOGITS // weight_VD.shape[0])
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden_ND.shape[0], n_rows):
        rows = slice(start, start + n_rows)
        total = total + checkpoint(
            _divergence,
            hidden_ND[rows],
            weight_VD,
            teacher_hidden_NE[rows],
            teacher_weight_VE,
            counted_N[rows],
            temperature,
            use_reentrant=False,
        )
    return total


def _divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, counted: Tensor, temperature: float
) -> Tensor:
    student = F.log_softmax(F.linear(hidden, weight).float() / temperature, dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float() / temperature, dim=-1)
    each_N = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (each_N * counted).sum()
