"""Graphs of --torchcompile: each block is one graph, nothing falls back to Python in the middle of it."""

import copy

import pytest
import torch

from open_lm.data.batch import Batch
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.train.activation_checkpointing import recompute
from open_lm.train.config import ParallelConfig
from open_lm.train.parallel import blocks

BASE = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "seq_len": 16, "vocab_size": 32, "ffn_dim": 48}
CUSTOM = {"attn_name": "custom_attn", "attn_activation": "relu_squared"}
VARIANTS = {
    "dense": {},
    "shared keys, qk norm": {"n_kv_heads": 2, "qk_norm": True, "model_norm": "rms_norm"},
    "window": {"sliding_window": 5},
    "gelu": {"ffn_type": "gelu", "model_norm": "gain_only_lp_layer_norm"},
    "head rotary": {"positional_embedding_type": "head_rotary", "ffn_type": "gemma_geglu"},
    "custom": CUSTOM,
    "custom, scaled": {**CUSTOM, "attn_seq_scalar": "max", "attn_seq_scalar_alpha": 1.0},
    "experts with a capacity": {"moe_freq": 1, "moe_num_experts": 4},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward(model, *, documents=False):
    """A number from the last hidden states."""
    batch = Batch.from_samples(torch.arange(34).view(2, 17) % 7)
    batch = batch.with_documents(0) if documents else batch
    return model.train()(
        batch.inputs_BT, **batch.model_inputs, head=lambda hidden_BTD, _, **__: hidden_BTD[..., 0].square().sum()
    )


def whole(changes, mode=None):
    """A model each of whose blocks must become one graph."""
    model = create_model(ModelConfig(**{**BASE, **changes}))
    recompute(list(blocks(model)), ParallelConfig(grad_checkpointing_mode=mode))
    for block in blocks(model):
        block.compile(fullgraph=True, backend="eager")
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("dense", "window") else pytest.mark.slow) for n in VARIANTS]
)
def test_a_block_is_one_graph(name):
    assert forward(whole(VARIANTS[name])).shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "window"])
def test_documents_on_a_cpu_break_the_graph_and_change_nothing(name):
    """Attention in blocks looks where a document begins, to skip what lies before; GPUs have flex_attention instead."""
    torch.manual_seed(0)
    plain = create_model(ModelConfig(**{**BASE, **VARIANTS[name]}))
    compiled = copy.deepcopy(plain)
    for block in blocks(compiled):
        block.compile(backend="eager")
    assert forward(plain, documents=True).item() != forward(plain).item()
    torch.testing.assert_close(forward(compiled, documents=True), forward(plain, documents=True), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_block_that_is_recomputed_is_one_graph(mode):
    forward(whole({}, mode))


def test_a_block_in_float8_is_one_graph():
    pytest.importorskip("torchao")
    from open_lm.train.float8 import convert_to_float8

    model = create_model(ModelConfig(**BASE))
    convert_to_float8(blocks(model), "rowwise", torch.device("cpu"))
    for block in blocks(model):
        block.compile(fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        forward(model).backward()


def test_a_break_is_noticed():
    model = whole({})
    plain = model.layers[0].attention.forward
    model.layers[0].attention.forward = lambda *args: (torch._dynamo.graph_break(), plain(*args))[1]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        forward(model)
