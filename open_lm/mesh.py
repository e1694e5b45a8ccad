"""Mesh of ranks: how many ranks share out the data, the weights, the sequence, the experts and each matrix.

Ranks are numbered with tp fastest, then ep, cp, fsdp and dp: ranks that talk most are on one node.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace

from open_lm.errors import ConfigError

AXES = ("dp", "fsdp", "cp", "ep", "tp")
EASYLM_AXES = ("dp", "fsdp", "tp", "cp")
"""Axes of EasyLM's `--mesh-dim 1,-1,1`, in order; its `mp` is tp and its `sp` is cp."""
OTHER_NAMES = {"mp": "tp", "sp": "cp"}


@dataclass(frozen=True)
class MeshShape:
    """Ranks along each axis; their product is the world."""

    dp: int = 1
    """Copies of the sharded model, each on other sequences; gradients are summed over them."""
    fsdp: int = 1
    """Ranks that share out weights, gradients and optimizer (FSDP2), each on other sequences."""
    cp: int = 1
    """Ranks that share out each sequence (context parallel)."""
    ep: int = 1
    """Ranks that share out the experts, each on other sequences (expert parallel)."""
    tp: int = 1
    """Ranks that share out every matrix and the activations (tensor and sequence parallel)."""

    @property
    def size(self) -> int:
        """All ranks."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def n_data(self) -> int:
        """Ranks, or groups of them, that read different sequences."""
        return self.dp * self.fsdp * self.ep

    @property
    def n_shares(self) -> int:
        """Ranks, or groups of them, that hold different targets: sums run over these."""
        return self.n_data * self.cp

    @property
    def n_shards(self) -> int:
        """Ranks that one copy of a dense weight is sharded over."""
        return self.fsdp * self.cp * self.ep

    @property
    def is_plain(self) -> bool:
        """Whether every rank holds the whole model."""
        return self.dp == self.size

    def place(self, rank: int) -> dict[str, int]:
        """The index of `rank` along each axis."""
        places = {}
        for axis in reversed(AXES):
            rank, places[axis] = divmod(rank, getattr(self, axis))
        return places

    def data_rank(self, rank: int) -> int:
        """Number of the share (of `n_data`) of the sequences that `rank` reads."""
        place = self.place(rank)
        return (place["dp"] * self.fsdp + place["fsdp"]) * self.ep + place["ep"]

    def share_rank(self, rank: int) -> int:
        """Number of the share (of `n_shares`) of the targets that `rank` holds."""
        return rank // self.tp

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "dp=1"


def parse_mesh(text: str) -> dict[str, int]:
    """The axes that `--mesh` names: `fsdp=4,tp=2`, or EasyLM's `dp:1,fsdp:-1,mp:1` and `1,-1,1`; -1 is the rest.

    Raises:
        ConfigError: an axis is unknown, named twice, or its size is no count; or more than one is -1.
    """
    parts = text.removeprefix("!").replace(":", "=").split(",")
    if all(_is_number(part) for part in parts) and len(parts) <= len(EASYLM_AXES):
        parts = [f"{axis}={number}" for axis, number in zip(EASYLM_AXES, parts, strict=False)]
    sizes: dict[str, int] = {}
    for part in parts:
        name, _, number = part.strip().partition("=")
        axis = OTHER_NAMES.get(name, name)
        if axis not in AXES or axis in sizes:
            what = "is named twice" if axis in sizes else "is no axis"
            raise ConfigError(f"--mesh {text}: {name!r} {what}. Give each of {', '.join(AXES)} at most once.")
        if not _is_number(number) or not (int(number) >= 1 or int(number) == -1):
            raise ConfigError(
                f"--mesh {text}: {axis} {number!r} is no number of ranks: give 1 or more, -1 for the rest."
            )
        sizes[axis] = int(number)
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"--mesh {text}: only one axis can take the rest (-1).")
    return sizes


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*-?[0-9]+\s*", text) is not None


def shape_for(sizes: dict[str, int], world_size: int, rest: str = "dp") -> MeshShape:
    """The shape of `sizes` on `world_size` ranks; what is left goes to the axis that is -1, else to `rest`.

    Raises:
        ConfigError: the axes do not multiply to the ranks.
    """
    open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
    if open_axis is None and rest not in sizes:
        open_axis = rest
    given = MeshShape(**{axis: size for axis, size in sizes.items() if size != -1})
    if open_axis is not None and world_size % given.size == 0:
        given = replace(given, **{open_axis: world_size // given.size})
    if given.size != world_size:
        spelled = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"--mesh {spelled}: {given.size} ranks do not fit the {world_size} that were started. Let the axes "
            "multiply to them, or give one as -1."
        )
    return given


assert tuple(f.name for f in fields(MeshShape)) == AXES
