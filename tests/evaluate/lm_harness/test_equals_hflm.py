"""Our model in the harness gives the numbers of the harness's own class of transformers, request by request."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from icl_setup import tiny_config, tiny_model, write_checkpoint, write_tokenizer

from open_lm.evaluate.eval_model import load_eval_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"),
]

TEXT = "the list of items is sorted and then returned to the caller, one by one, "
FAMILIES = {
    "llama": {},
    "neox": {"model_norm": "default_layer_norm", "ffn_type": "gelu", "positional_embedding_type": "rotary"},
    "published": {"model_norm": "gain_only_lp_layer_norm", "qk_norm": True, "positional_embedding_type": "rotary"},
}


SHAPE = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 32}  # fmt: skip
PUBLISHED_BY_OTHERS = {
    "pythia": ("gpt_neox", {"rotary_pct": 0.25, "use_parallel_residual": True, "attention_bias": True}),
    "llama of others": ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-6}),
}
"""Models as others publish them, run through --hf-model: Pythia's quarter rotary, parallel blocks and biases."""


def made_elsewhere(folder, kind, changes):
    """`(the harness's own, ours)` of a random model of transformers with its tokenizer beside it."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from open_lm.evaluate.eval_model import load_hf_eval_model
    from open_lm.evaluate.lm_harness.adapter import OpenLMHarness
    from open_lm.model.config import ModelFlags

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    file = write_tokenizer(folder / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>").save_pretrained(folder)
    flags = ModelFlags(hf_model=str(folder), hf_seq_len=32)
    ours = load_hf_eval_model(flags, str(folder / "tokenizer.json"), torch.device("cpu"), torch.float32)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
    return theirs, OpenLMHarness(eval_model=ours)


@pytest.fixture(scope="module", params=[*FAMILIES, *PUBLISHED_BY_OTHERS])
def pair(request, tmp_path_factory):
    """`(the harness's own, ours)` of one export, or of a model of others, with a context of 32 tokens."""
    from lm_eval.models.huggingface import HFLM

    if request.param in PUBLISHED_BY_OTHERS:
        return made_elsewhere(tmp_path_factory.mktemp("other"), *PUBLISHED_BY_OTHERS[request.param])
    import open_lm.hf
    from open_lm.evaluate.lm_harness.adapter import OpenLMHarness
    from open_lm.hf.export import ExportConfig, export

    assert open_lm.hf.OpenLMForCausalLM  # registers the published class
    folder = tmp_path_factory.mktemp(request.param)
    changes = {**FAMILIES[request.param], "seq_len": 32}
    assert tiny_config(**changes).seq_len == 32
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    path = write_checkpoint(folder / "epoch_1.pt", tiny_model(**changes), tokenizer)
    export(ExportConfig(checkpoint=path, out=str(folder / "out")))
    ours = load_eval_model(path, None, {}, torch.device("cpu"), torch.float32)
    theirs = HFLM(pretrained=str(folder / "out"), device="cpu", dtype="float32", batch_size=3)
    return theirs, OpenLMHarness(eval_model=ours)


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments_, i) for i, arguments_ in enumerate(arguments)]


def test_choices_with_and_without_context_and_truncated_ones_are_equal(pair):
    contexts = ["", "def f", TEXT, TEXT * 3]
    asked = [(context, f" {choice}") for context in contexts for choice in ("x", "return the list", "in items: pass")]
    theirs, ours = (model.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True) for model in pair)
    for (a, greedy_a), (b, greedy_b), question in zip(theirs, ours, asked, strict=True):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-5), question
        assert greedy_a == greedy_b


def test_rolling_texts_of_every_length_around_the_window_are_equal(pair):
    n = [len(pair[1].tok_encode(TEXT[:k])) for k in range(len(TEXT))]
    texts = [TEXT[:3], *(TEXT[: n.index(k)] for k in (30, 31) if k in n), TEXT * 2, TEXT * 5]
    asked = [(text,) for text in texts]
    theirs, ours = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True) for model in pair
    )
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_truncated_contexts_are_counted_once_for_all_their_choices_and_anew_for_each_task(pair):
    ours = pair[1]
    ours.truncated_contexts.clear()
    asked = [(TEXT * 3, " x"), (TEXT * 3, " y"), ("a", " z")]
    ours.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    assert len(ours.truncated_contexts) == 1


def test_a_folder_called_lm_eval_is_no_installation(tmp_path, monkeypatch):
    from open_lm.errors import ConfigError
    from open_lm.evaluate.lm_harness.runner import require_harness

    namespace = SimpleNamespace(origin=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: namespace)
    with pytest.raises(ConfigError, match="lm-eval is not installed"):
        require_harness()
