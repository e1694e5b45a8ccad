"""The quicker product is the same product, and leaves the model as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_lm.generate import few_rows
from open_lm.generate.few_rows import linear, quick_products


@pytest.mark.parametrize("shape", [(1, 16), (3, 16), (4, 16), (8, 1, 16), (4, 8, 16), (40, 16)])
def test_it_equals_the_product_in_fp64(shape):
    x, weight = torch.randn(shape), torch.randn(24, 16)
    expected = F.linear(x.double(), weight.double())
    assert linear(weight, x).shape == expected.shape
    assert torch.allclose(linear(weight, x).double(), expected, atol=1e-5)


def test_layers_with_a_bias_and_all_layers_afterwards_are_torchs_own(monkeypatch):
    called = []
    monkeypatch.setattr(few_rows, "linear", lambda weight, x: called.append(1) or F.linear(x, weight))
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    with quick_products(model):
        model(torch.ones(5, 4))
    assert len(called) == 1
    model(torch.ones(5, 4))
    assert len(called) == 1


def test_an_error_inside_leaves_the_model_as_it_was():
    layer = nn.Linear(4, 4, bias=False)
    with pytest.raises(KeyError), quick_products(layer):
        raise KeyError
    assert "forward" not in vars(layer)
