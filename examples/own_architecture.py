"""A feed-forward layer of your own, without a change to the package.

    python examples/own_architecture.py FOLDER

A registry maps a name to `module:class`; flags take their choices from it when a command line is parsed.
"""

import sys
from pathlib import Path

from torch import Tensor, nn

from open_lm.main import main as train
from open_lm.model.variants import FEED_FORWARDS

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the registry imports this file by its name
FEED_FORWARDS["squared_relu"] = "own_architecture:SquaredRelu"


class SquaredRelu(nn.Module):
    """`w2(relu(w1(x)) ** 2)` (Primer, arXiv:2109.08668)."""

    def __init__(self, dim: int, layer: int, width: int | None = None):
        super().__init__()
        width = width or 4 * dim
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.out_std = (width * 2 * (layer + 1)) ** -0.5

    def reset_parameters(self) -> None:
        """w1: 1/sqrt(fan-in); w2: smaller with depth."""
        nn.init.trunc_normal_(self.w1.weight, std=self.w1.in_features**-0.5)
        nn.init.trunc_normal_(self.w2.weight, std=self.out_std)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x`."""
        return self.w2(self.w1(x).relu().square())


def main(folder: Path) -> str:
    """Train a model with this layer for 5 steps on random tokens; the run's folder."""
    return train(
        ["--model", "open_lm_test_tiny", "--ffn-type", "squared_relu", "--dataset-type", "synthetic"]
        + ["--train-steps", "5", "--global-batch-size", "4", "--warmup", "1", "--device", "cpu", "--precision", "fp32"]
        + ["--logs", str(folder), "--name", "own_architecture"]
    ).folder


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
