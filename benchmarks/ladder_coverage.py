"""Coverage of the bootstrap intervals of ladder fits: how often 95 % intervals hold the law that made the points.

python benchmarks/ladder_coverage.py [--draws 200] [--resamples 200]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm.ladder.fitting import fit, interval
from open_lm.ladder.laws import LAWS
from open_lm.ladder.points import Points

TRUE = np.array([np.log(482.0), np.log(2085.0), 1.82, 0.348, 0.366])
LADDERS = {
    "5 sizes x 4 lengths": (np.geomspace(6e7, 1.3e9, 5), (0.5, 1, 2, 4)),
    "8 sizes x 6 lengths": (np.geomspace(1e7, 1e9, 8), (0.5, 1, 2, 4, 8, 16)),
}


def draw(law, sizes, multiples, noise, seed):
    n, multiple = (x.ravel() for x in np.meshgrid(sizes, multiples))
    d = 20 * n * multiple
    loss = law.loss(TRUE[None], n, d)[0] * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))
    return Points(n, d, loss, np.full(len(n), np.nan), tuple(map(str, range(len(n)))))


def coverage(law, sizes, multiples, noise, draws, resamples):
    """The share of draws whose interval holds the truth, for each parameter and a prediction at 10 times the size."""
    target = np.array([10 * sizes[-1]]), np.array([200 * sizes[-1]])
    exact = law.loss(TRUE[None], *target)[0, 0]
    held = np.zeros(len(TRUE) + 1)
    for seed in range(draws):
        found = fit(law, draw(law, sizes, multiples, noise, seed), resamples=resamples, seed=seed)
        bounds = [found.intervals()[name] for name in law.names] + [interval(found.predict_all(*target))]
        held += [low <= value <= high for (low, high), value in zip(bounds, [*TRUE, exact], strict=True)]
    return held / draws


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    args = parser.parse_args()
    law = LAWS["chinchilla"]
    print("ladder                noise   " + "  ".join(f"{name:>6}" for name in (*law.names, "10x N")))
    for name, (sizes, multiples) in LADDERS.items():
        for noise in (0.002, 0.005):
            began = time.perf_counter()
            shares = coverage(law, sizes, multiples, noise, args.draws, args.resamples)
            print(f"{name}   {noise:.3f}   " + "  ".join(f"{s:6.1%}" for s in shares), end="")
            print(f"   ({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
