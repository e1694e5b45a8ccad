"""A training objective of your own: cross-entropy with label smoothing.

    python examples/own_task.py FOLDER

`--task NAME` finds a TaskKind in a registry. Step, accumulation, precision and ranks stay as they are.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.data.batch import Batch
from open_lm.main import main as train
from open_lm.post_training.config import TASKS
from open_lm.post_training.tasks import TaskKind
from open_lm.train.tasks import Losses, Task

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the registry imports this file by its name
TASKS["smoothed"] = "own_task:SMOOTHED"


@dataclass(frozen=True)
class Smoothed(Task):
    """Next-token prediction against targets of which `smoothing` is spread over the vocabulary."""

    smoothing: float = 0.1

    @property
    def names(self) -> tuple[str, ...]:
        """Two metrics: the plain cross-entropy, so that runs can be compared, and the loss that is minimised."""
        return ("loss", "smoothed_loss")

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        """Both losses, summed over the targets of a micro-batch."""

        def head(hidden_BTD: Tensor, weight_VD: Tensor, routing: object = None) -> Losses:
            logits_NV = hidden_BTD.flatten(0, 1).float() @ weight_VD.float().T
            targets_N = batch.targets_BT.flatten()
            options = {"ignore_index": -100, "reduction": "sum"}
            plain = F.cross_entropy(logits_NV, targets_N, **options)
            smoothed = F.cross_entropy(logits_NV, targets_N, label_smoothing=self.smoothing, **options)
            return Losses(smoothed, torch.stack([plain, smoothed]).detach())

        return model(batch.inputs_BT, **batch.model_inputs, head=head)


SMOOTHED = TaskKind(lambda parts: Smoothed())


def main(folder: Path) -> str:
    """Train with this objective for 5 steps on random tokens; the run's folder."""
    return train(
        ["--model", "open_lm_test_tiny", "--task", "smoothed", "--dataset-type", "synthetic", "--train-steps", "5"]
        + ["--global-batch-size", "4", "--warmup", "1", "--device", "cpu", "--precision", "fp32"]
        + ["--logs", str(folder), "--name", "own_task", "--log-every-n-steps", "1"]
    ).folder


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
