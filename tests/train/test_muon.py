"""Muon: each matrix of a fused projection by itself, the same on any ranks, what is no matrix left to AdamW."""

import pytest
import torch
from gloo import run_ranks

from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.model import create_model
from open_lm.model.architecture import MambaConfig
from open_lm.model.config import ModelConfig
from open_lm.train import muon
from open_lm.train.config import OptimizerConfig, ParallelConfig
from open_lm.train.muon import Muon, Packing, newton_schulz
from open_lm.train.optim import build_optimizers, packings
from open_lm.train.parallel import wrap

SIZES = {"hidden_dim": 24, "n_layers": 2, "n_heads": 4, "seq_len": 12, "vocab_size": 37}
EXPERTS = {"moe_freq": 1, "moe_num_experts": 3}
FP32 = OptimizerConfig(optimizer="muon", muon_ns_precision="fp32", wd=0.1)


def reference(weight, gradient, momentum, lr, wd, rows):
    """One update of torch's own Muon for each matrix alone."""
    parts = zip(weight.split(rows), gradient.split(rows), momentum.split(rows), strict=True)
    out = []
    for w, g, m in parts:
        p = torch.nn.Parameter(w.clone())
        own = torch.optim.Muon([p], lr=lr, weight_decay=wd, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        own.state[p]["momentum_buffer"] = m.clone()
        p.grad = g.clone()
        own.step()
        out.append(p.detach())
    return torch.cat(out)


def test_each_matrix_of_a_fused_projection_is_updated_as_torchs_muon_updates_it_alone():
    torch.manual_seed(0)
    rows = (8, 4, 4)
    parameter = torch.nn.Parameter(torch.randn(16, 12))
    ours = Muon([parameter], lr=0.1, weight_decay=0.2, packings={id(parameter): Packing(rows)})
    for _ in range(3):
        parameter.grad = torch.randn(16, 12)
        momentum = ours.state[parameter].get("momentum_buffer", torch.zeros(16, 12)).clone()
        expected = reference(parameter.detach(), parameter.grad, momentum, 0.1, 0.2, rows)
        ours.step()
        torch.testing.assert_close(parameter.detach(), expected, rtol=2e-2, atol=2e-3)  # both iterate in bf16


def test_newton_schulz_brings_all_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((16, 24), (24, 16), (3, 8, 20)):
        values = torch.linalg.svdvals(newton_schulz(torch.randn(shape), 5))
        assert values.min() > 0.6 and values.max() < 1.3


def test_what_is_no_matrix_goes_to_adamw_and_experts_to_muon():
    mamba = create_model(MambaConfig(d_model=24, n_layer=2, vocab_size=53, seq_len=40))
    names = {id(p): name for name, p in mamba.named_parameters()}
    muon, adamw = build_optimizers(mamba, OptimizerConfig(optimizer="muon", wd=0.3), 1e-3)
    decay_of = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decay_of["backbone.layers.0.mixer.A_log"] == 0.0
    assert not any(
        name.endswith(("A_log", "conv1d.weight")) for name in (names[id(p)] for p in muon.param_groups[0]["params"])
    )
    model = create_model(ModelConfig(**SIZES, **EXPERTS))
    names = {id(p): name for name, p in model.named_parameters()}
    muon, _ = build_optimizers(model, OptimizerConfig(optimizer="muon"), 1e-3)
    held = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert {"layers.0.feed_forward.experts.w12", "layers.0.feed_forward.experts.w3"} <= held


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(**SIZES),
        ModelConfig(**SIZES, **EXPERTS),
        MambaConfig(d_model=24, n_layer=1, vocab_size=53, seq_len=40),
    ],
)
def test_the_rows_of_fused_parameters_add_up(config):
    model = create_model(config)
    rows = {key: packing.rows for key, packing in packings(model).items()}
    assert rows
    for parameter in model.parameters():
        assert sum(rows.get(id(parameter), parameter.shape[-2:-1] or (0,))) == (
            parameter.shape[-2] if parameter.ndim > 1 else 0
        )


