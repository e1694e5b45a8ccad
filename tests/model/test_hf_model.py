"""Any causal model of transformers trains, decodes and comes back from a checkpoint like one of ours."""

import json

import pytest
import torch

from open_lm.errors import ConfigError
from open_lm.model import create_model
from open_lm.model.config import ModelConfig, ModelFlags, resolve_architecture
from open_lm.model.describe import model_size

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=True
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}
BLOCKS = {"llama": "LlamaDecoderLayer", "gpt_neox": "GPTNeoXLayer", "gpt2": "GPT2Block"}


@pytest.fixture(scope="module", params=list(CONFIGS))
def published(request, tmp_path_factory):
    """A folder as `save_pretrained` writes it, and the model in it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, str(folder), model


def ids(rows=2, length=12):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def test_it_starts_from_the_published_weights(published):
    _, folder, theirs = published
    model = create_model(ModelFlags(hf_model=folder, hf_seq_len=16)).eval()
    with torch.no_grad():
        logits, hidden, past = model(ids())
        torch.testing.assert_close(logits, theirs(ids()).logits, atol=1e-5, rtol=1e-5)
        product = model(ids(), head=lambda hidden_BTD, weight_VD: hidden_BTD @ weight_VD.T)
    torch.testing.assert_close(product, logits, atol=1e-5, rtol=1e-5)
    assert past is None and hidden.shape == (2, 12, 32)
    assert (model.config.hidden_dim, model.config.n_layers, model.config.vocab_size) == (32, 3, 61)


def test_it_comes_back_from_its_config_and_weights_alone(published, tmp_path):
    _, folder, _ = published
    model = create_model(ModelFlags(hf_model=folder, hf_seq_len=16)).eval()
    config = ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert config == model.config == resolve_architecture(ModelFlags(hf_model=folder, hf_seq_len=16))
    with torch.device("meta"):
        again = create_model(config)
    again.load_state_dict(model.state_dict(), assign=True)
    for module in again.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device="cpu")
            module.reset_parameters()
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids())[0], model(ids())[0])


def test_decoding_with_a_cache_and_left_padding_gives_the_same_logits(published):
    _, folder, _ = published
    model = create_model(ModelFlags(hf_model=folder, hf_seq_len=16)).eval()
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids()), 1)
    mask = (torch.arange(15) >= 3).expand(2, 15)
    with torch.no_grad():
        whole = model(ids())[0]
        cache = model.new_cache(2, 15)
        first = model(padded[:, :9], cache, attention_mask_BT=mask[:, :9])[0]
        rest = model(padded[:, 9:], cache, attention_mask_BT=mask)[0]
    assert cache.length == 15
    torch.testing.assert_close(torch.cat((first[:, 3:], rest), 1), whole, atol=1e-5, rtol=1e-5)


def test_its_size_is_counted_without_its_weights(published):
    _, folder, theirs = published
    size = model_size(resolve_architecture(ModelFlags(hf_model=folder, hf_seq_len=16)))
    assert size.parameters == theirs.num_parameters()
    assert size.embedding_parameters == 61 * 32 * (1 if theirs.config.tie_word_embeddings else 2)


def test_its_blocks_are_found_by_themselves_or_by_name(published):
    kind, folder, _ = published
    for block in (None, BLOCKS[kind]):
        model = create_model(ModelFlags(hf_model=folder, hf_seq_len=16, hf_fsdp_block=block))
        assert [type(layer).__name__ for layer in model.layers] == [BLOCKS[kind]] * 3
    with pytest.raises(ConfigError, match=f"--hf-fsdp-block Block: .* repeats .*{BLOCKS[kind]}"):
        _ = create_model(ModelFlags(hf_model=folder, hf_seq_len=16, hf_fsdp_block="Block")).layers


def test_it_trains(published):
    _, folder, _ = published
    model = create_model(ModelFlags(hf_model=folder, hf_seq_len=16)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(ids()[:, :-1])[0].flatten(0, 1), ids()[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_model_that_bends_its_logits_is_refused(tmp_path):
    config = transformers.CohereConfig(**SMALL, intermediate_size=48, logit_scale=0.25)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="more than a matrix product"):
        create_model(ModelFlags(hf_model=str(tmp_path), hf_seq_len=16))


def test_flags_that_cannot_be_honoured_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two models"):
        ModelFlags(model="open_lm_1b", hf_model="x")
    with pytest.raises(ConfigError, match="belong to --hf-model"):
        ModelFlags(hf_seq_len=5)
    CONFIGS["gpt2"]().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"needs --hf-seq-len.*found None"):
        resolve_architecture(ModelFlags(hf_model=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"--hf-seq-len 65: .* has positions for 64"):
        resolve_architecture(ModelFlags(hf_model=str(tmp_path), hf_seq_len=65))
    transformers.ViTConfig().save_pretrained(tmp_path / "vision")
    with pytest.raises(ConfigError, match="vit is no causal language model"):
        resolve_architecture(ModelFlags(hf_model=str(tmp_path / "vision"), hf_seq_len=8))
    with pytest.raises(ConfigError, match=r"--hf-model .*nothing"):
        resolve_architecture(ModelFlags(hf_model=str(tmp_path / "nothing"), hf_seq_len=8))
