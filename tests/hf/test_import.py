"""Models of transformers become ours with the same logits, and go back; what we cannot express is named."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_model
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OlmoConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

import open_lm
from open_lm.errors import CheckpointError, ConfigError
from open_lm.hf.export import ExportConfig, export
from open_lm.hf.import_ import main
from open_lm.weights.file import load_file

SIZES = {"vocab_size": 47, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 24}
NEOX = {
    **SIZES, "intermediate_size": 128, "max_position_embeddings": 24, "use_parallel_residual": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
}  # fmt: skip
MODELS = {
    "llama_gqa": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, rms_norm_eps=1e-4, rope_theta=300.0)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "olmo": lambda: OlmoForCausalLM(OlmoConfig(**LLAMA)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2)),
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**LLAMA, rope_parameters=NEOX["rope_parameters"])),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=47, hidden_size=32, num_hidden_layers=2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
}
IDS = torch.randint(47, (2, 20), generator=torch.Generator().manual_seed(2))
CONVERT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "convert_llama.py"))["main"]


def made(kind, folder, **changes):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("dense.bias", "query_key_value.bias", "h_to_4h.bias", "4h_to_h.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size="20KB")
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return model


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_imported_models_have_their_logits_and_go_back_to_the_same(tmp_path, kind, capsys):
    theirs = made(kind, tmp_path / "theirs")
    main(["--model", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours.pt")])
    assert "logits differ from transformers' by at most" in capsys.readouterr().out
    model = open_lm.load_model(tmp_path / "ours.pt")
    assert torch.allclose(model(IDS)[0], theirs(IDS).logits, atol=1e-4)
    export(ExportConfig(checkpoint=str(tmp_path / "ours.pt"), out=str(tmp_path / "back")))
    back = type(theirs).from_pretrained(tmp_path / "back")(IDS).logits
    assert torch.allclose(back, theirs(IDS).logits, atol=1e-5)


def test_a_folder_of_transformers_loads_without_import(tmp_path):
    theirs = made("llama_gqa", tmp_path)
    with torch.inference_mode():
        assert torch.allclose(open_lm.load_model(tmp_path)(IDS)[0], theirs(IDS).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama_gqa", {"attention_bias": True}, "attention_bias True"),
        ("llama_gqa", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama_gqa", {"head_dim": 16}, "head_dim 16"),
        ("llama_gqa", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_scaling 'llama3'"),
        ("llama_gqa", {"model_type": "gemma"}, "model_type 'gemma'"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("stablelm", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ("mamba", {"use_bias": True}, "use_bias True"),
        ("gpt_neox", {"use_parallel_residual": True}, "use_parallel_residual"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "rotary_pct 0.25"),
    ],
)
def test_what_we_cannot_express_is_named_and_nothing_is_written(tmp_path, kind, changes, named):
    made(kind, tmp_path / "theirs", **changes)
    with pytest.raises(CheckpointError, match=named):
        main(["--model", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours.pt")])
    assert not (tmp_path / "ours.pt").exists()


def test_biases_that_are_not_zero_are_named(tmp_path):
    model = made("gpt_neox", tmp_path / "zeros")
    model.gpt_neox.layers[1].attention.dense.bias.data[3] = 1.0
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(CheckpointError, match=r"gpt_neox.layers.1.attention.dense.bias is not zero"):
        open_lm.load_model(tmp_path / "one")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    made("llama_gqa", tmp_path)
    index = {"weight_map": {"lm_head.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a file outside its folder"):
        open_lm.load_model(tmp_path)


def test_code_in_a_folder_is_never_run(tmp_path):
    made("llama_gqa", tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    open_lm.load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_and_bad_flags_are_named(tmp_path):
    made("llama_gqa", tmp_path / "theirs")
    next((tmp_path / "theirs").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"is missing. Download the folder again"):
        open_lm.load_model(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="--out 'x'"):
        main(["--model", str(tmp_path), "--out", "x"])
    with pytest.raises(ConfigError, match="no such folder"):
        main(["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.pt")])


def meta_forward(weights, params, ids):
    """Llama as its authors wrote it: complex rotary over adjacent pairs, in fp64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    norm = lambda x, g: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * g  # noqa: E731
    n, k = params["n_heads"], params["dim"] // params["n_heads"]
    angle = torch.outer(torch.arange(ids.shape[1]).double(), 10_000.0 ** -(torch.arange(0, k, 2).double() / k))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    rotated = lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)  # noqa: E731
    x = w["tok_embeddings.weight"][ids]
    for i in range(params["n_layers"]):
        p = f"layers.{i}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, key, v = ((h @ w[f"{p}attention.w{c}.weight"].T).unflatten(-1, (-1, k)).contiguous() for c in "qkv")
        q, key = rotated(q), rotated(key)
        key, v = (y.repeat_interleave(n // params["n_kv_heads"], 2) for y in (key, v))
        scores = torch.einsum("bthk,bshk->bhts", q, key) * k**-0.5
        scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
        x = x + torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).flatten(-2) @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate = F.silu(h @ w[p + "feed_forward.w1.weight"].T)
        x = x + (gate * (h @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.fixture
def original():
    """Weights and params as Llama's authors publish them."""
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    generator = torch.Generator().manual_seed(0)
    shapes = {"tok_embeddings.weight": (47, 32), "output.weight": (47, 32), "norm.weight": (32,)}
    for p in ("layers.0.", "layers.1."):
        shapes |= {p + "attention_norm.weight": (32,), p + "ffn_norm.weight": (32,)}
        shapes |= {p + f"attention.w{c}.weight": (16 if c in "kv" else 32, 32) for c in "qkvo"}
        shapes |= {p + "feed_forward.w1.weight": (48, 32), p + "feed_forward.w3.weight": (48, 32)}
        shapes |= {p + "feed_forward.w2.weight": (32, 48)}
    return params, {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def in_shards(weights, n, embeddings_by):
    """As model-parallel training leaves them: matrices cut by rows, wo and w2 by columns, norms whole."""
    for part in range(n):
        cut = {}
        for name, tensor in weights.items():
            by = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            by = embeddings_by if name.startswith("tok_") else by
            size = tensor.shape[by] // n + (tensor.shape[by] % n > part if tensor.ndim == 2 else 0)
            start = sum(tensor.shape[by] // n + (tensor.shape[by] % n > q) for q in range(part))
            cut[name] = tensor if tensor.ndim == 1 else tensor.narrow(by, start, size).clone()
        yield {**cut, "rope.freqs": torch.zeros(4)}


@pytest.mark.parametrize(("n_shards", "embeddings_by"), [(1, 0), (2, 1), (2, 0)])
def test_original_llama_weights_compute_what_their_authors_code_does(tmp_path, original, n_shards, embeddings_by):
    params, weights = original
    (tmp_path / "params.json").write_text(json.dumps(params))
    for number, shard in enumerate(in_shards(weights, n_shards, embeddings_by)):
        torch.save(shard, tmp_path / f"consolidated.{number:02d}.pth")
    CONVERT(["--input-dir", str(tmp_path), "--out", str(tmp_path / "ours.pt"), "--seq-len", "24"])
    with torch.inference_mode():
        ours = open_lm.load_model(tmp_path / "ours.pt")(IDS)[0].double()
    assert torch.allclose(ours, meta_forward(weights, params, IDS), atol=1e-4)
    assert load_file(str(tmp_path / "ours.pt"))["config"]["model"]["n_kv_heads"] == 2


def test_a_folder_without_original_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"params.json"):
        CONVERT(["--input-dir", str(tmp_path), "--out", str(tmp_path / "ours.pt")])
    (tmp_path / "params.json").write_text(json.dumps({"dim": 8, "n_layers": 1, "n_heads": 1}))
    with pytest.raises(CheckpointError, match=r"no consolidated"):
        CONVERT(["--input-dir", str(tmp_path), "--out", str(tmp_path / "ours.pt")])


def test_our_export_imports_to_the_same_weights(tmp_path):
    model = make_model("llama")
    torch.save({"state_dict": model.state_dict(), "config": {"model": model.config.to_dict()}}, tmp_path / "e.pt")
    export(ExportConfig(checkpoint=str(tmp_path / "e.pt"), out=str(tmp_path / "out")))
    main(["--model", str(tmp_path / "out"), "--out", str(tmp_path / "again.pt"), "--no-check"])
    again = load_file(str(tmp_path / "again.pt"))
    assert again["config"]["model"] == model.config.to_dict()
    assert all(torch.equal(again["state_dict"][name], tensor) for name, tensor in model.state_dict().items())
