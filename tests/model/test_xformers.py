"""The xformers back end calls xformers as its documentation says, and torch wherever xformers does not run."""

import sys
import types

import pytest
import torch

from open_lm.errors import ConfigError
from open_lm.model import create_model
from open_lm.model.config import ModelConfig

CONFIG = {"hidden_dim": 24, "n_layers": 2, "n_heads": 4, "seq_len": 16, "vocab_size": 31}
IDS = torch.randint(0, 31, (2, 11), generator=torch.Generator().manual_seed(0))


class LowerTriangularMask:
    pass


def memory_efficient_attention(query, key, value, attn_bias=None):
    """As xformers documents it: (batch, positions, heads, width); softmax(q k' / sqrt(width) + bias) v."""
    scores = torch.einsum("bthk,bshk->bhts", query, key) / query.shape[-1] ** 0.5
    if isinstance(attn_bias, LowerTriangularMask):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    calls.append(query.shape[1])
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), value)


calls: list[int] = []


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in for the package; the real one has no kernels for the CPU."""
    ops = types.SimpleNamespace(
        memory_efficient_attention=memory_efficient_attention, LowerTriangularMask=LowerTriangularMask
    )
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    calls.clear()


def pair(name, **changes):
    torch.manual_seed(0)
    expected = create_model(ModelConfig(**CONFIG, **changes)).eval()
    model = create_model(ModelConfig(**CONFIG, **changes, attn_name=name)).eval()
    model.load_state_dict(expected.state_dict())
    return model, expected


@pytest.mark.parametrize("name", ["xformers_attn", "xformers_attn_variable_length"])
def test_it_equals_the_torch_path(xformers, monkeypatch, name):
    monkeypatch.setattr("open_lm.model.attention_xformers.runs_for", lambda q, k, mask: q.shape[1] in (1, k.shape[1]))
    model, expected = pair(name)
    torch.testing.assert_close(model(IDS)[0], expected(IDS)[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        cache = model.new_cache(2, 11)
        model(IDS[:, :10], cache)
        last = model(IDS[:, 10:], cache)[0]
    torch.testing.assert_close(last[:, 0], expected(IDS)[0][:, 10], atol=1e-5, rtol=1e-5)
    assert calls == [11, 11, 10, 10, 1, 1]


def test_on_the_cpu_torch_computes_it(xformers):
    model, expected = pair("xformers_attn", n_kv_heads=2)
    assert torch.equal(model(IDS)[0], expected(IDS)[0])
    assert calls == []


def test_where_xformers_has_no_kernel_torch_computes_it_and_it_is_said_once(xformers, monkeypatch, caplog):
    """As the real package does beside a torch it was not built for."""

    def no_kernel(query, key, value, attn_bias=None):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n ...")

    monkeypatch.setattr(sys.modules["xformers"].ops, "memory_efficient_attention", no_kernel)
    monkeypatch.setattr("open_lm.model.attention_xformers.runs_for", lambda q, k, mask: True)
    model, expected = pair("xformers_attn")
    assert torch.equal(model(IDS)[0], expected(IDS)[0])
    assert caplog.text.count("xformers has no kernel here (No operator found") == 1


def test_the_real_package_is_called_as_it_wants_to_be(monkeypatch):
    ops = pytest.importorskip("xformers.ops", reason="xformers is not installed")
    seen = []

    def materialized(query, key, value, attn_bias=None):
        bias = 0 if attn_bias is None else attn_bias.materialize((query.shape[1], key.shape[1]))
        seen.append(type(attn_bias).__name__)
        scores = torch.einsum("bthk,bshk->bhts", query, key) / query.shape[-1] ** 0.5 + bias
        return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), value)

    monkeypatch.setattr("open_lm.model.attention_xformers.runs_for", lambda q, k, mask: True)
    model, expected = pair("xformers_attn")
    assert torch.equal(model(IDS)[0], expected(IDS)[0])  # no kernel for a CPU: torch's
    monkeypatch.setattr(ops, "memory_efficient_attention", materialized)
    torch.testing.assert_close(model(IDS)[0], expected(IDS)[0], atol=1e-5, rtol=1e-5)
    assert seen == ["LowerTriangularMask"] * 2


def test_without_xformers_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ConfigError, match=r"--attn-name xformers_attn needs xformers.*pip install xformers"):
        pair("xformers_attn")
