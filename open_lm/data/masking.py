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

    `document_end` is the id after which attention starts anew, None where it does not. Unreadable samples are rows
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

    A document's first token is no target: nothing before it in the sample predicts it. `extras["n_real"]` counts the
    inputs of each row that are no padding.
    """
    marks_BS = torch.where(samples_BS < 0, PADDING, samples_BS >> ID_BITS)
    begins_BT = (marks_BS[:, :-1] & START) != 0
    documents_BT = batch.documents_BT
    if documents_BT is None and bool(begins_BT[:, 1:].any()):
        documents_BT = begins_BT.cumsum(1, dtype=torch.int32)
    targets_BT = batch.targets_BT.masked_fill(marks_BS[:, 1:] != 0, IGNORED)
    n_real_B = ((marks_BS[:, :-1] & PADDING) == 0).sum(1)
    return replace(batch, targets_BT=targets_BT, documents_BT=documents_BT, extras={"n_real": n_real_B})


def masked_batch(samples_BS: Tensor, *, left_of: int | None, individual: int | None, squash: bool) -> Batch:
    """Inputs and targets of samples, some targets IGNORED.

    `left_of`: targets up to and including the first such token of a sample; a sample without it is trained on whole.
    `individual`: every target that is this token. `squash`: the `left_of` token is taken out of the sample, which is
    read one token longer for it; the mask then ends where it stood.
    """
    if left_of is None:
        batch = Batch.from_samples(samples_BS)
        return batch if individual is None else _without(batch, batch.targets_BT == individual)
    marker_B = _first(samples_BS, left_of)
    if squash:
        samples_BS = _taken_out(samples_BS, marker_B)
        marker_B = marker_B - 1
    batch = Batch.from_samples(samples_BS)
    places_T = torch.arange(1, samples_BS.shape[1])  # where in the sample each target stands
    masked_BT = (places_T <= marker_B[:, None]) & (marker_B < samples_BS.shape[1])[:, None]
    if individual is not None:
        masked_BT |= batch.targets_BT == individual
    return _without(batch, masked_BT)


def _without(batch: Batch, masked_BT: Tensor) -> Batch:
    return Batch(batch.inputs_BT, batch.targets_BT.masked_fill(masked_BT, IGNORED))


def _first(samples_BS: Tensor, token: int) -> Tensor:
    """Place of the first `token` in each sample; far beyond its end where there is none."""
    is_token_BS = samples_BS == token
    return torch.where(is_token_BS.any(dim=1), is_token_BS.int().argmax(dim=1), 2 * samples_BS.shape[1])


def _taken_out(samples_BS: Tensor, place_B: Tensor) -> Tensor:
    """Samples one token shorter: without the one at `place_B`, or without their last."""
    kept_S = torch.arange(samples_BS.shape[1] - 1)
    return samples_BS.gather(1, kept_S + (kept_S >= place_B[:, None]).long())
