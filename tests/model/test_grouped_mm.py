"""The products of experts are the same through every back end, and a back end that is missing names its package."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from open_lm.errors import ConfigError
from open_lm.model import create_model, grouped_mm
from open_lm.model.config import ModelConfig
from open_lm.model.grouped_mm import Loads, one_by_one, torch_kernel

CONFIG = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": 12, "vocab_size": 19, "moe_freq": 1,
          "moe_num_experts": 4, "moe_capacity_factor": 0.0}  # fmt: skip
COUNTS = torch.tensor([3, 0, 4, 5])


def operands(dtype):
    torch.manual_seed(0)
    return torch.randn(12, 16, dtype=dtype, requires_grad=True), torch.randn(4, 24, 16, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
def test_torchs_kernel_computes_what_the_loop_does_in_values_and_gradients(dtype):
    found = []
    for product in (one_by_one, torch_kernel):
        x, weights = operands(dtype)
        out = product(x, weights, Loads(COUNTS))
        out.float().square().sum().backward()
        found.append((out.detach(), x.grad, weights.grad))
    for loop, kernel in zip(*found, strict=True):
        torch.testing.assert_close(
            loop.float(), kernel.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0.1
        )


def test_the_loop_is_a_product_for_each_row():
    x, weights = operands(torch.float32)
    experts = [0] * 3 + [2] * 4 + [3] * 5
    expected = torch.stack([weights[e].double() @ row.double() for e, row in zip(experts, x, strict=True)])
    torch.testing.assert_close(one_by_one(x, weights, Loads(COUNTS)).double(), expected, rtol=1e-5, atol=1e-5)
    assert Loads(COUNTS).ends_E.tolist() == [3, 3, 7, 12]


def test_the_host_asks_for_the_loads_once_a_layer(monkeypatch):
    """On a GPU each time is a wait for all that was queued."""
    asked = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(tensor) or tolist(tensor))
    model = create_model(ModelConfig(**CONFIG | {"n_layers": 3}))
    model(torch.randint(0, 19, (2, 12)))
    assert len(asked) == 3


def gmm(a, b, batch_sizes, trans_a=False, trans_b=False):
    """As grouped_gemm documents it: rows of `a` by `batch_sizes`, which lie on the CPU, times each matrix of `b`."""
    assert batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64 and not trans_a
    matrices = b.mT if trans_b else b
    calls.append(batch_sizes.tolist())
    return torch.cat([rows @ matrix for rows, matrix in zip(a.split(batch_sizes.tolist()), matrices, strict=True)])


calls: list[list[int]] = []


def test_megablocks_is_called_as_it_documents(monkeypatch):
    """A stand-in for the package, which has kernels for GPUs alone."""
    util = types.SimpleNamespace(ops=types.SimpleNamespace(gmm=gmm))
    monkeypatch.setitem(sys.modules, "megablocks", types.SimpleNamespace(grouped_gemm_util=util))
    torch.manual_seed(0)
    expected = create_model(ModelConfig(**CONFIG))
    model = create_model(ModelConfig(**CONFIG, moe_backend="megablocks"))
    model.load_state_dict(expected.state_dict())
    ids = torch.randint(0, 19, (2, 12))
    torch.testing.assert_close(model(ids)[0], expected(ids)[0])
    assert calls == []  # the CPU has torch's
    monkeypatch.setattr(grouped_mm, "megablocks_runs_for", lambda x: True)
    torch.testing.assert_close(model(ids)[0], expected(ids)[0])
    assert len(calls) == 2 and sum(calls[0]) == 2 * 24


@pytest.mark.parametrize("has_package", [True, False])
def test_without_it_the_error_names_the_pip_line(monkeypatch, has_package):
    util = types.SimpleNamespace(grouped_gemm_util=types.SimpleNamespace(ops=None))
    monkeypatch.setitem(sys.modules, "megablocks", util if has_package else None)
    with pytest.raises(ConfigError, match=r"--moe-backend megablocks needs .*pip install 'megablocks\[gg\]'"):
        create_model(ModelConfig(**CONFIG, moe_backend="megablocks"))
