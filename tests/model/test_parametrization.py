"""Parametrizations: what scales with width and depth, on which weights, and what they refuse."""

import pytest
import torch

from open_lm.errors import ConfigError
from open_lm.ladder.transfer import coordinate_check, lr_sweep, spread
from open_lm.ladder.transfer_setup import TransferSetup
from open_lm.model import create_model
from open_lm.model.architecture import ModelConfig
from open_lm.model.config import ModelFlags, resolve_architecture
from open_lm.model.init import init_weights
from open_lm.model.parametrization import role_of, scale_of
from open_lm.train.config import OptimizerConfig
from open_lm.train.optim import build_optimizers, set_lr

PARTS = ("embedding", "middle block", "last block", "logits")


def config(parametrization, width=128, depth=8, **more):
    return ModelConfig(
        width, depth, 4, 16, 32, ffn_dim=4 * width, parametrization=parametrization, base_width=64, base_depth=4, **more
    )


def built(architecture):
    torch.manual_seed(0)
    model = create_model(architecture)
    init_weights(model)
    return model


@pytest.mark.parametrize("name", ["mup", "completep"])
def test_each_parameter_has_the_scales_of_its_paper(name):
    depth = 2 if name == "completep" else 1
    expected = {
        "tok_embeddings.weight": (1, 1 / 2),
        "output.weight": (1 / 2, 1),
        "norm.weight": (1, 1 / 2),
        "layers.3.attention_norm.weight": (1, 1 / 2 / depth),
        "layers.3.attention.in_proj.weight": (1 / 2, 1 / 2 / depth),
        "layers.3.attention.out_proj.weight": (1 / 2 / depth, 1 / 2),
        "layers.3.feed_forward.w12.weight": (1 / 2, 1 / 2 / depth),
        "layers.3.feed_forward.w3.weight": (1 / 2 / depth, 1 / 2),
    }
    named = dict(built(config(name)).named_parameters())
    for key, (lr, eps) in expected.items():
        for prefix in ("", "module.", "_orig_mod."):
            assert (scale_of(config(name), prefix + key, named[key].ndim).lr) == pytest.approx(lr)
        assert scale_of(config(name), key, named[key].ndim).eps == pytest.approx(eps)


def test_every_matrix_of_every_feed_forward_layer_has_a_role():
    for ffn_type, end in (("swiglu", "w3"), ("gelu", "2"), ("gemma_geglu", "down_proj")):
        model = built(config("completep", ffn_type=ffn_type))
        ends = {n for n, p in model.named_parameters() if role_of(n, p.ndim) == "branch_end"}
        assert f"layers.0.feed_forward.{end}.weight" in ends
        assert len(ends) == 2 * 8


def test_learning_rates_follow_the_schedule_at_their_scale_and_all_weights_decay_alike():
    architecture = config("completep")
    model = built(architecture)
    (optimizer,) = build_optimizers(model, OptimizerConfig(wd=0.1, eps=1e-8), 1e-3, architecture)
    names = {id(p): (name, p.ndim) for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["eps"] == pytest.approx(1e-8 * scale_of(architecture, *names[id(parameter)]).eps)
    for rate in (1e-3, 2e-4):
        set_lr([optimizer], rate)
        assert {group["lr"] for group in optimizer.param_groups} == {rate, rate / 2, rate / 4}
        decayed = [group["lr"] * group["weight_decay"] for group in optimizer.param_groups if group["weight_decay"]]
        assert decayed == pytest.approx([rate * 0.1] * len(decayed))
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in built(architecture).parameters()
    )


def test_a_model_at_its_base_learns_as_under_standard_but_for_what_begins_at_zero():
    base = config("mup", width=64, depth=4)
    standard = built(config("standard", width=64, depth=4)).state_dict()
    ours = built(base).state_dict()
    assert not ours["output.weight"].any()
    for name, weight in ours.items():
        if weight.ndim == 2 and "output" not in name:
            assert weight.std().item() == pytest.approx(standard[name].std().item(), rel=0.1), name
    assert {(scale_of(base, k, v.ndim).lr, scale_of(base, k, v.ndim).eps) for k, v in ours.items()} == {(1.0, 1.0)}


@pytest.mark.parametrize("change", [{"weight_tying": True}, {"moe_freq": 1, "moe_num_experts": 4}])
def test_shared_matrices_and_experts_are_refused(change):
    with pytest.raises(ConfigError, match="--parametrization"):
        config("mup", **change)
    config("standard", **change)


def test_other_models_and_optimizers_are_refused():
    with pytest.raises(ConfigError, match="--parametrization mup"):
        resolve_architecture(ModelFlags(model="mamba_130m", parametrization="mup"))
    with pytest.raises(ConfigError, match="--optimizer muon"):
        build_optimizers(built(config("mup")), OptimizerConfig(optimizer="muon"), 1e-3, config("mup"))
    with pytest.raises(ConfigError, match="parametrization"):
        config("best")


@pytest.fixture(scope="module")
def checks():
    """Coordinates over widths 64 to 512 and depths 2 to 16 after 10 steps."""
    return {name: coordinate_check(TransferSetup(parametrization=name)) for name in ("standard", "completep")}


def spreads(rows, part, *, over_width, key):
    same = [r for r in rows if r.part == part and (r.depth == 4 if over_width else r.width == 64)]
    return spread([getattr(r, key) for r in same])


@pytest.mark.parametrize("over_width", [True, False], ids=["widths", "depths"])
def test_coordinates_are_flat_under_completep_and_not_under_standard(checks, over_width):
    for key in ("size", "change"):
        for part in PARTS:
            assert spreads(checks["completep"], part, over_width=over_width, key=key) < 0.10, (part, key)
        worst = max(spreads(checks["standard"], part, over_width=over_width, key=key) for part in PARTS)
        assert worst > 0.5


@pytest.mark.slow
def test_the_best_learning_rate_stays_within_a_grid_step_and_wider_is_better_at_every_rate():
    rates, widths = (1e-3, 4e-3, 1.6e-2), (32, 128)
    rows = lr_sweep(TransferSetup(parametrization="completep", steps=80), [(width, 4) for width in widths], rates)
    losses = {width: [row["loss"] for row in rows if row["width"] == width] for width in widths}
    best = [losses[width].index(min(losses[width])) for width in widths]
    assert abs(best[0] - best[1]) <= 1
    assert all(wide < narrow for narrow, wide in zip(*losses.values(), strict=True))
