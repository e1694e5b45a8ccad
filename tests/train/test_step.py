"""One optimizer step against a hand-written reference in fp64, and what must not change it."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from open_lm.data.batch import IGNORED, Batch
from open_lm.errors import ConfigError
from open_lm.train.activation_checkpointing import recompute_in_backward
from open_lm.train.optim import decays
from open_lm.train.step import train_step, with_last
from open_lm.train.tasks import Losses, NextToken, Task
from open_lm.train.timing import Timing

sys.path.insert(0, str(Path(__file__).parent))
import reference

CPU = torch.device("cpu")


def step(state, batch, accum=1, clip=None):
    return train_step(state, batch, accum=accum, clip=clip, timing=Timing(CPU))


def gradients_of(state, batch, accum=1):
    """The gradients a step would use: taken where the step clips them."""
    kept = {}
    state.optimizers[0].step = lambda: kept.update({n: p.grad.clone() for n, p in state.model.named_parameters()})
    report = step(state, batch, accum)
    return report, kept


@pytest.mark.parametrize("accum", [1, 2, 4])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_and_gradients_equal_a_hand_written_reference(tiny, accum, z_loss):
    make_state, make_batch, config = tiny
    state, batch = make_state(z_loss=z_loss, dtype=torch.float64), make_batch()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in state.model.named_parameters()}
    expected = reference.loss(parameters, batch.inputs_BT, batch.targets_BT, config.n_layers, config.n_heads, z_loss)
    gradients = dict(zip(parameters, torch.autograd.grad(expected, parameters.values()), strict=True))
    report, got = gradients_of(state, batch, accum)
    assert report.parts[0] + z_loss * report.parts[1] == pytest.approx(expected.item(), abs=2e-6)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_accumulation_does_not_change_the_loss_curve(tiny):
    make_state, make_batch, _ = tiny
    curves = []
    for accum in (1, 2, 4):
        state = make_state()
        curves.append([step(state, make_batch(k), accum).loss.item() for k in range(10)])
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[2] == pytest.approx(curves[0], abs=1e-5)


class MeanOfPairs(Task):
    """A task that counts pairs: the squared difference of the first logits of both rows."""

    names = ("loss",)

    def count(self, batch):
        return torch.tensor(len(batch) // 2)

    def prepare(self, state, batch, accum):
        self.prepared = (len(batch), accum)
        return replace(batch, extras={"weight": torch.arange(len(batch)) // 2 + 1.0})

    def loss_sums(self, model, batch):
        assert batch.group == 2 and len(batch) % 2 == 0
        first = model(batch.inputs_BT)[0][:, 0, 0].view(-1, 2)
        total = (batch.extras["weight"].view(-1, 2)[:, 0] * (first[:, 0] - first[:, 1]) ** 2).sum()
        return Losses(total, total.detach()[None])


@pytest.mark.parametrize("accum", [1, 2, 4])
def test_a_task_says_what_its_loss_is_a_mean_of(tiny, accum):
    make_state, make_batch, _ = tiny
    state = make_state(dtype=torch.float64)
    state.task = MeanOfPairs()
    batch = replace(make_batch(), group=2)
    first = state.model(batch.inputs_BT)[0][:, 0, 0].view(-1, 2)
    expected = (torch.arange(1, 5) * (first[:, 0] - first[:, 1]) ** 2).sum() / 4
    gradients = dict(zip(
        dict(state.model.named_parameters()),
        torch.autograd.grad(expected, list(state.model.parameters()), allow_unused=True), strict=True,
    ))  # fmt: skip
    report, got = gradients_of(state, batch, accum)
    assert state.task.prepared == (8, accum)
    assert report.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-6, atol=1e-12)


def test_a_micro_batch_never_parts_a_pair():
    batch = Batch(torch.arange(12).view(6, 2), torch.arange(12).view(6, 2), group=2, extras={"row": torch.arange(6)})
    parts = list(batch.split(3))
    assert [part.extras["row"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert {part.group for part in parts} == {2}
    with pytest.raises(AssertionError):
        next(batch.split(6))


def test_recomputing_activations_does_not_change_the_gradients(tiny):
    make_state, make_batch, _ = tiny
    plain, recomputed = make_state(), make_state()
    for block in recomputed.model.layers:
        recompute_in_backward(block)
    _, expected = gradients_of(plain, make_batch())
    _, got = gradients_of(recomputed, make_batch())
    torch.testing.assert_close(got, expected)


def test_clipping_scales_the_gradients_down_to_the_limit(tiny):
    make_state, make_batch, _ = tiny
    state = make_state()
    seen = []
    state.optimizers[0].step = lambda: seen.extend(p.grad.clone() for p in state.model.parameters())
    report = step(state, make_batch(), clip=0.1)
    assert report.grad_norm > 0.1
    assert torch.stack([g.norm() for g in seen]).norm().item() == pytest.approx(0.1, rel=1e-3)


def test_a_batch_without_any_target_changes_no_gradient(tiny):
    make_state, make_batch, _ = tiny
    batch = make_batch()
    empty = Batch(batch.inputs_BT, torch.full_like(batch.targets_BT, -100))
    report, got = gradients_of(make_state(), empty)
    assert report.loss == 0
    assert all(not g.any() for g in got.values())


@pytest.mark.parametrize("precision", ["fp32", "amp", "amp_bf16", "bf16", "fp16"])
def test_every_precision_learns_a_batch_by_heart(tiny, precision):
    make_state, make_batch, _ = tiny
    state = make_state(precision)
    state.model.to(state.precision.weight_dtype)
    losses = [step(state, make_batch(), clip=1.0).loss.item() for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
    weights = {p.dtype for p in state.model.parameters()}
    assert weights == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_bf16_means_bf16_everywhere(tiny):
    make_state, make_batch, _ = tiny
    state = make_state("bf16")
    state.model.to(torch.bfloat16)
    seen = set()
    state.model.layers[0].attention.in_proj.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    step(state, make_batch())
    assert seen == {torch.bfloat16}
    assert {s["exp_avg"].dtype for s in state.optimizers[0].state.values()} == {torch.bfloat16}


def test_weight_decay_acts_on_matrices_only(tiny):
    make_state, _, _ = tiny
    state = make_state()
    names = {id(p): n for n, p in state.model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in state.optimizers[0].param_groups)
    assert (
        state.optimizers[0].param_groups[0]["weight_decay"] > 0 == state.optimizers[0].param_groups[1]["weight_decay"]
    )
    assert all("norm" in name or "embeddings" in name for name in kept)
    assert "output.weight" in decayed and "tok_embeddings.weight" in kept
    assert decayed | kept == set(names.values())
    assert not decays("layers.0.bias", torch.nn.Parameter(torch.zeros(3)))


def test_one_adamw_step_equals_the_formula(tiny):
    make_state, make_batch, _ = tiny
    state = make_state(dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    got = {}
    original = state.optimizers[0].step

    def spy():
        got.update({n: p.grad.clone() for n, p in state.model.named_parameters()})
        original()

    state.optimizers[0].step = spy
    step(state, make_batch())
    for name, parameter in state.model.named_parameters():
        decay = 0.2 if decays(name, parameter) else 0.0
        g = got[name]  # at step 1 both bias-corrected moments are the gradient and its square
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)


def test_two_adamw_steps_equal_torchs_with_the_flags_betas(tiny):
    """Two: after one, both corrected moments are the gradient's, whatever the betas."""
    make_state, make_batch, _ = tiny
    state = make_state(dtype=torch.float64)
    names = dict(state.model.named_parameters())
    plain = {name: torch.nn.Parameter(p.detach().clone()) for name, p in names.items()}
    groups = [
        {"params": [p for n, p in plain.items() if decays(n, p) == is_decayed], "weight_decay": 0.2 * is_decayed}
        for is_decayed in (True, False)
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    ours = state.optimizers[0].step

    def both():
        for name, parameter in names.items():
            plain[name].grad = parameter.grad.clone()
        ours()
        theirs.step()

    state.optimizers[0].step = both
    for k in range(2):
        step(state, make_batch(k))
    for name, parameter in names.items():
        torch.testing.assert_close(parameter.detach(), plain[name].detach(), rtol=1e-9, atol=1e-12)


def test_the_balance_loss_keeps_its_weight_whatever_the_number_of_targets():
    """The step divides the total by the number of targets."""
    hidden_ND, weight_VD = torch.randn(8, 4), torch.randn(6, 4)
    routing = SimpleNamespace(balance_loss=torch.tensor(1.5), n_dropped=torch.tensor(0), load=torch.ones(2, 2) / 2)
    for n_left_out in (0, 5):
        targets_BT = torch.arange(8).remainder(6)[None].clone()
        targets_BT[:, :n_left_out] = IGNORED
        batch = Batch(torch.zeros(1, 8, dtype=torch.long), targets_BT)
        plain = NextToken()._losses(batch, hidden_ND, weight_VD).total
        total = NextToken(balance_loss=0.1, n_experts=2)._losses(batch, hidden_ND, weight_VD, routing).total
        assert ((total - plain) / batch.n_targets).item() == pytest.approx(0.1 * 1.5, rel=1e-4)


def test_with_last_marks_only_the_last():
    assert list(with_last("abc")) == [("a", False), ("b", False), ("c", True)]


def test_a_scheduler_that_would_rise_is_refused():
    from open_lm.train.config import ScheduleConfig

    with pytest.raises(ConfigError, match="--lr-cooldown-end"):
        ScheduleConfig(lr=1e-4, lr_cooldown_end=1e-3)


def test_a_model_with_experts_trains_on_both_losses(tmp_path):
    import json

    from runs import metrics, run, write_data

    architecture = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 16, "vocab_size": 16}
    experts = {"moe_freq": 2, "moe_num_experts": 4, "moe_top_k": 2}
    (tmp_path / "moe.json").write_text(json.dumps(architecture | experts))
    run(tmp_path, write_data(tmp_path / "data"), "--model", str(tmp_path / "moe.json"), "--moe-loss-weight", "0.5")
    losses, balance = metrics(tmp_path), metrics(tmp_path, key="train/load_balancing_loss")
    assert losses[12] < losses[1] - 0.1
    assert all(value >= 0.99 for value in balance.values())  # 1 is the least: equal shares
    assert all(0.25 <= value <= 1 for value in metrics(tmp_path, key="train/expert_load_max").values())
    loads = [metrics(tmp_path, key=f"train/expert_load_{expert}") for expert in range(4)]
    assert all(sum(load[step] for load in loads) == pytest.approx(1, abs=1e-5) for step in losses)
    assert metrics(tmp_path, key="train/tokens_dropped")[1] > 0
