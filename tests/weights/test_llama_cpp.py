"""llama.cpp itself reads our GGUF files: logits and tokens are ours (`pip install llama-cpp-python`, a long build)."""

import ctypes

import numpy as np
import pytest
import torch
from tiny_models import BASE, CONFIGS, make_model
from tokenizers import Regex, pre_tokenizers
from weights.test_gguf import IDS, NASTY, save_tokenizer

from open_lm.data.tokenizer import load_tokenizer
from open_lm.weights.gguf_file import write_gguf
from open_lm.weights.gguf_tokenizer import LLAMA3, NO_TOKENIZER, gguf_tokenizer
from open_lm.weights.to_gguf import to_gguf

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
FAMILIES = [name for name in CONFIGS if not name.startswith(("own", "mistral"))]


def loaded(path, **params):
    asked = llama_cpp.llama_cpp.llama_model_default_params()
    for name, value in params.items():
        setattr(asked, name, value)
    model = llama_cpp.llama_cpp.llama_model_load_from_file(str(path).encode(), asked)
    assert model, "llama.cpp does not load the file"
    return model


def their_logits(path, ids, vocab_size):
    """Logits (T, V) with keys and values kept in fp32."""
    library = llama_cpp.llama_cpp
    model, asked = loaded(path), library.llama_context_default_params()
    asked.n_ctx = asked.n_batch = 64
    asked.n_threads, asked.flash_attn_type, asked.type_k, asked.type_v = 1, 0, 0, 0
    context = library.llama_init_from_model(model, asked)
    batch = library.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert library.llama_decode(context, batch) == 0
    rows = [
        np.ctypeslib.as_array(library.llama_get_logits_ith(context, i), shape=(vocab_size,)) for i in range(len(ids))
    ]
    found = torch.from_numpy(np.stack(rows).copy())
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_ours(tmp_path, name):
    model = make_model(name)
    metadata, entries = to_gguf(model.config, model.state_dict(), "float32")
    write_gguf(tmp_path / "m.gguf", metadata | NO_TOKENIZER, entries)
    with torch.inference_mode():
        ours = model(torch.tensor([IDS]))[0][0]
    off = (their_logits(tmp_path / "m.gguf", IDS, model.config.vocab_size) - ours).abs().max()
    assert off < (1e-2 if name == "gpt_neox" else 1e-4)  # llama.cpp has gelu in its tanh form alone


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe"])
def test_tokens_are_ours_on_a_nasty_corpus(tmp_path, name):
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), bytes_only]),
    }[name]
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, split)))
    from open_lm.model import create_model
    from open_lm.model.config import ModelConfig

    model = create_model(ModelConfig(**{**BASE, "vocab_size": 430, "model_norm": "rms_norm"}))
    metadata, entries = to_gguf(model.config, model.state_dict(), "float32")
    write_gguf(tmp_path / "m.gguf", metadata | gguf_tokenizer(tokenizer, 430), entries)
    library, model = llama_cpp.llama_cpp, loaded(tmp_path / "m.gguf", vocab_only=True)
    vocabulary = library.llama_model_get_vocab(model)
    for text in NASTY:
        raw, room = text.encode(), (ctypes.c_int32 * 1000)()
        n = library.llama_tokenize(vocabulary, raw, len(raw), room, 1000, False, True)
        assert list(room[:n]) == tokenizer.encode(text), text
