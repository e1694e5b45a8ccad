"""The quick decoding step is the same step: kernels against fp64, whole texts, and the model afterwards."""

import pytest
import torch
from torch import nn

from open_lm.generation import generate
from open_lm.generation.cpu_decode import cpu_decode
from open_lm.kernels import native
from open_lm.kernels.skinny_matmul import linear
from open_lm.model import create_model
from open_lm.model.config import ModelConfig

BASE = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "seq_len": 40, "vocab_size": 53}
VARIANTS = {
    "llama": {"model_norm": "rms_norm"},
    "pairs, shared keys": {"positional_embedding_type": "llama_rotary", "n_kv_heads": 2},
    "by head": {"positional_embedding_type": "head_rotary", "qk_norm": True, "model_norm": "gain_only_layer_norm"},
    "no positions": {"positional_embedding_type": "none", "ffn_type": "gelu"},
    "biases": {"ffn_type": "gemma_geglu", "weight_tying": True, "qk_norm": True, "model_norm": "rms_norm"},
    "heads of 21": {"n_heads": 3, "positional_embedding_type": "none"},
    "custom": {"attn_name": "custom_attn", "attn_activation": "relu"},
    "experts": {"moe_freq": 2, "moe_num_experts": 4},
    "window": {"sliding_window": 6, "n_kv_heads": 2},
}


SHAPES = [(1, 32, 1), (1, 96, 77), (3, 64, 50), (8, 768, 201), (13, 64, 500), (32, 64, 9)]


@pytest.fixture
def kernels():
    """The C++ kernels, in use."""
    if not native.use_cpu_kernels():
        pytest.skip("the C++ kernels do not run here: no compiler or no AVX-512")
    yield
    native.use_cpu_kernels(False)


def made(**changes):
    torch.manual_seed(0)
    model = create_model(ModelConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_rows", "dim", "width"), SHAPES)
def test_products_equal_those_in_fp64(n_rows, dim, width, dtype):
    torch.manual_seed(0)
    weight = torch.randn(width, dim).to(dtype)
    x = torch.randn(n_rows, 1, dim).to(dtype)
    expected = x.double() @ weight.double().T
    with torch.inference_mode():
        exact, rounded = linear(weight, x, exact=True), linear(weight, x)
    assert (exact.dtype, rounded.dtype, rounded.shape) == (torch.float32, dtype, (n_rows, 1, width))
    torch.testing.assert_close(exact.double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(rounded, expected.to(dtype), atol=1e-4, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.usefixtures("kernels")
def test_what_the_kernel_does_not_take_is_torchs():
    weight = torch.randn(5, 33)
    with torch.inference_mode():
        for x in (torch.randn(2, 33), torch.randn(40, 33), torch.randn(0, 33)):
            assert torch.equal(linear(weight, x), x @ weight.T) or torch.allclose(linear(weight, x), x @ weight.T)
    x = torch.randn(2, 32, requires_grad=True)
    linear(torch.randn(5, 32), x).sum().backward()
    assert x.grad is not None


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_a_step_gives_the_logits_of_the_plain_one_with_padding_and_a_cache(name):
    model = made(**VARIANTS[name])
    ids = torch.randint(0, 53, (3, 20))
    mask = torch.arange(20)[None] >= torch.tensor([[0], [4], [9]])
    found = []
    for context in (cpu_decode, lambda model: torch.inference_mode()):
        with context(model):
            cache = model.new_cache(3, 20)
            logits = [model(ids[:, :12], cache, attention_mask_BT=mask[:, :12])[0][:, -1:]]
            for end in range(13, 21):
                logits.append(model(ids[:, end - 1 : end], cache, attention_mask_BT=mask[:, :end])[0])
        found.append(torch.cat(logits, 1))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "by head"])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"num_beams": 3}])
def test_texts_stay_the_same(request, name, settings):
    model, prompts = made(**VARIANTS[name]), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    plain = generate(model, prompts, max_gen_len=12, **settings)
    request.getfixturevalue("kernels")
    assert generate(model, prompts, max_gen_len=12, **settings) == plain
    assert native.in_use()


@pytest.mark.usefixtures("kernels")
@torch.inference_mode()
def test_in_bf16_it_is_as_near_to_fp32_as_the_plain_step():
    exact, model = made(**VARIANTS["llama"]), made(**VARIANTS["llama"]).bfloat16()
    ids = torch.randint(0, 53, (2, 21))
    expected = exact(ids)[0][:, -1]
    off = []
    for context in (cpu_decode, lambda model: torch.inference_mode()):
        with context(model):
            cache = model.new_cache(2, 21)
            model(ids[:, :20], cache)
            off.append((model(ids[:, 20:], cache)[0][:, 0] - expected).abs().max().item())
    assert off[0] < 1.5 * off[1] + 0.01


@pytest.mark.usefixtures("kernels")
def test_afterwards_and_after_an_error_the_model_is_as_it_was():
    model = made()
    with cpu_decode(model):
        assert any("forward" in vars(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(KeyError), cpu_decode(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
    assert native.in_use()


def test_small_models_and_other_modules_need_no_compiler(monkeypatch):
    native.use_cpu_kernels(False)
    monkeypatch.setattr(native, "use_cpu_kernels", lambda *wanted: pytest.fail("compiled for a tiny model"))
    with cpu_decode(made()), cpu_decode(nn.Sequential(nn.Linear(4, 4, bias=False))):
        pass
