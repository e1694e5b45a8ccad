"""Files in OpenLM's format load to OpenLM's logits, in a public clone: made here, computed by plain fp64 formulas.

Where OpenLM's own checkpoints are available, the formulas are held against what OpenLM itself computed with them.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model.reference import reference_logits
from shared import SHARED, needs_shared

import open_lm
from open_lm.model import create_model
from open_lm.model.config import ModelConfig, ModelFlags, resolve_architecture

SIZES = {"hidden_dim": 24, "n_layers": 2, "n_heads": 4, "seq_len": 20, "vocab_size": 41, "ffn_dim": None}
KINDS = {
    "rotary_layernorm": {},
    "head_rotary": {"positional_embedding_type": "head_rotary"},
    "gain_only_qknorm": {"model_norm": "gain_only_layer_norm", "qk_norm": True},
    "gelu_lp": {"model_norm": "lp_layer_norm", "ffn_type": "gelu"},
    "llama_rotary_rms": {"model_norm": "rms_norm", "positional_embedding_type": "llama_rotary"},
}
IDS = torch.randint(0, 41, (2, 13), generator=torch.Generator().manual_seed(3))


def as_openlm_saves(state, prefix):
    """The weights as an epoch_K.pt holds them: wrapped, prefixed, with its constants and second names."""
    named = {}
    for name, tensor in state.items():
        named[prefix + name] = tensor
        layer, _, rest = name.partition("feed_forward.")
        if rest in ("0.weight", "2.weight"):
            named[f"{prefix}{layer}_ff_w{1 + (rest == '2.weight')}.weight"] = tensor
    for n in (0, 1):
        named[f"{prefix}layers.{n}.attention.pos_embed.inv_freq"] = 10_000.0 ** (-torch.arange(0, 6, 2) / 6)
    metrics = [{"loss": np.float64(3.5), "val_data": ["c4"]}]
    return {"epoch": 2, "name": "run", "state_dict": named, "evaluation_metrics": metrics, "step": 9}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_openlms_format_computes_what_the_formulas_say(tmp_path, kind, prefix):
    torch.manual_seed(0)
    model = create_model(ModelConfig(**{**SIZES, **KINDS[kind]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(as_openlm_saves(model.state_dict(), prefix), tmp_path / "epoch_2.pt")
    sizes = {name: value for name, value in SIZES.items() if value is not None}
    (tmp_path / "m.json").write_text(json.dumps(sizes))
    loaded = open_lm.load_model(tmp_path / "epoch_2.pt", model=str(tmp_path / "m.json"), **KINDS[kind])
    with torch.inference_mode():
        logits = loaded(IDS)[0]
    expected = torch.stack([reference_logits(model.state_dict(), model.config, row) for row in IDS])
    assert (logits - expected).abs().max() < 1e-4


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas_are_openlms(kind):
    folder = SHARED / "fixtures" / "openlm_checkpoints"
    expected = torch.load(folder / f"{kind}.logits.pt", weights_only=True)
    config = resolve_architecture(ModelFlags(model=str(folder / f"{kind}.json"), **KINDS[kind]))
    state = open_lm.load_model(folder / f"{kind}.pt", model=str(folder / f"{kind}.json"), **KINDS[kind]).state_dict()
    ids = expected["input_ids"][:1]
    assert (reference_logits(state, config, ids[0]) - expected["logits"][0]).abs().max() < 1e-4


def test_a_published_folder_and_the_formulas_agree(tmp_path):
    from published_folder import PARAMS, make, weights

    _, ids, expected = make(tmp_path / "m")
    names = {"hidden_dim": "dim", "qk_norm": "apply_qk_norm", "model_norm": "norm_type"}
    values = {key: PARAMS[names.get(key, key)] for key in ("hidden_dim", "qk_norm", "model_norm", "n_layers", "n_heads",
              "norm_eps", "ffn_type", "positional_embedding_type", "post_embed_norm")}  # fmt: skip
    config = SimpleNamespace(**values, head_dim=8, n_kv_heads=None, rotary_base=10_000.0, sliding_window=None,
                             attn_activation=None, attn_seq_scalar=None, attn_seq_scalar_alpha=None)  # fmt: skip
    state = {name.removeprefix("model."): tensor for name, tensor in weights(PARAMS).items()}
    assert (reference_logits(state, config, ids[0]) - expected[0]).abs().max() < 1e-9
