"""Post-training on two ranks is that on one: the same losses and weights, whole models or sharded ones."""

import json

import pytest
import torch
from runs import metrics, run_command, weights

from open_lm.main import main
from open_lm.model import create_model
from open_lm.model.config import ModelConfig

pytestmark = pytest.mark.slow
MODEL = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 60, "vocab_size": 400, "model_norm": "rms_norm"}
TALKS = [{"prompt": f"{a} and {b}?", "completion": "yes " * (a + 1) + str(b)} for a in range(6) for b in range(6)]
PAIRS = [
    {"prompt": f"{a} and {b}?", "chosen": str(a + b), "rejected": "no " * b} for a in range(4) for b in range(1, 7)
]


QLORA = ["--lora-rank", "2", "--lora-base", "nf4"]


@pytest.mark.parametrize(
    ("task", "flags", "both"),
    [("sft", ["--fsdp"], []), ("dpo", ["--fsdp"], []), ("kto", [], []), ("dpo", [], QLORA)],
    ids=["sft-fsdp", "dpo-fsdp", "kto", "dpo-qlora"],
)
def test_two_ranks_train_as_one(tmp_path, make_chat, task, flags, both):
    form, rows = ("conversations", TALKS) if task == "sft" else ("pairs", PAIRS)
    _, folder = make_chat(rows, "--form", form, "--chat-template", "plain", "--seqlen", "60", name="data")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    torch.manual_seed(3)
    model = create_model(ModelConfig(**MODEL))
    torch.save({"state_dict": model.state_dict(), "config": {"model": model.config.to_dict()}}, tmp_path / "base.pt")
    common = [
        "--task", task, "--dataset-manifest", f"{folder}/manifest.jsonl", "--multiple-data-passes", "--pretrained",
        str(tmp_path / "base.pt"), "--train-steps", "4", "--global-batch-size", "8", "--lr", "3e-3", "--warmup", "0",
        "--device", "cpu", "--precision", "fp32", "--workers", "0", "--log-every-n-steps", "1", "--accum-freq", "2",
        "--logs-dir", str(tmp_path / "logs"), *both,
    ]  # fmt: skip
    main([*common, "--name", "one"])
    done = run_command([*common, *flags, "--name", "two"], ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for key in ("train/loss", "train/grad_norm"):
        assert metrics(tmp_path, "two", key) == pytest.approx(metrics(tmp_path, "one", key), rel=2e-5, abs=2e-5), key
    torch.testing.assert_close(weights(tmp_path, "two"), weights(tmp_path, "one"), rtol=1e-4, atol=2e-5)
