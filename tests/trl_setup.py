"""A tiny Llama as transformers and as we have it, and TRL's trainers over it as black boxes."""

import copy

import pytest
import tokenizers
import torch

from open_lm.checkpoint.load_model import load_model
from open_lm.data.batch import IGNORED, Batch

EOS, PAD, VOCAB = 50, 51, 53
SHARED = {
    "model.embed_tokens.weight": "tok_embeddings.weight", "lm_head.weight": "output.weight",
    "model.norm.weight": "norm.weight", "model.layers.1.self_attn.o_proj.weight": "layers.1.attention.out_proj.weight",
    "model.layers.0.mlp.down_proj.weight": "layers.0.feed_forward.w3.weight",
    "model.layers.0.input_layernorm.weight": "layers.0.attention_norm.weight",
}  # fmt: skip
"""Parameters that both have alike."""


def make_llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes, **tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours_of(model, folder):
    """The same weights as a model of ours."""
    model.save_pretrained(folder)
    return load_model(str(folder)).train()


def make_tokenizer():
    from transformers import PreTrainedTokenizerFast

    words = {str(k): k for k in range(50)} | {"<|endoftext|>": EOS, "<pad>": PAD, "[UNK]": 52}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<pad>")


ROWS = [
    {"prompt": "1 2 3", "chosen": " 4 5", "rejected": " 6"},
    {"prompt": "1 9", "chosen": " 4 5 7 7", "rejected": " 6 8 3"},
    {"prompt": "7 7 20 21 22", "chosen": " 30 31 32", "rejected": " 33 40 41 42 43 44"},
]


def pairs_of(batch):
    """TRL's batch of pairs as ours."""
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    half = len(ids) // 2
    order = [row for k in range(half) for row in (k, k + half)]
    targets = ids.masked_fill(~mask, IGNORED)
    return Batch(ids[order, :-1], targets[order, 1:], group=2)


def trainer_of(name, module, model, tmp_path, rows=ROWS, **settings):
    """A trainer of TRL, and the one batch of all its rows; `module` is where it lives."""
    import importlib

    from datasets import Dataset

    try:
        place = importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"TRL has no {module}: {error}")
    common = {"output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": len(rows), "report_to": []}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    config = getattr(place, f"{name}Config")(**common, **plain, **settings.pop("config", {}))
    trainer = getattr(place, f"{name}Trainer")(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(), **settings
    )
    return trainer


def require_same_gradients(theirs, ours):
    """Compare the gradients of the parameters that both have alike."""
    names, own = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for their_name, our_name in SHARED.items():
        expected, got = names[their_name].grad, own[our_name].grad
        if expected is None:
            assert got is None or not got.any(), our_name
            continue
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=our_name)


def another(model, seed=5):
    """A reference model: the same with other weights."""
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return reference
