"""A mixture of experts: who goes where, what is dropped, what is balanced, and that it learns."""

import math

import pytest
import torch

from open_lm.errors import ConfigError
from open_lm.model import create_model
from open_lm.model.config import ModelConfig, ModelFlags, resolve_architecture
from open_lm.model.describe import model_size
from open_lm.model.moe import MixtureOfExperts

BASE = {"hidden_dim": 16, "n_layers": 4, "n_heads": 2, "seq_len": 32, "vocab_size": 29, "ffn_dim": 24}


def config(**changes):
    return ModelConfig(**{**BASE, "moe_freq": 2, "moe_num_experts": 4, **changes})


def layer(seed=0, **changes):
    torch.manual_seed(seed)
    moe = MixtureOfExperts(config(**changes), 0)
    moe.reset_parameters()
    moe.experts.reset_parameters()
    return moe


def reference(moe, x, ffn_type, allowed=None):
    """Token by token in fp64; `allowed` is the set of (token, expert) that are not dropped."""
    w = {name: p.detach().double() for name, p in moe.named_parameters()}
    out = torch.zeros_like(x, dtype=torch.float64)
    for n, token in enumerate(x.double()):
        scores = w["router.weight"] @ token
        probs = scores.exp() / scores.exp().sum()
        for e in probs.argsort(descending=True)[: moe.top_k].tolist():
            if allowed is not None and (n, e) not in allowed:
                continue
            hidden = w["experts.w12"][e] @ token
            if ffn_type == "gelu":
                hidden = hidden * 0.5 * (1 + torch.special.erf(hidden / math.sqrt(2)))
            else:
                gate, value = hidden.chunk(2)
                sigmoid = 1 / (1 + (-gate).exp())
                gelu = gate * 0.5 * (1 + torch.special.erf(gate / math.sqrt(2)))
                hidden = (gelu if ffn_type == "gemma_geglu" else gate * sigmoid) * value
            out[n] += probs[e] * (w["experts.w3"][e] @ hidden)
    return out


@pytest.mark.parametrize("ffn_type", ["swiglu", "gelu", "gemma_geglu"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_each_token_goes_through_its_likeliest_experts(ffn_type, top_k):
    moe = layer(ffn_type=ffn_type, moe_top_k=top_k, moe_capacity_factor=0.0)
    x = torch.randn(3, 7, 16)
    out, routing = moe(x)
    expected = reference(moe, x.flatten(0, 1), ffn_type).view_as(out)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    assert routing.n_dropped == 0
    assert routing.load.sum() == pytest.approx(1)


def test_enough_capacity_is_the_same_as_none_in_values_and_gradients():
    x = torch.randn(2, 9, 16)
    grads = []
    for factor in (0.0, 4.0):
        moe = layer(moe_capacity_factor=factor)
        out, routing = moe(x)
        assert routing.n_dropped == 0
        out.square().sum().backward()
        grads.append([out.detach(), *(p.grad for p in moe.parameters())])
    for dropless, limited in zip(*grads, strict=True):
        torch.testing.assert_close(dropless, limited, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("factor", "places"), [(0.5, 3), (0.4, 3), (1 / 3, 2)])
def test_a_full_expert_drops_who_comes_last_and_second_choices_first(factor, places):
    """12 tokens x 2 choices / 4 experts is an even share of 6; places are rounded up."""
    moe = layer(moe_capacity_factor=factor)
    x = torch.randn(1, 12, 16)
    out, routing = moe(x)
    probs = (x[0] @ moe.router.weight.T).softmax(-1)
    choices = probs.argsort(-1, descending=True)[:, :2]
    taken, allowed = [0] * 4, set()
    for rank in (0, 1):
        for n in range(12):
            expert = choices[n, rank].item()
            if taken[expert] < places:
                taken[expert] += 1
                allowed.add((n, expert))
    assert routing.n_dropped == 24 - len(allowed) > 0
    torch.testing.assert_close(out[0].double(), reference(moe, x[0], "swiglu", allowed), atol=1e-5, rtol=1e-5)


def test_nothing_is_dropped_in_eval_mode():
    moe = layer(moe_capacity_factor=0.5).eval()
    x = torch.randn(1, 12, 16)
    torch.testing.assert_close(moe(x)[0][0].double(), reference(moe, x[0], "swiglu"), atol=1e-5, rtol=1e-5)


def test_the_balance_loss_is_one_when_even_and_the_number_of_experts_when_all_go_to_one():
    moe = layer(moe_top_k=1)
    with torch.no_grad():
        moe.router.weight.zero_()
        assert moe(torch.randn(1, 8, 16))[1].balance_loss.item() == pytest.approx(1)
        moe.router.weight[2] = 50.0
        routing = moe(torch.ones(1, 8, 16))[1]
    assert routing.balance_loss.item() == pytest.approx(4)
    assert routing.load.tolist() == [0, 0, 1, 0]


def test_every_moe_freq_th_block_has_experts_and_the_head_gets_their_routing():
    model = create_model(config())
    assert [n for n, block in enumerate(model.layers) if isinstance(block.feed_forward, MixtureOfExperts)] == [0, 2]
    ids = torch.randint(0, 29, (2, 12))
    logits = model(ids)[0]
    hidden, routing = model(ids, head=lambda hidden, weight, routing: (hidden @ weight.T, routing))
    torch.testing.assert_close(hidden, logits)
    assert routing.load.shape == (2, 4) and routing.balance_loss.requires_grad
    routing.balance_loss.backward()
    assert all(block.feed_forward.router.weight.grad.abs().sum() > 0 for block in (model.layers[0], model.layers[2]))
    model.eval()(ids, head=lambda hidden, weight: None)  # whoever only reads a model need not know of experts


def test_decoding_with_a_cache_gives_the_same_logits():
    model = create_model(config()).eval()
    ids = torch.randint(0, 29, (2, 12))
    with torch.no_grad():
        cache = model.new_cache(2, 12)
        pieces = [model(ids[:, s], cache)[0] for s in (slice(0, 7), slice(7, 8), slice(8, 12))]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 1.25])
