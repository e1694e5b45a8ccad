"""Linear layers through oneDNN compute what torch's own do, and only where they are meant to."""

import pytest
import torch
from torch import nn

from open_lm.kernels import dense_linear
from open_lm.kernels.dense_linear import linear, runs_for

can_run = pytest.mark.skipif(not dense_linear._is_faster(), reason="no AMD CPU with AVX-512, or no oneDNN")


@can_run
@pytest.mark.parametrize("shape", [(32, 64, 48), (2, 300, 96, 7), (1000, 33, 130)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_torchs(shape, with_bias):
    *rows, dim, width = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((*rows, dim), (width, dim), (width,)))
    bias = bias if with_bias else None
    with torch.no_grad():
        assert runs_for(x, weight)
        found = linear(x, weight, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_gradients_narrow_types_autocast_and_few_rows_are_left_to_torch():
    x, weight = torch.randn(64, 16), torch.randn(8, 16)
    assert not runs_for(x, weight)  # gradients are on
    with torch.no_grad():
        assert not runs_for(x.bfloat16(), weight.bfloat16())
        assert not runs_for(x[:4], weight)
        assert not runs_for(x, weight.T.contiguous().T)
        with torch.autocast("cpu", torch.bfloat16):
            assert not runs_for(x, weight)
    linear(x.requires_grad_(), weight).sum().backward()
    assert x.grad is not None


def test_layers_are_as_before_after_the_block():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(40, 16)
    with torch.no_grad():
        expected = model(x)
        with dense_linear.dense_linear(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
            assert "forward" in vars(model[0])
    assert not any("forward" in vars(module) for module in model)
