"""Likelihood and rank of given tokens, computed without holding the logits of many positions.

Shapes: M positions, R positions of one chunk, D model width, V vocabulary, C columns of one tile, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_lm.kernels.dense_linear import linear, runs_for

CHUNK_ROWS = 512
TILE_COLUMNS = 2048
"""A tile of 4 MiB stays near a CPU core: it is written, searched for its largest and summed there, which takes 0.65
times as long as whole rows of logits at width 64, 0.8 times at width 512 (vocabulary 50432, one thread)."""
GPU_LOGITS = 1 << 25
"""On a GPU a tile is as wide as the vocabulary, and has this many logits."""


@dataclass
class _TileStats:
    """Running statistics of R positions and their target tokens, after some tiles of the vocabulary."""

    top_R: Tensor  # noqa: N815
    sum_R: Tensor  # noqa: N815  of exp(logit - top)
    top_tile_R: Tensor  # noqa: N815  the first tile that holds the top
    row_N: Tensor  # noqa: N815
    target_N: Tensor  # noqa: N815
    logit_N: Tensor  # noqa: N815
    leads_tile_N: Tensor  # noqa: N815  whether the token is the first of the largest of its tile
    tile_N: Tensor  # noqa: N815

    def add(self, number: int, start: int, tile_RC: Tensor) -> None:
        """Add tile `number`, whose first column is token `start`; the tile is overwritten."""
        largest_R = tile_RC.amax(-1)
        inside = ((self.target_N >= start) & (self.target_N < start + tile_RC.shape[1])).nonzero()[:, 0]
        if len(inside):
            rows, columns = self.row_N[inside], self.target_N[inside] - start
            self.logit_N[inside] = tile_RC[rows, columns]
            may_lead = self.logit_N[inside] == largest_R[rows]
            inside, rows, columns = inside[may_lead], rows[may_lead], columns[may_lead]
            self.leads_tile_N[inside] = tile_RC[rows].argmax(-1) == columns  # of equals, the first counts
            self.tile_N[inside] = number
        self.top_tile_R.masked_fill_(largest_R > self.top_R, number)
        top_R = torch.maximum(self.top_R, largest_R)
        self.sum_R *= (self.top_R - top_R).exp()
        self.sum_R += tile_RC.sub_(top_R[:, None]).exp_().sum(-1)
        self.top_R = top_R

    def stats(self) -> Tensor:
        """The four columns of `token_stats`."""
        log_z_N = (self.top_R + self.sum_R.log())[self.row_N]
        cross_entropy_N = log_z_N - self.logit_N
        greedy_N = self.leads_tile_N & (self.tile_N == self.top_tile_R[self.row_N])
        largest_N = (self.top_R[self.row_N] - log_z_N).exp()
        return torch.stack((cross_entropy_N, greedy_N.float(), (-cross_entropy_N).exp(), largest_N), dim=1)


def token_stats(hidden_MD: Tensor, weight_VD: Tensor, row_N: Tensor, target_N: Tensor) -> Tensor:
    """For each token after position `row` (ascending): cross-entropy, whether it is the most likely one, its
    probability, and the largest probability; (N, 4) in fp32.

    Products are taken in the autocast type, or that of the weights, everything after them in fp32.
    """
    on_cpu, n_tokens = weight_VD.device.type == "cpu", weight_VD.shape[0]
    n_columns = min(TILE_COLUMNS, n_tokens) if on_cpu else n_tokens
    n_rows = CHUNK_ROWS if on_cpu else max(1, GPU_LOGITS // n_tokens)
    kind = weight_VD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
    memory = weight_VD.new_empty(min(n_rows, len(hidden_MD)) * n_columns, dtype=dtype)
    parts = [hidden_MD.new_zeros(0, 4, dtype=torch.float32)]
    with torch.autocast(kind, enabled=False):
        for first in range(0, len(hidden_MD), n_rows):
            hidden_RD = hidden_MD[first : first + n_rows].to(dtype)
            begin, end = torch.searchsorted(row_N, torch.tensor([first, first + n_rows], device=row_N.device)).tolist()
            chunk = _empty_chunk(len(hidden_RD), row_N[begin:end] - first, target_N[begin:end])
            for number, start in enumerate(range(0, n_tokens, n_columns)):
                weight_CD = weight_VD[start : start + n_columns].to(dtype)
                chunk.add(number, start, _product(hidden_RD, weight_CD, memory).float())
            parts.append(chunk.stats())
    return torch.cat(parts)


def _product(hidden_RD: Tensor, weight_CD: Tensor, memory: Tensor) -> Tensor:
    """Logits of a tile, in `memory` unless oneDNN computes them."""
    if runs_for(hidden_RD, weight_CD):
        return linear(hidden_RD, weight_CD)
    tile_RC = memory[: len(hidden_RD) * len(weight_CD)].view(len(hidden_RD), len(weight_CD))
    return torch.mm(hidden_RD, weight_CD.t(), out=tile_RC)


def _empty_chunk(n_rows: int, row_N: Tensor, target_N: Tensor) -> _TileStats:
    of_rows = torch.zeros(n_rows, device=row_N.device)
    of_tokens = torch.zeros(len(row_N), device=row_N.device)
    return _TileStats(
        top_R=of_rows - torch.inf,
        sum_R=of_rows,
        top_tile_R=of_rows.long(),
        row_N=row_N,
        target_N=target_N,
        logit_N=of_tokens,
        leads_tile_N=of_tokens.bool(),
        tile_N=of_tokens.long() - 1,
    )
