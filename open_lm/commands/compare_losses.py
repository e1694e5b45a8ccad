"""`openlm compare-losses`: the first step whose loss differs between two runs that should agree."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from open_lm.errors import DataError
from open_lm.flags import Parser
from open_lm.report.compare import compare_series, read_metric


def main(argv: Sequence[str] | None = None) -> None:
    """Print the first step that differs; 1 when there is one."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="A run folder, or a metrics.jsonl.")
    parser.add_argument("--metric", default="train/loss", help="What to compare (default: train/loss).")
    parser.add_argument("--rtol", type=float, default=0.0, help="Relative difference that still agrees (default: 0).")
    args = parser.parse_args(argv)
    first, second = (read_metric(path, args.metric) for path in args.runs)
    common = set(first) & set(second)
    if not common:
        raise DataError(f"{args.runs[0]} and {args.runs[1]} have no step with {args.metric} in common.")
    differences = compare_series(first, second, rtol=args.rtol)
    if not differences:
        print(f"{args.metric} agrees at all {len(common)} common steps, up to {max(common)}")
        return
    print(f"{args.metric}: the first that differs is {differences[0]}")
    print(f"{len(differences)} of {len(common)} common steps differ.")
    sys.exit(1)
