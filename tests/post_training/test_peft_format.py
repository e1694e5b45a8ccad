"""Adapters in PEFT's format: what we write PEFT computes alike, and what PEFT writes we do."""

import pytest
import torch
from runs import run, write_data
from tiny_adapters import IDS, adapted
from tiny_models import make_model

from open_lm.checkpoint.load_model import load_model
from open_lm.errors import CheckpointError
from open_lm.hf.classes import save, to_transformers
from open_lm.model.lora import adapters_of
from open_lm.post_training.convert_adapter import main as convert
from open_lm.post_training.peft_format import load_adapter, save_adapter

NAMES = ["llama", "llama_pairs_gqa", "stablelm", "gpt_neox", "olmo", "own_published"]


@pytest.fixture
def theirs(tmp_path):
    """`theirs(name)`: the tiny model as transformers has it."""

    def make(name):
        from transformers import AutoModelForCausalLM

        model, folder = make_model(name), tmp_path / name
        folder.mkdir()
        save(to_transformers(model.config, model.state_dict()), folder)
        own = (folder / "modeling_openlm.py").exists()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=own).eval()

    return make


@pytest.mark.parametrize("options", [{}, {"with_magnitude": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_what_we_do_with_our_adapter(tmp_path, theirs, name, options):
    peft = pytest.importorskip("peft")
    model = adapted(name, **options).eval()
    save_adapter(model, model.config, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs(name), tmp_path / "adapter").eval()
    expected = model(IDS)[0].detach()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("name", NAMES[:4])
def test_we_compute_what_peft_does_with_its_adapter(tmp_path, theirs, name, settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(theirs(name), config).eval()
    generator = torch.Generator().manual_seed(2)
    for part, parameter in model.named_parameters():
        if "lora_B" in part:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        if "magnitude" in part:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    ours = make_model(name).eval()
    load_adapter(ours, ours.config, tmp_path / "adapter")
    expected = model(IDS).logits.detach()
    torch.testing.assert_close(ours(IDS)[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert all(layer.lora_A.requires_grad for layer in adapters_of(ours).values())
    save_adapter(ours, ours.config, tmp_path / "again", rslora=bool(settings.get("use_rslora")))
    again = peft.PeftModel.from_pretrained(theirs_again(theirs, tmp_path, name), tmp_path / "again").eval()
    torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def theirs_again(theirs, tmp_path, name):
    (tmp_path / name).rename(tmp_path / f"{name}_before")
    return theirs(name)


def test_what_is_no_lora_of_this_model_is_refused(tmp_path):
    model = adapted("llama")
    with pytest.raises(CheckpointError, match="no adapters to save"):
        save_adapter(make_model("llama"), model.config, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        load_adapter(make_model("llama"), model.config, tmp_path / "x")
    save_adapter(model, model.config, tmp_path / "adapter")
    other = make_model("gpt_neox")
    with pytest.raises(CheckpointError, match="of another model"):
        load_adapter(other, other.config, tmp_path / "adapter")


def test_a_runs_adapter_goes_to_peft_and_on_from_there(tmp_path):
    manifest = write_data(tmp_path / "data")
    base = run(tmp_path, manifest, name="base", steps=2)
    trained = run(tmp_path, manifest, "--pretrained", base.folder, "--lora-rank", "4", "--dora", steps=4)
    convert(["--checkpoint", trained.folder, "--out", str(tmp_path / "adapter")])
    merged = convert(
        ["--checkpoint", base.folder, "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "m.pt")]
    )
    expected = load_model(trained.folder)(IDS[:, :16] % 16)[0]
    torch.testing.assert_close(load_model(merged)(IDS[:, :16] % 16)[0], expected, rtol=1e-5, atol=1e-5)
    flags = ["--pretrained", base.folder, "--lora-from", str(tmp_path / "adapter"), "--lr", "1e-30", "--wd", "0"]
    same = run(tmp_path, manifest, *flags, steps=1, name="on")
    torch.testing.assert_close(load_model(same.folder)(IDS[:, :16] % 16)[0], expected, rtol=1e-5, atol=1e-5)
