"""Names that scripts written for OpenLM import resolve, and do what those scripts use them for."""

import argparse
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_model, save_checkpoint

from open_lm.errors import CheckpointError
from open_lm.model.config import ModelConfig

SIZES = {"n_layers": 2, "n_heads": 4, "seq_len": 40, "vocab_size": 53}


def model_args(**values):
    """Arguments as a script's own parser gives them."""
    from open_lm.params import add_model_args

    parser = argparse.ArgumentParser()
    add_model_args(parser)
    args = parser.parse_args([])
    vars(args).update(values)
    return args


def test_params_are_made_of_arguments_or_of_openlms_fields_and_build_a_transformer():
    from open_lm.model import Params, Transformer, create_model, create_params

    made = create_params(model_args(model="open_lm_test_tiny", qk_norm=True))
    assert (made.dim, made.n_layers, made.apply_qk_norm, made.norm_type) == (16, 2, True, "default_layer_norm")
    given = Params(dim=32, norm_type="rms_norm", apply_qk_norm=True, attn_func=None, **SIZES)
    assert isinstance(given, ModelConfig) and given.model_norm == "rms_norm"
    for model in (Transformer(given), create_model(given)):
        assert isinstance(model, Transformer)
    assert model(torch.ones(1, 3, dtype=torch.long))[0].shape == (1, 3, 53)


def test_weights_are_loaded_as_evaluation_scripts_do_it(tmp_path):
    """DCLM's way: a class of transformers around the model, an epoch_K.pt with DDP's prefix put into its `.model`."""
    from open_lm.file_utils import pt_load
    from open_lm.main import load_model
    from open_lm.model import create_params
    from open_lm.utils.transformers.hf_config import OpenLMConfig
    from open_lm.utils.transformers.hf_model import OpenLMforCausalLM

    source = make_model("own_gelu")
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    state |= {f"module.layers.{n}._ff_w{i}.weight": torch.zeros(1) for n in (0, 1) for i in (1, 2)}
    torch.save({"epoch": 3, "step": 7, "shard_shuffle_seed": 5, "state_dict": state}, tmp_path / "epoch_3.pt")
    params = {**SIZES, "hidden_dim": 32, "n_kv_heads": 2}
    (tmp_path / "m.json").write_text(json.dumps(params))
    args = model_args(model=str(tmp_path / "m.json"), model_norm="lp_layer_norm", ffn_type="gelu")
    wrapped = OpenLMforCausalLM(OpenLMConfig(create_params(args)))
    checkpoint = pt_load(str(tmp_path / "epoch_3.pt"), map_location="cpu")
    wrapped.model.load_state_dict({k.replace("module.", ""): v for k, v in checkpoint["state_dict"].items()})
    args.resume, args.distributed = str(tmp_path / "epoch_3.pt"), False
    ids = torch.randint(0, 53, (2, 9))
    with torch.inference_mode():
        assert torch.allclose(wrapped.eval()(ids).logits, source(ids)[0], atol=1e-5)
    wrapped.model.norm.weight.data.zero_()
    assert load_model(args, wrapped.model) == (3, 7, 5)
    assert load_model(args, wrapped.model, different_seed=True) == (3, 7, None)
    with torch.inference_mode():
        assert torch.allclose(wrapped.eval()(ids).logits, source(ids)[0], atol=1e-5)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    from open_lm.main import load_model
    from open_lm.model import Transformer

    path = save_checkpoint(make_model("llama"), tmp_path / "e.pt")
    with pytest.raises(CheckpointError, match="not of this architecture"):
        load_model(SimpleNamespace(resume=path), Transformer(make_model("own_gelu").config))


def test_the_old_model_class_is_called_like_openlms_model():
    from open_lm.utils.transformers.hf_config import OpenLMConfig
    from open_lm.utils.transformers.hf_model import OpenLMModel

    model = OpenLMModel(OpenLMConfig(dim=32, **SIZES)).eval()
    ids = torch.randint(0, 53, (2, 9))
    with torch.inference_mode():
        logits, hidden, past = model(ids, use_cache=True)
        assert logits.shape == (2, 9, 53) and hidden.shape == (2, 9, 32) and past.get_seq_length() == 9
        assert torch.allclose(model.model.output(hidden), logits)


@pytest.mark.parametrize("name", ["torch_attn", "auto", "custom_attn"])
def test_attention_is_a_function_of_queries_keys_and_values(name):
    from open_lm.attention import ATTN_ACTIVATIONS, ATTN_SEQ_SCALARS, get_attn_func

    extra = ("softmax", "none", 1.0) if name == "custom_attn" else ()
    attend = get_attn_func(name, *extra)
    q, k, v = torch.randn(3, 2, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    ).transpose(1, 2)
    assert torch.allclose(attend(q, k, v, is_causal=True), expected, atol=1e-6)
    one = attend(q[:, -1:], k, v, is_causal=True)
    assert torch.allclose(one, expected[:, -1:], atol=1e-6)
    seeing_all = [torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))]
    assert torch.allclose(attend(q, k, v, is_causal=False), seeing_all[0].transpose(1, 2), atol=1e-6)
    assert {"relu", "softmax", "identity"} <= set(ATTN_ACTIVATIONS) and ATTN_SEQ_SCALARS["avg"](7) == 4


def test_norms_are_classes_called_with_a_width():
    from open_lm.norms import get_norm_class

    for name in ("gain_only_lp_layer_norm", "rms_norm", "default_layer_norm"):
        assert get_norm_class(name)(8, eps=1e-6)(torch.randn(2, 8)).shape == (2, 8)
        assert get_norm_class(name)(8).eps == 1e-5


def test_ranks_are_as_one_process_sees_them(monkeypatch):
    from open_lm.distributed import broadcast_object, init_distributed_device, is_master, world_info_from_env

    args = SimpleNamespace(device="cpu")
    assert init_distributed_device(args) == torch.device("cpu")
    assert (args.rank, args.world_size, args.distributed, is_master(args)) == (0, 1, False, True)
    assert broadcast_object(args, {"a": 1}) == {"a": 1}
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world_info_from_env() == (1, 3, 8)


def test_composer_evaluates_the_wrapped_model():
    pytest.importorskip("composer")
    from open_lm.utils.llm_foundry_wrapper import SimpleComposerOpenLMCausalLM
    from open_lm.utils.transformers.hf_config import OpenLMConfig
    from open_lm.utils.transformers.hf_model import OpenLMforCausalLM

    inner = OpenLMforCausalLM(OpenLMConfig(dim=32, **SIZES)).eval()
    model = SimpleComposerOpenLMCausalLM(inner, None)
    ids = torch.randint(0, 53, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    with torch.inference_mode():
        assert torch.allclose(model.eval_forward(batch)[:, :-1], inner(ids).logits[:, :-1])


def test_importing_the_package_does_not_import_torch():
    import subprocess

    code = "import sys, open_lm, open_lm.model, open_lm.params; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
