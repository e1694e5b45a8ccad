"""Mamba computes what transformers' Mamba and a plain recurrence compute, whole, cached and padded, and it learns."""

import sys
import types

import pytest
import torch

from open_lm.model import create_model
from open_lm.model import selective_scan as scan
from open_lm.model.architecture import MambaConfig
from open_lm.model.selective_scan import CHUNK, selective_scan
from open_lm.train.optim import decays

CONFIG = MambaConfig(d_model=24, n_layer=2, vocab_size=37, seq_len=64)


def build(seed=0, **changes):
    torch.manual_seed(seed)
    model = create_model(MambaConfig(**{**CONFIG.to_dict(), **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("D"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_weight_decay_spares_the_logarithms_of_a():
    named = dict(build().named_parameters())
    logarithms = [name for name in named if name.endswith("A_log")]
    assert len(logarithms) == 2 and not any(decays(name, named[name]) for name in logarithms)


@pytest.mark.parametrize("length", [1, 5, CHUNK, 2 * CHUNK + 3])
def test_the_scan_is_the_recurrence(length):
    torch.manual_seed(0)
    tensors = [
        torch.randn(2, length, 6),
        torch.rand(2, length, 6),
        -torch.rand(6, 3),
        *torch.randn(2, 2, length, 3).unbind(0),
    ]
    start = torch.randn(2, 6, 3)
    x, step, a, b, c = (t.double().requires_grad_() for t in tensors)
    h, ys = start.double(), []
    for t in range(length):
        h = torch.exp(step[:, t, :, None] * a) * h + (step[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        ys.append((h * c[:, t, None, :]).sum(-1))
    inputs = [t.requires_grad_() for t in tensors]
    y, end = selective_scan(*inputs, start)
    torch.testing.assert_close(y.double(), torch.stack(ys, 1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(end.double(), h, atol=1e-4, rtol=1e-5)
    torch.stack(ys, 1).square().sum().backward()
    y.square().sum().backward()
    for ours, exact in zip(inputs, (x, step, a, b, c), strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, atol=1e-2, rtol=1e-3)


calls: list[tuple[int, ...]] = []


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """A stand-in for mamba-ssm, as documented: u and delta (batch, channels, time), B and C (batch, state, time)."""
    assert D is None and z is None and delta_bias is None and not delta_softplus and return_last_state
    calls.append(tuple(u.shape))
    state, ys = torch.zeros(len(u), *A.shape), []
    for t in range(u.shape[2]):
        added = torch.einsum("bd,bn,bd->bdn", delta[:, :, t], B[:, :, t], u[:, :, t])
        state = torch.exp(torch.einsum("bd,dn->bdn", delta[:, :, t], A)) * state + added
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return torch.stack(ys, dim=2), state


@pytest.fixture
def mamba_ssm(monkeypatch):
    """A stand-in for the package, which builds with nvcc alone."""
    interface = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    scan.mamba_ssm_scan.cache_clear()
    calls.clear()
    yield
    scan.mamba_ssm_scan.cache_clear()


@pytest.mark.usefixtures("mamba_ssm")
def test_where_mamba_ssm_runs_it_gets_whole_sequences_and_gives_the_same(monkeypatch):
    model, ids = build(), torch.randint(0, 37, (2, CHUNK + 7))
    expected = model(ids)[0]
    expected.square().mean().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    assert calls == []  # on a CPU torch computes
    monkeypatch.setattr(scan, "kernel_runs_for", lambda x: True)
    model.zero_grad()
    found = model(ids)[0]
    found.square().mean().backward()
    assert calls == [(2, 48, CHUNK + 7)] * 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        cache = model.new_cache(2, 64)
        last = [model(ids[:, start:end], cache)[0][:, -1] for start, end in ((0, 30), (30, 31), (31, CHUNK + 7))][-1]
    assert len(calls) == 4  # only from the beginning: it takes no state
    torch.testing.assert_close(last, expected[:, -1], atol=1e-5, rtol=1e-4)


def test_without_mamba_ssm_there_is_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    scan.mamba_ssm_scan.cache_clear()
    assert scan.mamba_ssm_scan() is None
    scan.mamba_ssm_scan.cache_clear()


def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = build()
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=37, hidden_size=24, num_hidden_layers=2, state_size=16)
    ).eval()
    renamed = {name.replace("embedding.", "embeddings."): tensor for name, tensor in model.state_dict().items()}
    theirs.load_state_dict(renamed)
    ids = torch.randint(0, 37, (2, CHUNK + 7))
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], theirs(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_decoding_with_a_cache_gives_the_same_logits():
    model = build()
    ids = torch.randint(0, 37, (2, 45))
    with torch.no_grad():
        past, pieces = None, []
        for start, stop in ((0, 38), (38, 39), (39, 44), (44, 45)):
            logits, _, past = model(ids[:, start:stop], past, use_cache=True)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids)[0], atol=1e-5, rtol=1e-5)
        assert past.length == 45
        past.reorder(torch.tensor([1, 1]))
        after = torch.cat((ids[[1, 1]], torch.tensor([[3], [4]])), 1)
        torch.testing.assert_close(model(after[:, 45:], past)[0][:, -1], model(after)[0][:, -1], atol=1e-5, rtol=1e-5)


def test_padding_on_the_left_changes_nothing():
    model = build()
    ids = torch.randint(0, 37, (1, 9))
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), ids), 1)
    mask = (torch.arange(15) >= 6)[None]
    with torch.no_grad():
        whole = model(padded, attention_mask_BT=mask)[0][:, 6:]
        cache = model.new_cache(1, 15)
        model(padded[:, :12], cache, attention_mask_BT=mask[:, :12])
        last = model(padded[:, 12:], cache, attention_mask_BT=mask)[0]
        torch.testing.assert_close(whole, model(ids)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last, whole[:, 6:], atol=1e-5, rtol=1e-5)


def test_weights_begin_as_the_paper_says():
    model = create_model(CONFIG)
    mixer = model.layers[1].mixer
    assert model.lm_head.weight is model.backbone.embedding.weight
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(48, 16))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert steps.min() * 1.0001 >= 1e-3 and steps.max() <= 0.1001
    assert torch.equal(mixer.D, torch.ones(48))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_it_learns(precision):
    torch.manual_seed(0)
    model = create_model(CONFIG)
    ids = torch.randint(0, 37, (4, 2 * CHUNK + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(ids[:, :-1], head=lambda hidden, weight: hidden @ weight.T)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_its_config_offers_what_training_reads_of_any_config():
    sizes = (CONFIG.hidden_dim, CONFIG.n_layers, CONFIG.vocab_size, CONFIG.seq_len, CONFIG.moe_loss_weight)
    assert sizes == (24, 2, 37, 64, 0.0)
    assert not CONFIG.has_experts(0)
