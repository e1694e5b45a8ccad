"""Targets that are not trained on: those with a mark, left of a marker token, padding; and where documents begin.

Shapes: B samples, S tokens, T positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from open_lm.data.batch import IGNORED, Batch
from open_lm.data.config import DataConfig
from open_lm.data.marks import ID_BITS, IDS, PADDING, START
from open_lm.errors import ConfigError


def batch_of(samples_BS: Tensor, config: DataConfig, document_end: int | None, *, plain: bool = False) -> Batch:
    """Inputs and targets of samples, masked as their marks and the flags --target-mask-* say.

    `document_end` is the id after which attention restarts, None where it does not. Unreadable samples are rows
    of -1. `plain` samples are known to carry no marks.

    Raises:
        ConfigError: --squash-mask-left with samples that carry marks.
    """
    are_marked = not plain and bool((samples_BS > IDS).any())
    if are_marked and config.squash_mask_left:
        raise ConfigError("--squash-mask-left: these samples say themselves what is trained on. Leave the flag out.")
    batch = masked_batch(
        torch.where(samples_BS < 0, samples_BS, samples_BS & IDS) if are_marked else samples_BS,
        left_of=config.target_mask_left,
        individual=config.target_mask_individual,
        squash=config.squash_mask_left,
    )
    if document_end is not None:
        batch = batch.with_documents(document_end)
    return with_marks(batch, samples_BS) if are_marked else batch


def with_marks(batch: Batch, samples_BS: Tensor) -> Batch:
    """`batch`, made of the ids of `samples_BS`, with targets, documents and counts as their marks say.

    A document's first token is no target: nothing before it in the sample predicts it. `extras["real_share"]` is the
    share of each row's inputs that are no padding.
    """
    marks_BS = torch.where(samples_BS < 0, PADDING, samples_BS >> ID_BITS)
    begins_BT = (marks_BS[:, :-1] & START) != 0
    documents_BT = batch.documents_BT
    if documents_BT is None and bool(begins_BT[:, 1:].any()):
        documents_BT = begins_BT.cumsum(1, dtype=torch.int32)
    targets_BT = batch.targets_BT.masked_fill(marks_BS[:, 1:] != 0, IGNORED)
    real_share_B = ((marks_BS[:, :-1] & PADDING) == 0).float().mean(1)
    return replace(batch, targets_BT=targets_BT, documents_BT=documents_BT, extras={"real_share": real_share_B})


def masked_batch(samples_BS: Tensor, *, left_of: int | None, individual: int | None, squash: bool) -> Batch:
    """Inputs and targets of samples, some targets IGNORED, as OpenLM masks them.

    `left_of`: targets up to and including the last such token among them; where there is none all are trained on.
    `individual`: every target that is this token. `squash`: the `left_of` tokens are then taken out of inputs and
    targets, each filled up on the right: inputs with `individual` (None: 0), targets with IGNORED.
    """
    inputs_BT, targets_BT = samples_BS[:, :-1], samples_BS[:, 1:]
    if left_of is None and individual is None:
        return Batch(inputs_BT, targets_BT)
    if left_of is None:
        masked_BT = torch.zeros_like(targets_BT, dtype=torch.bool)
    else:
        is_marker_BT = targets_BT == left_of
        masked_BT = is_marker_BT.flip(1).cumsum(1).flip(1) > 0  # a marker stands here or further right
    if individual is not None:
        masked_BT = masked_BT | (targets_BT == individual)
    ignored_BT = targets_BT.masked_fill(masked_BT, IGNORED)
    if squash and left_of is not None:
        ignored_BT = _squashed(ignored_BT, targets_BT == left_of, IGNORED)
        inputs_BT = _squashed(inputs_BT, inputs_BT == left_of, 0 if individual is None else individual)
    return Batch(inputs_BT, ignored_BT)


def _squashed(rows_BT: Tensor, out_BT: Tensor, filling: int) -> Tensor:
    """Rows without what `out_BT` marks, filled up on the right."""
    order_BT = out_BT.int().argsort(dim=1, stable=True)
    n_kept_B = (~out_BT).sum(1, keepdim=True)
    places_T = torch.arange(rows_BT.shape[1], device=rows_BT.device)
    return rows_BT.gather(1, order_BT).masked_fill(places_T >= n_kept_B, filling)
