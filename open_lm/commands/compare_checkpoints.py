"""`openlm compare-checkpoints`: the first parameter that differs between two checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from open_lm.flags import Parser
from open_lm.report.compare import Difference, compare_tensors

if TYPE_CHECKING:
    from torch import Tensor


def main(argv: Sequence[str] | None = None) -> None:
    """Print what differs; 1 when any weight does."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoints", nargs=2, metavar="CHECKPOINT", help="Anything that open_lm.load_model takes.")
    parser.add_argument("--rtol", type=float, default=0.0, help="Relative difference that still agrees (default: 0).")
    parser.add_argument("--atol", type=float, default=0.0, help="Absolute difference that still agrees (default: 0).")
    parser.add_argument("--show", type=int, default=5, help="Differences to print (default: 5).")
    args = parser.parse_args(argv)

    from open_lm.checkpoint.read import read_checkpoint
    from open_lm.weights.file import clean_state_dict

    files = [read_checkpoint(path) for path in args.checkpoints]
    for difference in differing_facts(*files):
        print(difference)
    weights: list[Mapping[str, Tensor]] = [clean_state_dict(file) for file in files]
    differences = compare_tensors(*weights, rtol=args.rtol, atol=args.atol)
    if not differences:
        print(f"{len(weights[0])} tensors agree")
        return
    print(f"the first that differs is\n  {differences[0]}")
    print("".join(f"  {difference}\n" for difference in differences[1 : args.show]), end="")
    print(f"{len(differences)} of {len(weights[0])} tensors differ.")
    sys.exit(1)


def differing_facts(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Differences between the architectures, flags and steps that two files state."""
    flat = [
        {"step": file.get("step"), **{f"{k} {n}": v for k in ("model", "flags") for n, v in _stated(file, k).items()}}
        for file in (first, second)
    ]
    names = dict.fromkeys([*flat[0], *flat[1]])
    return [
        Difference(name, f"{flat[0].get(name)!r} and {flat[1].get(name)!r}")
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]


def _stated(file: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return (file.get("config") or {}).get(kind) or {}
