"""`openlm compare-traces`: the first module that differs between two runs, from the traces of --trace-steps."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from open_lm.errors import DataError
from open_lm.flags import Parser
from open_lm.report.compare import Difference, compare_tensors


def main(argv: Sequence[str] | None = None) -> None:
    """Print what differs; 1 when anything does."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="A run folder with traces/, or one file from there.")
    parser.add_argument("--rtol", type=float, default=0.0, help="Relative difference that still agrees (default: 0).")
    parser.add_argument("--atol", type=float, default=0.0, help="Absolute difference that still agrees (default: 0).")
    parser.add_argument("--show", type=int, default=5, help="Differences to print (default: 5).")
    args = parser.parse_args(argv)

    import torch

    for name, first, second in pairs(*map(Path, args.runs)):
        traces = [torch.load(path, weights_only=True) for path in (first, second)]
        differences = compare_tensors(*traces, rtol=args.rtol, atol=args.atol)
        if differences:
            print(f"{name}: the first that differs is\n  {spelled(differences[0])}")
            print("".join(f"  {spelled(difference)}\n" for difference in differences[1 : args.show]), end="")
            print(f"{len(differences)} of {len(traces[0])} tensors differ.")
            sys.exit(1)
        print(f"{name}: {len(traces[0])} tensors agree")


def pairs(first: Path, second: Path) -> list[tuple[str, Path, Path]]:
    """The files that belong together, in the order of steps."""
    if first.is_file() and second.is_file():
        return [(first.name, first, second)]
    names = [{path.name for path in (folder / "traces").glob("step*.pt")} for folder in (first, second)]
    common = sorted(names[0] & names[1], key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    if not common:
        raise DataError(f"{first} and {second} have no traced step in common. Run both with --trace-steps.")
    return [(name, first / "traces" / name, second / "traces" / name) for name in common]


def spelled(difference: Difference) -> str:
    """`1 layers.0.attention output 0` for people."""
    micro_batch, module, kind, index = difference.name.split(" ")
    return f"{module} ({kind} {index}, micro-batch {micro_batch}): {difference.what}"
