"""Exported folders load in plain transformers, in a process that cannot import open_lm, and write the same text."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import BASE, CONFIGS, make_model, save_checkpoint

import open_lm
from open_lm.data.tokenizer import load_tokenizer
from open_lm.errors import CheckpointError, ConfigError
from open_lm.generation import generate
from open_lm.hf.export import ExportConfig, export, largest_difference, main
from open_lm.hf.tokenizer_files import with_chat_template
from open_lm.model import create_model
from open_lm.model.config import ModelFlags
from open_lm.post_training.chat.template import ChatTemplate

CLASSES = {
    "llama": "LlamaForCausalLM", "olmo": "OlmoForCausalLM", "stablelm": "StableLmForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt": "GPTNeoXForCausalLM", "olmoe": "OlmoeForCausalLM", "mamba": "MambaForCausalLM", "own": "OpenLMForCausalLM",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(2, BASE["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(5))
PROMPTS = [IDS[0, :4].tolist(), IDS[1, :9].tolist()]

OUTSIDE = """
import json, sys, torch
try:
    import open_lm
except ImportError:
    pass
else:
    raise SystemExit("open_lm can be imported")
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    own = name.startswith("own")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own).eval()
    reference = torch.load(folder + ".reference.pt")
    with torch.inference_mode():
        logits = model(reference["ids"]).logits
    width = max(map(len, reference["prompts"]))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in reference["prompts"]])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in reference["prompts"]])
    text = lambda **how: model.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0, **how)[:, width:].tolist()
    found[name] = {
        "class": type(model).__name__, "off": (logits - reference["logits"]).abs().max().item(),
        "greedy": text(), "beams": text(num_beams=3), "uncached": text(use_cache=False),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every tiny model, exported: `{name: folder}`, beside each what OpenLM computes."""
    folder = tmp_path_factory.mktemp("exported")
    folders = {}
    for name in CONFIGS:
        model = make_model(name)
        path = save_checkpoint(model, folder / f"{name}.pt")
        export(ExportConfig(checkpoint=path, out=str(folder / name)))
        with torch.inference_mode():
            reference = {"logits": model(IDS)[0], "ids": IDS, "prompts": PROMPTS}
        torch.save(reference, folder / f"{name}.reference.pt")
        folders[name] = str(folder / name)
    return folders


@pytest.fixture(scope="module")
def outside(exported, tmp_path_factory):
    """The folders as a process without open_lm reads them."""
    cache = str(tmp_path_factory.mktemp("hf_home"))
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, json.dumps(exported)], cwd=cache, capture_output=True, text=True,
        env={**os.environ, "HF_HOME": cache, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_ours_in_the_class_that_fits(outside, name):
    assert outside[name]["class"] == CLASSES[name.split("_")[0]]
    assert outside[name]["off"] < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_left_padded_batches_write_what_we_write(outside, name):
    model = make_model(name)
    assert outside[name]["greedy"] == generate(model, PROMPTS, temperature=0, max_gen_len=10)
    assert outside[name]["uncached"] == generate(model, PROMPTS, temperature=0, max_gen_len=10, use_cache=False)
    if name != "own_custom":  # there earlier positions were scaled by the shorter length they had seen
        assert outside[name]["greedy"] == outside[name]["uncached"]
    assert outside[name]["beams"] == generate(model, PROMPTS, num_beams=3, max_gen_len=10)


@pytest.mark.parametrize("name", CONFIGS)
def test_load_model_reads_its_own_export_back(exported, name):
    with torch.inference_mode():
        off = (open_lm.load_model(exported[name])(IDS)[0] - make_model(name)(IDS)[0]).abs().max()
    assert off < 1e-5


@pytest.mark.parametrize("name", ["llama_tied_wide", "stablelm", "gpt_neox"])
def test_the_rotary_is_named_for_older_readers_too(exported, name):
    config = json.loads((Path(exported[name]) / "config.json").read_text())
    assert config["rope_theta"] == (500.0 if name == "llama_tied_wide" else 10_000.0)
    if name != "llama_tied_wide":
        assert config["partial_rotary_factor"] == 1.0
    if name == "gpt_neox":
        assert (config["rotary_pct"], config["rotary_emb_base"]) == (1.0, 10_000.0)


def test_the_command_writes_weights_tokenizer_and_card_and_prints_the_difference(tmp_path, tokenizer_file, capsys):
    metrics = [{"loss": 3.25, "val_data": ["held_out"]}]
    path = save_checkpoint(make_model("llama"), tmp_path / "e.pt", evaluation_metrics=metrics)
    out = tmp_path / "out"
    main(["--checkpoint", path, "--out", str(out), "--tokenizer", str(tokenizer_file), "--dtype", "bfloat16"])
    assert "logits after reloading differ by at most" in capsys.readouterr().out
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}
    card = (out / "README.md").read_text()
    flags = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert flags == {"lr": 0.003} and "openlm train --config run.yaml" in card
    config, generation = (json.loads((out / f).read_text()) for f in ("config.json", "generation_config.json"))
    assert (config["dtype"], config["eos_token_id"], generation["eos_token_id"]) == ("bfloat16", 0, 0)
    for fact in (
        "| steps | 7 |",
        "| tokens seen | 12k |",
        "validation loss (held_out) | 3.2500",
        "0.003",
    ):
        assert fact in card

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a b").input_ids == [2, 28, 3]
    assert tokenizer.decode([2, 28, 3]) == "a b"


def test_an_exported_folder_writes_text_with_its_own_tokenizer(tmp_path, tokenizer_file):
    path, out = save_checkpoint(make_model("llama"), tmp_path / "e.pt"), str(tmp_path / "out")
    main(["--checkpoint", path, "--out", out, "--tokenizer", str(tokenizer_file)])
    write = runpy.run_path(str(ROOT / "scripts" / "generate.py"))["main"]
    flags = ["--input-text", "ab", "--temperature", "0", "--max-gen-len", "5"]
    expected = write(["--checkpoint", path, "--tokenizer", str(tokenizer_file), *flags])
    assert write(["--checkpoint", out, *flags]) == expected


def test_a_model_that_reloads_differently_is_refused_and_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("open_lm.hf.export.TOLERANCE", -1.0)
    path = save_checkpoint(make_model("llama"), tmp_path / "e.pt")
    with pytest.raises(CheckpointError, match="logits after reloading are off by"):
        export(ExportConfig(checkpoint=path, out=str(tmp_path / "out")))
    assert [p.name for p in tmp_path.iterdir()] == ["e.pt"]


def test_a_difference_of_hundredths_is_refused_too(tmp_path):
    path, out = save_checkpoint(make_model("llama"), tmp_path / "e.pt"), tmp_path / "out"
    export(ExportConfig(checkpoint=path, out=str(out), check="none"))
    model = open_lm.load_model(path)
    with torch.no_grad():
        model.output.weight[5] += 0.01
    with pytest.raises(CheckpointError, match="logits after reloading are off by"):
        largest_difference(model, out)


def test_a_wrong_permutation_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("open_lm.weights.to_hf.pairs_to_halves", lambda weight, head_dim: weight)
    path = save_checkpoint(make_model("llama_pairs_gqa"), tmp_path / "e.pt")
    with pytest.raises(CheckpointError, match="logits after reloading are off by"):
        export(ExportConfig(checkpoint=path, out=str(tmp_path / "out")))


def test_bad_flags_are_named_before_anything_is_written(tmp_path, tokenizer_file):
    path = save_checkpoint(make_model("llama"), tmp_path / "e.pt")
    with pytest.raises(ConfigError, match=r"--out .* exists"):
        main(["--checkpoint", path, "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="--checkpoint is missing"):
        main(["--out", "x"])
    with pytest.raises(ConfigError, match="--push x: need owner/name"):
        main(["--checkpoint", path, "--out", str(tmp_path / "x"), "--push", "x"])


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.setitem(BASE, "vocab_size", 20)
    path = save_checkpoint(make_model("llama"), tmp_path / "e.pt")
    with pytest.raises(ConfigError, match="29 tokens, the model 20"):
        main(["--checkpoint", path, "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_file)])
    assert not (tmp_path / "out").exists()


def test_a_model_of_transformers_that_was_trained_here_goes_back_to_its_class(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48)).save_pretrained(tmp_path / "theirs")
    model = create_model(ModelFlags(hf_model=str(tmp_path / "theirs"), hf_seq_len=24)).eval()
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)  # as if trained
    path = save_checkpoint(model, tmp_path / "e.pt")
    export(ExportConfig(checkpoint=path, out=str(tmp_path / "out")))
    back = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    ids = IDS.clamp(max=60)
    with torch.inference_mode():
        assert torch.allclose(back(ids).logits, model(ids)[0], atol=1e-5)


def chat_folder(path):
    """A tokenizer with all that chat models have, as AutoTokenizer saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(["<s>", "</s>", "<unk>", "<pad>", *"abcdef", "Ġ"])}
    backend = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    made.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    made.save_pretrained(path)
    return str(path)


