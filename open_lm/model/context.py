"""Context parallelism: the positions of a sequence shared out among ranks, keys and values gathered for attention.

Shapes: B batch, T positions of this rank, S positions of the whole sequence, G heads of keys and values, K head width.

Gathering keys and values is what Llama 3 did (arXiv:2407.21783, 3.3.2): exact under every mask, and cheap beside the
attention itself wherever heads of queries share keys and values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from open_lm.model.cache import KeyValue, LayerCache
from open_lm.model.mask import Mask, Reach


class SequencePart(LayerCache):
    """The positions of each sequence that rank `number` of `n_parts` holds: a piece near its start, one near its end.

    A sequence is cut into 2n pieces, of which rank r takes the pieces r and 2n - 1 - r, so that causal attention costs
    all ranks the same. `gathered` concatenates what the ranks hold along dimension 1, in rank order, with gradients.
    To a layer this is a cache, which holds the other ranks' keys and values.
    """

    def __init__(self, number: int, n_parts: int, gathered: Callable[[Tensor], Tensor]):
        super().__init__()
        self.number, self.n_parts, self._gathered = number, n_parts, gathered

    def pieces(self, n_local: int) -> tuple[slice, slice]:
        """This rank's two slices of the whole sequence, `n_local` positions together."""
        size = n_local // 2
        first, last = self.number * size, (2 * self.n_parts - 1 - self.number) * size
        return slice(first, first + size), slice(last, last + size)

    def take(self, x_BS: Tensor) -> Tensor:
        """This rank's positions of what has all of them along dimension 1."""
        assert x_BS.shape[1] % (2 * self.n_parts) == 0, (x_BS.shape, self.n_parts)
        return torch.cat([x_BS[:, piece] for piece in self.pieces(x_BS.shape[1] // self.n_parts)], dim=1)

    def positions(self, n_local: int, device: torch.device) -> Tensor:
        """The numbers of this rank's positions in the whole sequence, (T,)."""
        return torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in self.pieces(n_local)])

    def mask(self, n_local: int, device: torch.device, *, reach: Reach, documents_BS: Tensor | None) -> SplitMask:
        """The mask of this rank's queries over the keys of the whole sequence."""
        pieces = self.pieces(n_local)
        return SplitMask([
            Mask(
                piece.stop - piece.start,
                piece.stop,
                device,
                reach=reach,
                documents_BS=None if documents_BS is None else documents_BS[:, : piece.stop],
            )
            for piece in pieces
        ])  # fmt: skip

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> KeyValue:
        """The keys and values of the whole sequence."""
        both = self._gathered(torch.cat((k_BTGK, v_BTGK), dim=-1))
        pieces = both.chunk(2 * self.n_parts, dim=1)
        in_order = torch.cat((*pieces[0::2], *reversed(pieces[1::2])), dim=1)
        return in_order[..., : k_BTGK.shape[-1]], in_order[..., k_BTGK.shape[-1] :]


class SplitMask(Mask):
    """A mask for each of the pieces that the queries stand in."""

    def __init__(self, pieces: list[Mask]):
        super().__init__(sum(piece.n_queries for piece in pieces), pieces[-1].n_keys, pieces[0].device)
        self.pieces = pieces

    @property
    def is_causal(self) -> bool:
        return False

    def apply(self, attend: Callable[..., Tensor], q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        """Attention piece by piece, each over the keys up to its end."""
        queries = q_BTHK.split([piece.n_queries for piece in self.pieces], dim=1)
        return torch.cat(
            [
                attend(q, k_BSGK[:, : piece.n_keys], v_BSGK[:, : piece.n_keys], piece)
                for q, piece in zip(queries, self.pieces, strict=True)
            ],
            dim=1,
        )
