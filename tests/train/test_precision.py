"""Loss scaling: one overflow anywhere leaves all parameters of all optimizers as they were, and the scale falls."""

import pytest
import torch

from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.precision import Precision
from open_lm.train.config import OptimizerConfig
from open_lm.train.optim import build_optimizers
from open_lm.train.parallel import clip_grad_norm

CONFIG = ModelConfig(hidden_dim=16, n_layers=2, n_heads=2, seq_len=12, vocab_size=37)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), None])
@pytest.mark.parametrize("where", ["layers.0.attention.in_proj.weight", "tok_embeddings.weight"])
def test_an_overflow_in_any_parameter_skips_the_step_of_all(optimizer, clip, bad, where):
    torch.manual_seed(0)
    model, precision = create_model(CONFIG), Precision("fp16", "cpu")
    optimizers = build_optimizers(model, OptimizerConfig(optimizer=optimizer), lr=1e-2)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3 * precision.scaler.scale(torch.ones(()))
    if bad is not None:
        model.get_parameter(where).grad[0, 0] = bad
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale = precision.loss_scale
    norm, _ = precision.step(model, optimizers, clip=lambda m: clip_grad_norm(m, clip))
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert all(p.isfinite().all() for p in model.parameters()) and norm.isfinite()
    assert len(changed) == (0 if bad is not None else len(before))
    assert precision.loss_scale == (scale / 2 if bad is not None else scale)
    assert all(p.grad is None for p in model.parameters())