def test_it_learns_and_balancing_spreads_the_load(factor):
    torch.manual_seed(0)
    model = create_model(config(moe_capacity_factor=factor, n_layers=2))
    with torch.no_grad():  # almost everything starts at expert 0
        model.layers[0].feed_forward.router.weight.mul_(0.1)[0] += 0.3 * model.tok_embeddings.weight.mean(0).sign()
    ids = torch.randint(0, 29, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):

        def head(hidden, weight, routing):
            cross_entropy = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), ids[:, 1:].flatten())
            return cross_entropy, routing.balance_loss

        cross_entropy, balance = model(ids[:, :-1], head=head)
        (cross_entropy + 0.1 * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((cross_entropy.item(), balance.item()))
    assert losses[-1][0] < 0.3 * losses[0][0]
    assert losses[-1][1] < 1.2


def test_bf16_autocast_and_recomputation_give_the_same_gradients_as_without():
    from torch.utils.checkpoint import checkpoint

    moe = layer()
    x = torch.randn(2, 9, 16)

    def grads(run):
        moe.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out, routing = run(x)
        assert routing.balance_loss.dtype == torch.float32
        (out.float().square().sum() + routing.balance_loss).backward()
        return [p.grad.clone() for p in moe.parameters()]

    plain = grads(moe)
    for a, b in zip(plain, grads(lambda x: checkpoint(moe, x, use_reentrant=False)), strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_experts_a_token_takes_count_as_compute():
    dense, sparse = model_size(config(moe_freq=0)), model_size(config(moe_freq=1, moe_top_k=2))
    ffn = 3 * 16 * 24
    assert sparse.parameters - dense.parameters == 4 * (3 * ffn + 4 * 16)
    assert sparse.flops_per_token - dense.flops_per_token == 6 * 4 * (ffn + 4 * 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_num_experts": None}, "found --moe-num-experts None"),
        ({"moe_num_experts": 1}, "--moe-top-k 2"),
        ({"moe_freq": -1}, "moe_freq"),
        ({"moe_capacity_factor": -1.0}, "moe_capacity_factor"),
        ({"moe_freq": 1.5}, "moe_freq"),
    ],
)
def test_experts_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_the_flags_make_experts():
    flags = ModelFlags(model="open_lm_test_tiny", moe_freq=1, moe_num_experts=8, moe_top_k=3)
    assert resolve_architecture(flags).moe_top_k == 3
    assert isinstance(create_model(flags).layers[1].feed_forward, MixtureOfExperts)


def test_parallel_flags_of_openlm_are_accepted_with_a_warning(caplog):
    ModelFlags(model="open_lm_test_tiny", moe_weight_parallelism=True)
    assert "--moe-weight-parallelism is ignored: --fsdp spreads" in caplog.text
