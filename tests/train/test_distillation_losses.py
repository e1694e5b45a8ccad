"""Distillation weighs the cross-entropy against the teacher; z-loss and balance loss keep their own weights."""

import pytest
import torch

from open_lm.data.batch import Batch
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.train.tasks import Distillation, NextToken

SIZES = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 12, "vocab_size": 37}


def gradient(weight, z_loss, balance, where):
    torch.manual_seed(0)
    teacher = create_model(ModelConfig(**SIZES)).eval().requires_grad_(False)
    model = create_model(ModelConfig(**SIZES, moe_freq=1, moe_num_experts=4)).train()
    batch = Batch.from_samples(torch.randint(0, 37, (4, 13)))
    task = Distillation(teacher, weight=weight, next_token=NextToken(z_loss, balance, n_experts=4))
    task.loss_sums(model, batch).total.backward()
    return model.get_parameter(where).grad


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize(
    ("z_loss", "balance", "where"), [(0.0, 0.5, "layers.0.feed_forward.router.weight"), (0.1, 0.0, "output.weight")]
)
def test_other_losses_count_the_same_whatever_the_teachers_share(weight, z_loss, balance, where):
    effects = [gradient(w, z_loss, balance, where) - gradient(w, 0.0, 0.0, where) for w in (0.0, weight)]
    assert effects[0].norm() > 1e-3
    torch.testing.assert_close(effects[1], effects[0], rtol=1e-3, atol=1e-3)
