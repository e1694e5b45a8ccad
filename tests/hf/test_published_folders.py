"""Folders as DCLM published them load by the lines of their cards, and compute, write and save as they should."""

import json

import published_folder
import pytest
import torch
from shared import SHARED, needs_shared
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import open_lm

# As on DCLM-7B's card.
from open_lm.hf import *  # noqa: F403
from open_lm.hf import OpenLMConfig, OpenLMForCausalLM, OpenLMTokenizerFast

CARD = {"max_new_tokens": 50, "top_p": 0.8, "temperature": 0.8, "do_sample": True, "repetition_penalty": 1.1}


@pytest.fixture(scope="module", params=[False, True], ids=["top_level", "params_args_dict"])
def published(request, tmp_path_factory):
    """`(folder, ids, logits)` of a published model of either form."""
    return published_folder.make(tmp_path_factory.mktemp("hub") / "DCLM-tiny", nested=request.param)


def test_the_auto_classes_load_it_and_its_logits_are_those_of_a_plain_fp64_model(published):
    folder, ids, expected = published
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is OpenLMForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        assert (model.eval()(ids).logits - expected).abs().max() < 1e-4
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is OpenLMConfig
    assert (config.dim, config.norm_type, config.apply_qk_norm) == (32, "gain_only_lp_layer_norm", True)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (32, 2, 64)


def test_load_model_reads_the_same_folder(published):
    folder, ids, expected = published
    with torch.inference_mode():
        assert (open_lm.load_model(folder)(ids)[0] - expected).abs().max() < 1e-4


@needs_shared
def test_the_fixture_of_a_published_folder_gives_its_expected_logits():
    from safetensors.torch import load_file

    folder = SHARED / "fixtures" / "dclm_hub"
    expected = load_file(folder / "expected.safetensors")
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), open_lm.load_model(folder)
    with torch.inference_mode():
        assert (theirs(expected["input_ids"]).logits - expected["logits"]).abs().max() < 1e-5
        assert (ours(expected["input_ids"])[0] - expected["logits"]).abs().max() < 1e-5


def test_the_card_writes_text(published):
    folder, *_ = published
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(["Machine learning is"], return_tensors="pt")
    output = model.generate(inputs["input_ids"], **{**CARD, "max_new_tokens": 20})
    text = tokenizer.decode(output[0].tolist(), skip_special_tokens=True)
    assert text.startswith("Machine learning is") and output.shape[1] == inputs["input_ids"].shape[1] + 20


@pytest.mark.parametrize("named", ["GPTNeoXTokenizer", "GPTNeoXTokenizerFast", "OpenLMTokenizer", None])
def test_the_tokenizer_loads_under_every_name_that_a_folder_may_give_it(tmp_path, named):
    folder, *_ = published_folder.make(tmp_path / "m")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values["tokenizer_class"] = named
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in values.items() if v}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Machine  learning\n is ﬁne — 12345 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer("a").input_ids[-1] != tokenizer.eos_token_id
    assert OpenLMTokenizerFast.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids


def greedy(model, ids, **how):
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1, **how).tolist()


def test_padded_rows_write_what_they_write_alone_with_and_without_a_cache(published):
    folder, ids, _ = published
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [ids[0, :5], ids[1]]
    alone = [greedy(model, row[None])[0][len(row) :] for row in rows]
    padded = torch.stack([torch.cat((torch.ones(17 - len(row), dtype=torch.long), row)) for row in rows])
    mask = torch.stack([torch.cat((torch.zeros(17 - len(row)), torch.ones(len(row)))) for row in rows]).long()
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert [row[17:] for row in greedy(model, padded, attention_mask=mask, **how)] == alone
    assert len(greedy(model, padded, attention_mask=mask, num_beams=3)[0]) == 25


def test_a_cache_continues_exactly_where_it_was(published):
    folder, ids, expected = published
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        first = model(ids[:, :9])
        second = model(ids[:, 9:], past_key_values=first.past_key_values)
    assert (torch.cat((first.logits, second.logits), 1) - expected).abs().max() < 1e-4


def test_labels_give_the_mean_loss_and_padding_on_the_right_changes_nothing(published):
    folder, ids, expected = published
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    labels = ids.clone()
    labels[0, :4] = -100
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(model(ids, labels=labels).loss.item() - loss.item()) < 1e-4
    padded = torch.nn.functional.pad(ids, (0, 6), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 6))
    longer = model(padded, attention_mask=mask, labels=torch.nn.functional.pad(labels, (0, 6), value=-100))
    assert (longer.logits[:, :17] - expected).abs().max() < 1e-4 and abs(longer.loss.item() - loss.item()) < 1e-4


def test_what_is_saved_loads_again_here_and_elsewhere(published, tmp_path):
    folder, ids, expected = published
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert (open_lm.load_model(tmp_path / "saved")(ids)[0] - expected).abs().max() < 1e-4
    assert (tmp_path / "saved" / "modeling_openlm.py").exists()


def test_a_config_and_a_model_are_built_directly_with_openlms_first_weights():
    torch.manual_seed(0)
    model = OpenLMForCausalLM(OpenLMConfig(dim=64, n_heads=4, n_layers=2, vocab_size=500, weight_tying=True))
    layers = model.model.layers
    assert model.model.tok_embeddings.weight is model.model.output.weight
    assert model.model.output.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert layers[1].feed_forward.w3.weight.std().item() == pytest.approx(256**-0.5 / 2, rel=0.05)
    assert layers[1].attention.out_proj.weight.std().item() == pytest.approx(64**-0.5 / 2, rel=0.05)
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 500)


def test_lm_evals_own_class_scores_it(published):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, *_ = published
    scorer = HFLM(pretrained=str(folder), device="cpu", batch_size=2)
    asked = [("Machine", " learning"), ("Machine learning is the", " study of")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    found = scorer.loglikelihood(requests, disable_tqdm=True)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), open_lm.load_model(folder)
    for (context, continuation), (score, _) in zip(asked, found, strict=True):
        ids = torch.tensor([tokenizer(context + continuation).input_ids])
        n = len(tokenizer(context).input_ids)
        log_probs = model(ids)[0].log_softmax(-1)[0, n - 1 : -1]
        assert score == pytest.approx(log_probs.gather(1, ids[0, n:, None]).sum().item(), abs=1e-4)
