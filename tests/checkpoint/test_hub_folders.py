"""Folders as people publish them on the Hub: DCLM's, those of PyTorchModelHubMixin, mamba-ssm's; whole or in shards."""

import json

import pytest
import torch
from safetensors.torch import save_file

import open_lm
from open_lm.errors import CheckpointError
from open_lm.model import create_model
from open_lm.model.config import ModelConfig

SIZES = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 12, "vocab_size": 19}
MADE = ModelConfig(**SIZES, qk_norm=True, model_norm="gain_only_lp_layer_norm", ffn_type="swiglu_torch")
PARAMS = {  # the keys of apple/DCLM-7B's config.json
    "apply_qk_norm": True, "attn_activation": None, "attn_name": "xformers_attn", "attn_seq_scalar": None,
    "attn_seq_scalar_alpha": None, "dim": 16, "ffn_type": "swiglu_torch", "model": "open_lm_7b_swiglutorch",
    "model_norm": "gain_only_lp_layer_norm", "moe_capacity_factor": 1.25, "moe_expert_model_parallelism": False,
    "moe_freq": 0, "moe_loss_weight": 0.1, "moe_num_experts": None, "moe_top_k": 2, "moe_weight_parallelism": False,
    "n_heads": 2, "n_layers": 2, "norm_eps": 1e-05, "positional_embedding_type": "rotary", "post_embed_norm": False,
    "qk_norm": True, "seq_len": 12, "vocab_size": 19, "weight_tying": False,
}  # fmt: skip
DCLM = {"architectures": ["OpenLMModel"], "model_type": "openlm", "params": None, "params_args_dict": PARAMS,
        "torch_dtype": "float32", "transformers_version": "4.41.2"}  # fmt: skip


def made(config=MADE):
    torch.manual_seed(0)
    return create_model(config).eval()


def folder(path, config, weights, shards=1):
    """`config` and `weights` in files as the Hub has them."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, path / "model.safetensors")
        return path
    names = sorted(weights)
    where = {}
    for number in range(shards):
        part = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in names[number::shards]}, path / part)
        where |= dict.fromkeys(names[number::shards], part)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_folder_of_dclm_loads(tmp_path, prefix, shards):
    weights = {prefix + name: tensor for name, tensor in made().state_dict().items() if "inv_freq" not in name}
    loaded = open_lm.load_model(folder(tmp_path, DCLM, weights, shards))
    assert loaded.config == MADE
    ids = torch.randint(0, 19, (2, 12))
    assert torch.equal(loaded(ids)[0], made()(ids)[0])


def test_what_dclm_says_of_itself_is_checked_against_what_is_asked(tmp_path):
    folder(tmp_path, DCLM, made().state_dict())
    with pytest.raises(CheckpointError, match=r"qk_norm True .asked False"):
        open_lm.load_model(tmp_path, qk_norm=False)


def test_a_missing_key_of_dclm_is_named(tmp_path):
    params = {name: value for name, value in PARAMS.items() if name != "n_heads"}
    folder(tmp_path, {**DCLM, "params_args_dict": params}, made().state_dict())
    with pytest.raises(open_lm.errors.OpenLMError, match="missing n_heads"):
        open_lm.load_model(tmp_path)


def test_parameters_that_the_mixin_of_the_hub_wrote_are_read(tmp_path):
    inner = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 19, "seq_len": 12, "norm_eps": 1e-5,
             "apply_qk_norm": True, "ffn_type": "swiglu_torch", "model_norm": "gain_only_lp_layer_norm"}  # fmt: skip
    loaded = open_lm.load_model(folder(tmp_path, {"params": inner}, made().state_dict()))
    assert loaded.config == MADE


def test_a_folder_of_mamba_ssm_loads(tmp_path):
    made_of = {"d_model": 24, "n_layer": 2, "vocab_size": 40, "seq_len": 2048}
    weights = made(ModelConfig.from_dict(made_of)).state_dict()
    config = {"d_model": 24, "n_layer": 2, "vocab_size": 37, "ssm_cfg": {}, "rms_norm": True,
              "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}  # fmt: skip
    tied = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    loaded = open_lm.load_model(folder(tmp_path, config, tied))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in weights.items())
    for changes in ({"ssm_cfg": {"layer": "Mamba2"}}, {"attn_layer_idx": [1]}, {"rms_norm": False}):
        with pytest.raises(CheckpointError, match="ours are Mamba 1"):
            open_lm.load_model(folder(tmp_path, {**config, **changes}, tied))


def test_code_beside_the_weights_stays_unrun(tmp_path):
    config = {**DCLM, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    folder(tmp_path, config, made().state_dict())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    open_lm.load_model(tmp_path)
    assert not (tmp_path / "ran").exists()
