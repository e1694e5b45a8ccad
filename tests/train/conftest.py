"""A tiny model, its state, and batches with holes, for tests of the step and the loop."""

import pytest
import torch

from open_lm.data.batch import IGNORED, Batch
from open_lm.distributed import World
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.precision import Precision
from open_lm.train.config import OptimizerConfig
from open_lm.train.optim import build_optimizers
from open_lm.train.run_length import RunLength
from open_lm.train.state import TrainState
from open_lm.train.tasks import NextToken

CONFIG = ModelConfig(hidden_dim=16, n_layers=2, n_heads=2, seq_len=12, vocab_size=37, model_norm="gain_only_layer_norm")


def make_state(precision="fp32", z_loss=0.0, dtype=torch.float32, world=None, optimizer="adamw"):
    torch.manual_seed(0)
    model = create_model(CONFIG).to(dtype)
    return TrainState(
        model=model,
        optimizers=build_optimizers(model, OptimizerConfig(optimizer=optimizer), lr=1e-2),
        precision=Precision(precision, "cpu"),
        lr_at=lambda step: 1e-2,
        run_length=RunLength((10,), tokens_per_step=8 * CONFIG.seq_len),
        task=NextToken(z_loss),
        world=world or World(),
    )


def make_batch(step=0, n=8):
    generator = torch.Generator().manual_seed(step)
    samples = torch.randint(0, CONFIG.vocab_size, (n, CONFIG.seq_len + 1), generator=generator)
    batch = Batch.from_samples(samples)
    targets = batch.targets_BT.clone()
    targets[0, 3:] = IGNORED  # rows with few targets: means of means would differ
    targets[1] = IGNORED
    return Batch(batch.inputs_BT, targets)


@pytest.fixture
def tiny():
    """`(make_state, make_batch, CONFIG)`."""
    return make_state, make_batch, CONFIG
