"""Target masks: left of a marker, and padding.  Shapes: B samples, S tokens, T positions."""

from __future__ import annotations

import torch
from torch import Tensor

from open_lm.data.batch import IGNORED, Batch


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
