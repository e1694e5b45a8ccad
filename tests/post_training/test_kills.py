"""SIGKILL in the middle of post-training: while answers are scored, in an update, in a save; on one rank and on two.

Each job goes on with `--resume latest`, and ends with the bits of the job that nothing disturbed."""

import itertools
import json
import signal

import pytest
import torch
from faults.ranks import run_ranks
from runs import folder_of, weights

from open_lm.model import create_model
from open_lm.model.config import ModelConfig

MODEL = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 60, "vocab_size": 400, "model_norm": "rms_norm"}
KILLS = {
    "update": {"event": "gradients", "nth": 6},
    "save": {"event": "file.rename", "path": "optimizer_", "nth": 2},
    "commit": {"event": "file.rename", "path": "commit", "nth": 2},
}


@pytest.fixture
def job(tmp_path, make_chat):
    """`job(task, name=, size=, faults=, env=)`: the exit codes of 8 steps with checkpoints every 2."""
    sums = [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in itertools.product(range(3), range(3))]
    _, prompts = make_chat(sums, "--form", "prompts", "--chat-template", "plain", "--seqlen", "40", name="prompts")
    rows = [{"prompt": f"{a}?", "chosen": "yes", "rejected": "no no"} for a in range(9)]
    _, pairs = make_chat(rows, "--form", "pairs", "--seqlen", "60", name="pairs")
    torch.manual_seed(3)
    model = create_model(ModelConfig(**MODEL))
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    torch.save({"state_dict": model.state_dict(), "config": {"model": model.config.to_dict()}}, tmp_path / "base.pt")
    rl = ["--prompts", f"{prompts}/prompts.jsonl", "--reward", "rl_rewards:digits", "--rollout-prompts", "4",
          "--group-size", "4", "--rollout-tokens", "6", "--rl-minibatches", "2", "--show-rollouts-every", "1",
          "--kl-coefficient", "0.05"]  # fmt: skip
    data = ["--dataset-manifest", f"{pairs}/manifest.jsonl", "--global-batch-size", "4", "--multiple-data-passes"]

    def run(task, *extra, name, size=1, **options):
        words = [
            "--task", task, *(data if task == "dpo" else rl), "--pretrained", tmp_path / "base.pt", "--model",
            tmp_path / "model.json", "--train-steps", "8", "--save-every-steps", "2", "--lr", "1e-2", "--warmup", "0",
            "--device", "cpu", "--precision", "fp32", "--log-every-n-steps", "1", "--workers", "0", "--logs-dir",
            tmp_path / "logs", "--name", name, *extra,
        ]  # fmt: skip
        return run_ranks(words, size, timeout=120, **options)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("task", "size"), [("grpo", 1), ("grpo", 2), ("ppo", 2), ("dpo", 2)])
def test_a_killed_job_repeats_the_straight_one_bit_for_bit(tmp_path, job, task, size):
    codes, output = job(task, name="straight", size=size)
    assert set(codes) == {0}, output
    for name in KILLS if task == "dpo" else (*KILLS, "rollout"):
        if name == "rollout":
            reward = ["--reward", "rl_rewards:killing"]
            codes, output = job(task, *reward, name=name, size=size, env={"KILL_AT_ANSWER": str(40 // size)})
        else:
            killed = {"rank": size - 1 if name == "update" else 0, "do": "kill", **KILLS[name]}  # rank 0 writes files
            codes, output = job(task, name=name, size=size, faults=[killed])
        assert -signal.SIGKILL in codes, (name, output)
        codes, output = job(task, "--resume", "latest", name=name, size=size)
        assert set(codes) == {0}, (name, output)
        expected, found = weights(tmp_path, "straight"), weights(tmp_path, name)
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name
        if task != "dpo":
            shown = [(folder_of(tmp_path, run) / "rollouts.jsonl").read_text() for run in ("straight", name)]
            assert shown[0] == shown[1], name
