"""Checkpoints keep the chat template and the tokenizer of their data: serving, exports and scores take them."""

import json

import pytest
import torch

from open_lm.checkpoint.load_model import stored_chat_template, stored_tokenizer
from open_lm.data.tokenizer import load_tokenizer
from open_lm.errors import DataError
from open_lm.hf.tokenizer_files import with_chat_template
from open_lm.main import main
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.post_training.chat.template import BUILT_IN, load_template
from open_lm.post_training.prompts import ledger_beside

MODEL = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": 60, "vocab_size": 400, "model_norm": "rms_norm"}
ROWS = [{"question": f"{k}?", "answer": f"{k}", "prompt": f"{k}?", "chosen": "1", "rejected": "2 2"} for k in range(4)]


@pytest.mark.parametrize(
    ("task", "form", "flags"),
    [
        ("sft", "conversations", ["--global-batch-size", "1"]),
        ("reward", "pairs", ["--global-batch-size", "2"]),
        ("grpo", "prompts", ["--reward", "rl_rewards:digits", "--rollout-prompts", "2", "--rollout-tokens", "2"]),
    ],
)
def test_a_checkpoint_names_its_template_and_tokenizer(tmp_path, make_chat, tokenizer_of, task, form, flags):
    _, data = make_chat(ROWS, "--form", form, "--chat-template", "chatml", "--seqlen", "60", name="data")
    manifest = ["--dataset-manifest", f"{data}/manifest.jsonl"]
    named = ["--prompts", f"{data}/prompts.jsonl"] if task == "grpo" else manifest
    torch.manual_seed(0)
    model = create_model(ModelConfig(**MODEL))
    torch.save({"state_dict": model.state_dict(), "config": {"model": model.config.to_dict()}}, tmp_path / "base.pt")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    run = main(
        ["--task", task, *named, *flags, "--model", str(tmp_path / "model.json"), "--pretrained",
         str(tmp_path / "base.pt"), "--train-steps", "1", "--warmup", "0", "--device", "cpu", "--precision", "fp32",
         "--multiple-data-passes", "--workers", "0", "--logs-dir", str(tmp_path / "logs"), "--name", "run"]
    )  # fmt: skip
    stored = stored_chat_template(run.folder)
    assert stored == BUILT_IN["chatml"]
    assert stored_tokenizer(run.folder) == str(tokenizer_of("neox"))
    tokenizer = load_tokenizer(stored_tokenizer(run.folder))
    assert load_template(None, tokenizer, stored).prompt([{"role": "user", "content": "a"}]).startswith("<|im_start|>")
    assert load_template("plain", tokenizer, stored).source == BUILT_IN["plain"]
    assert with_chat_template(tokenizer, None, stored, marked=True).chat_template == stored


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_ledger_is_named(tmp_path, content):
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(DataError, match=r"ledger.json: .* Make the data again"):
        ledger_beside(f"{tmp_path}/manifest.jsonl")
    assert ledger_beside(f"{tmp_path}/elsewhere/manifest.jsonl") == {}
