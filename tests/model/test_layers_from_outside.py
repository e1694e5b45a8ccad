"""Layers that are no part of the package: registered by name, and given their first values like ours."""

import sys
import types

import pytest
import torch

from open_lm.flags import Parser, add_group
from open_lm.model import create_model
from open_lm.model.config import ModelConfig, ModelFlags
from open_lm.model.init import init_weights
from open_lm.model.variants import FEED_FORWARDS


class Elsewhere(torch.nn.Module):
    def __init__(self, dim, layer, width=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(dim, dim))

    def reset_parameters(self):
        torch.nn.init.constant_(self.weight, 0.5)

    def forward(self, x):
        return x @ self.weight


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(sys.modules, "elsewhere", types.SimpleNamespace(Elsewhere=Elsewhere))
    monkeypatch.setitem(FEED_FORWARDS, "elsewhere", "elsewhere:Elsewhere")


def test_a_layer_from_outside_gets_its_first_values(registered):
    config = ModelConfig(hidden_dim=16, n_layers=1, n_heads=2, seq_len=8, vocab_size=16, ffn_type="elsewhere")
    with torch.device("meta"):
        model = create_model(config)
    model.to_empty(device="cpu")
    init_weights(model)
    assert model.layers[0].feed_forward.weight.unique().tolist() == [0.5]


def test_flags_offer_what_was_registered_before_they_were_parsed(registered):
    parser = Parser()
    add_group(parser, ModelFlags)
    assert parser.parse_args(["--ffn-type", "elsewhere"]).ffn_type == "elsewhere"