def test_special_tokens_and_chat_template_travel_and_the_checkpoints_own_tokenizer_is_the_default(tmp_path):
    from transformers import AutoTokenizer

    named = chat_folder(tmp_path / "chat")
    model = make_model("llama")
    config = {"model": model.config.to_dict(), "tokenizer": named}
    path = save_checkpoint(model, tmp_path / "e.pt", config=config)
    main(["--checkpoint", path, "--out", str(tmp_path / "out")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.special_tokens_map.items() >= {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
    }.items()  # fmt: skip
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab</s>"
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (0, 1, 3)
    main(["--checkpoint", path, "--out", str(tmp_path / "without"), "--tokenizer", "none"])
    assert not (tmp_path / "without/tokenizer.json").exists()


def test_the_template_that_a_model_was_fine_tuned_with_goes_into_its_export(tmp_path):
    from transformers import AutoTokenizer

    named, model = chat_folder(tmp_path / "chat"), make_model("llama")
    path = save_checkpoint(model, tmp_path / "e.pt", config={"model": model.config.to_dict(), "tokenizer": named})
    common = ["--checkpoint", path, "--check", "none", "--chat-template", "tulu"]
    main([*common, "--out", str(tmp_path / "out")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    expected = "<|user|>\nab\n<|assistant|>\ncd</s>"
    assert tokenizer.apply_chat_template(talk, tokenize=False) == expected
    plain = with_chat_template(load_tokenizer(named), "tulu", marked=False)
    assert "generation %}" not in plain.chat_template and not ChatTemplate(plain.chat_template).marks_answers
    assert ChatTemplate(plain.chat_template, {"eos_token": "</s>"}).render(talk).text == expected
    own = load_tokenizer(named)
    assert with_chat_template(own, None, marked=True).chat_template == own.chat_template != plain.chat_template
    with pytest.raises(ConfigError, match="leave out --tokenizer none"):
        main([*common, "--out", str(tmp_path / "x"), "--tokenizer", "none"])
    with pytest.raises(ConfigError, match=r"--chat-template nowhere.jinja: no such file"):
        main([*common[:-1], "nowhere.jinja", "--out", str(tmp_path / "x")])


def test_a_tokenizer_that_is_gone_is_named_with_the_way_out(tmp_path):
    model = make_model("llama")
    config = {"model": model.config.to_dict(), "tokenizer": str(tmp_path / "gone.json")}
    path = save_checkpoint(model, tmp_path / "e.pt", config=config)
    with pytest.raises(ConfigError, match=r"gone.json, which is not found .* --tokenizer none"):
        main(["--checkpoint", path, "--out", str(tmp_path / "out")])


def test_the_card_names_the_licence_and_nothing_private(tmp_path):
    model = make_model("llama")
    flags = {
        "lr": 0.003, "train_data": ["s3://secret-bucket/shards/a.tar"], "logs": "/home/me/logs",
        "wandb_project_name": "secret-project", "remote_sync": "s3://secret-bucket/runs", "model": "/home/me/m.json",
        "dataset_manifest": ["/data/secret/manifest.jsonl"], "optimizer": "muon", "tokenizer": "secret-tok",
    }  # fmt: skip
    metrics = [{"loss": 3.25, "val_data": ["s3://secret-bucket/valid/c4.tar::/secret/b.tar"]}]
    facts = {"config": {"model": model.config.to_dict(), "flags": flags}, "evaluation_metrics": metrics}
    path = save_checkpoint(model, tmp_path / "e.pt", **facts)
    main(["--checkpoint", path, "--out", str(tmp_path / "out"), "--license", "apache-2.0"])
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "validation loss (c4) | 3.2500" in card and 'optimizer: "muon"' in card
    for word in ("secret", "/home", "s3://", "/data", str(tmp_path)):
        assert word not in card


@pytest.mark.parametrize("check", ["weights", "none"])
def test_large_models_are_checked_tensor_by_tensor_or_not_at_all(tmp_path, check, monkeypatch):
    path = save_checkpoint(make_model("own_geglu"), tmp_path / "e.pt")
    monkeypatch.setattr("open_lm.hf.export.largest_difference", None)
    assert main(["--checkpoint", path, "--out", str(tmp_path / "out"), "--check", check]) is None
    with torch.inference_mode():
        assert torch.allclose(open_lm.load_model(tmp_path / "out")(IDS)[0], make_model("own_geglu")(IDS)[0])


def test_a_tensor_that_was_written_wrong_is_noticed(tmp_path):
    from safetensors.torch import load_file, save_file

    from open_lm.hf.classes import save, to_transformers
    from open_lm.hf.export import require_same_weights

    model = make_model("llama_tied_wide")
    theirs = to_transformers(model.config, model.state_dict())
    (tmp_path / "out").mkdir()
    save(theirs, tmp_path / "out")
    require_same_weights(theirs, tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-3
    save_file(weights, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight is not what was written"):
        require_same_weights(theirs, tmp_path / "out")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight was not written"):
        require_same_weights(theirs, tmp_path / "out")