def _three_steps(world, sizes, fsdp):
    torch.manual_seed(0)
    model = wrap(create_model(ModelConfig(**sizes)), world, ParallelConfig(device="cpu", precision="fp32", fsdp=fsdp))
    optimizers = build_optimizers(model, FP32, 0.02)
    for step in range(3):
        for number, p in enumerate(model.parameters()):
            whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
            if fsdp:
                from torch.distributed.tensor import distribute_tensor

                whole = distribute_tensor(whole, p.device_mesh, p.placements)
            p.grad = whole
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.full_tensor() if fsdp else p.detach() for name, p in model.named_parameters()}


def _on_ranks(world, path, sizes):
    weights = _three_steps(world, sizes, True)
    if world.is_master:
        torch.save({name: w.detach() for name, w in weights.items()}, path)


@pytest.mark.parametrize("experts", [{}, EXPERTS])
def test_one_rank_and_two_fsdp_ranks_agree_to_1e_5_with_few_collectives(tmp_path, experts):
    sizes = SIZES | experts
    run_ranks(_on_ranks, 2, tmp_path / "two.pt", sizes)
    alone, two = _three_steps(World(), sizes, False), torch.load(tmp_path / "two.pt")
    for name, weight in alone.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)


def _replicas(world, path, sizes):
    computed, real = [], Muon._one
    Muon._one = lambda self, matrix, steps: (computed.append(matrix.numel()), real(self, matrix, steps))[1]
    weights = _three_steps(world, sizes, False)
    torch.save(
        ({name.removeprefix("module."): w for name, w in weights.items()}, sum(computed)), f"{path}/{world.rank}"
    )


@pytest.mark.parametrize("experts", [{}, EXPERTS])
def test_ddp_ranks_divide_the_matrices_and_have_the_weights_of_one(tmp_path, experts):
    sizes = SIZES | experts
    run_ranks(_replicas, 2, tmp_path, sizes)
    alone = _three_steps(World(), sizes, False)
    (first, its_work), (second, others_work) = (torch.load(tmp_path / f"{rank}") for rank in (0, 1))
    assert first.keys() == second.keys() == alone.keys()
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-5)
    assert 0.75 < its_work / others_work < 1.34


def _counted(world):
    calls = []
    for name in ("_all_gather", "_reduce_scatter"):
        real = getattr(muon, name)
        setattr(muon, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    _three_steps(world, SIZES, True)
    assert calls.count("_all_gather") == calls.count("_reduce_scatter") == 3  # once a step


def test_all_matrices_are_gathered_and_given_back_in_two_collectives():
    run_ranks(_counted, 2)


def test_the_ranks_get_like_amounts_of_work():
    assert muon.rank_of_each([5, 9, 4, 1], 2) == [1, 0, 1, 0]
    assert muon.rank_of_each([3, 3, 3], 4) == [0, 1, 2]


def _adafactor(world):
    model = wrap(create_model(ModelConfig(**SIZES)), world, ParallelConfig(device="cpu", precision="fp32", fsdp=True))
    with pytest.raises(ConfigError, match="--fsdp"):
        build_optimizers(model, OptimizerConfig(optimizer="adafactor"), 0.02)


def test_adafactor_under_fsdp_is_refused():
    run_ranks(_adafactor, 2)


def test_options_of_other_optimizers_are_ignored_with_a_warning(caplog):
    OptimizerConfig(optimizer="lion", eps=1e-6, muon_momentum=0.9)
    assert "--eps is ignored" in caplog.text and "--muon-momentum is ignored" in caplog.text
    caplog.clear()
    OptimizerConfig(optimizer="adafactor", beta2=0.99)
    assert "--beta2 is ignored" in caplog.text
    caplog.clear()
    OptimizerConfig(optimizer="muon", eps=1e-6, muon_momentum=0.9)
    assert not caplog.text
