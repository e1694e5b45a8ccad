"""Every optimizer learns, updates as its paper says, and survives a restart."""

import pytest
import torch
from runs import folder_of, metrics, run, weights, write_data

from open_lm.errors import ConfigError
from open_lm.train.config import OPTIMIZERS, OptimizerConfig
from open_lm.train.optim import Lion, decays
from open_lm.train.step import train_step
from open_lm.train.timing import Timing


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_a_batch_by_heart(tiny, name):
    make_state, make_batch, _ = tiny
    state = make_state(optimizer=name)
    timing = Timing(torch.device("cpu"))
    losses = [train_step(state, make_batch(), accum=1, clip=1.0, timing=timing).loss.item() for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_has_exactly_one_optimizer(tiny, name):
    make_state, _, _ = tiny
    state = make_state(optimizer=name)
    held = [id(p) for optimizer in state.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in state.model.parameters())


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tiny):
    make_state, _, _ = tiny
    state = make_state(optimizer="muon")
    names = {id(p): name for name, p in state.model.named_parameters()}
    muon, adamw = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in state.optimizers)
    assert all(name.startswith("layers.") and "norm" not in name for name in muon)
    assert {"tok_embeddings.weight", "output.weight", "norm.weight"} <= adamw


def test_lion_follows_the_hand_worked_table():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    lion = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    momentum = torch.zeros(2)
    expected = p.detach().clone()
    for gradient in ([1.0, -3.0], [-0.05, 1.0], [0.0, 0.0]):
        p.grad = torch.tensor(gradient)
        lion.step()
        direction = (0.9 * momentum + 0.1 * p.grad).sign()
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * direction
        momentum = 0.99 * momentum + 0.01 * p.grad
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_a_resumed_run_is_the_same_run_with_every_optimizer(tmp_path, name):
    manifest = write_data(tmp_path / "data")
    extra = ["--num-checkpoints", "2", "--optimizer", name]
    run(tmp_path, manifest, *extra, name="straight")
    run(tmp_path, manifest, *extra, name="broken")
    (folder_of(tmp_path, "broken") / "checkpoints" / "epoch_2.commit.json").unlink()
    run(tmp_path, manifest, *extra, "--resume", "latest", name="broken")
    assert metrics(tmp_path, "broken") == metrics(tmp_path, "straight")
    torch.testing.assert_close(weights(tmp_path, "broken", "2"), weights(tmp_path, "straight", "2"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("matrices", {"tok_embeddings.weight", "norm.weight", "layers.0.attention_norm.weight"}),
        ("all-but-embedding", {"tok_embeddings.weight"}),
        ("all", set()),
    ],
)
def test_a_decay_rule_says_what_weight_decay_spares(tiny, rule, kept):
    make_state, _, _ = tiny
    named = dict(make_state().model.named_parameters())
    spared = {name for name, p in named.items() if not decays(name, p, rule)}
    assert kept <= spared
    assert "output.weight" not in spared
    assert spared == kept if rule != "matrices" else all(named[n].ndim < 2 or "embedding" in n for n in spared)


def test_wd_all_contradicts_a_narrower_rule():
    with pytest.raises(ConfigError, match="--wd-all"):
        OptimizerConfig(wd_all=True, wd_rule="all-but-embedding")
