"""The sizes that `open_lm.model.describe` states are those of the models."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from open_lm.model import create_model
from open_lm.model.config import ModelConfig, ModelFlags, resolve_architecture
from open_lm.model.describe import as_markdown, main, model_size, registered

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def counted_by_hand(c):
    """Parameters of an untied model with gated feed-forward and weight-and-bias norms."""
    width = 256 * -(-int(8 * c.hidden_dim / 3) // 256)
    heads = c.n_heads * (c.hidden_dim // c.n_heads)
    block = 4 * heads * c.hidden_dim + 3 * width * c.hidden_dim + 4 * c.hidden_dim
    return c.n_layers * block + 2 * c.hidden_dim + 2 * c.vocab_size * c.hidden_dim


@pytest.mark.parametrize("name", [name for name in registered() if name.startswith("open_lm")])
def test_parameters_equal_a_count_by_hand(name):
    config = resolve_architecture(ModelFlags(model=name))
    assert model_size(config).parameters == counted_by_hand(config)


def test_a_mamba_has_the_parameters_of_its_modules():
    config = resolve_architecture(ModelFlags(model="mamba_130m"))
    inner, rank = 1536, 48
    mixer = 768 * 2 * inner + inner * 5 + inner * (rank + 32) + rank * inner + inner + inner * 16 + inner + inner * 768
    assert model_size(config).parameters == 12 * (mixer + 768) + 768 + 50432 * 768


def test_llama_2_7b_has_the_parameters_its_authors_publish():
    assert model_size(resolve_architecture(ModelFlags(model="llama2_7b"))).parameters == 6_738_415_616


def test_a_tied_matrix_counts_once():
    config = ModelConfig(hidden_dim=16, n_layers=1, n_heads=2, seq_len=8, vocab_size=100)
    tied = ModelConfig(**{**config.to_dict(), "weight_tying": True})
    assert model_size(config).parameters - model_size(tied).parameters == 1600
    assert model_size(tied).embedding_parameters == 1600


@pytest.mark.parametrize("tying", [False, True])
def test_flops_equal_those_torch_counts_in_a_step(tying):
    config = ModelConfig(hidden_dim=32, n_layers=2, n_heads=4, seq_len=64, vocab_size=97, weight_tying=tying)
    model = create_model(config)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(1, 64, dtype=torch.long))[0].sum().backward()
    # torch counts the whole square of the attention and no norms; the model's own count halves the square.
    attention = 12 * config.n_layers * config.hidden_dim * 64
    stated = 64 * (model_size(config).flops_per_token + attention // 2)
    assert counter.get_total_flops() == pytest.approx(stated, rel=0.02)


def test_the_table_of_the_documentation_is_the_generated_one():
    table = DOCS.read_text().split("<!-- generated: python -m open_lm.model.describe --all --markdown -->\n")[1]
    assert table.split("\n<!-- end -->")[0] == as_markdown(registered())


def test_the_command_prints_one_json_object_a_model(capsys):
    main(["--all", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["model"] for row in rows} == set(registered())
    main(["--model", "open_lm_160m"])
    assert "162,436,608 (162M)" in capsys.readouterr().out
