"""Flags that the chosen task would not look at are refused by name, and so are data it has no loss for."""

import json

import pytest
from runs import flags as run_flags
from runs import write_data

from open_lm.errors import ConfigError
from open_lm.main import main
from open_lm.params import parse_args, read_config
from open_lm.post_training.config import TASKS

DATA = ["--dataset-manifest", "manifest.jsonl", "--pretrained", "base.pt"]
PROMPTS = ["--prompts", "prompts.jsonl", "--reward", "rewards:right", "--pretrained", "base.pt"]


@pytest.mark.parametrize(
    ("task", "flags", "match"),
    [
        ("dpo", [*DATA, "--neftune-alpha", "5"], "--neftune-alpha belongs to --task sft"),
        ("reward", [*DATA, "--z-loss-coefficient", "1e-4"], "--z-loss-coefficient belongs to --task pretrain, sft"),
        ("dpo", [*DATA, "--distill-pretrained", "teacher.pt"], "--distill-pretrained belongs to --task pretrain, sft"),
        ("grpo", [*PROMPTS, "--distill-pretrained", "teacher.pt"], "--distill-pretrained belongs to"),
        ("dpo", [*DATA, "--label-smoothing", "0.1"], "--label-smoothing belongs to --task cdpo, robust"),
        ("sft", [*DATA, "--beta", "0.2"], "--beta belongs to --task dpo,"),
        ("simpo", [*DATA, "--desirable-weight", "2"], "--desirable-weight belongs to --task kto"),
        ("reward", [*DATA, "--reference", "ref.pt"], "--reference belongs to"),
        ("sft", [*DATA, "--rl-epochs", "2"], "--rl-epochs belongs to --task grpo, rloo, ppo"),
        ("sft", [*DATA, *PROMPTS[:4]], "--prompts belongs to --task grpo"),
        ("grpo", [*PROMPTS, "--value-clip", "0.1"], "--value-clip belongs to --task ppo"),
        ("ppo", [*PROMPTS, "--no-advantage-std"], "--advantage-std belongs to --task grpo"),
        ("grpo", [*PROMPTS, *DATA[:2]], "--dataset-manifest belongs to"),
        ("grpo", [*PROMPTS, "--reference", "ref.pt"], "--reference is asked for --kl-coefficient alone"),
        ("grpo", [*PROMPTS, "--kl-in", "reward"], "--kl-in says where --kl-coefficient counts"),
    ],
)
def test_flags_of_other_tasks_are_refused(task, flags, match):
    with pytest.raises(ConfigError, match=match):
        read_config(parse_args(["--task", task, *flags]))


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("sft", [*DATA, "--neftune-alpha", "5", "--z-loss-coefficient", "1e-4", "--distill-pretrained", "teacher.pt"]),
        ("cdpo", [*DATA, "--label-smoothing", "0.1", "--beta", "0.2", "--reference-log-probs", "ref.npz"]),
        ("ppo", [*PROMPTS, "--value-clip", "0.1", "--kl-coefficient", "0.1", "--kl-in", "reward", "--reference", "r"]),
    ],
)
def test_flags_of_the_task_are_read(task, flags):
    assert read_config(parse_args(["--task", task, *flags])).task.task == task


def test_a_task_of_ones_own_may_look_at_any_flag(monkeypatch):
    monkeypatch.setitem(TASKS, "own", "open_lm.post_training.tasks:PRETRAIN")
    assert read_config(parse_args(["--task", "own", *DATA, "--beta", "0.2"])).preferences.beta == 0.2


def test_validation_data_of_pairs_or_for_a_reward_model_are_refused(tmp_path, make_chat):
    rows = [{"prompt": f"{k}?", "chosen": "yes", "rejected": "no"} for k in range(4)]
    _, folder = make_chat(rows, "--form", "pairs", "--seqlen", "40", name="pairs")
    (tmp_path / "model.json").write_text(
        json.dumps({"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": 40, "vocab_size": 400})
    )
    pairs = f"{folder}/manifest.jsonl"
    common = ["--model", str(tmp_path / "model.json"), "--device", "cpu", "--train-steps", "1", "--global-batch-size",
              "2", "--workers", "0", "--warmup", "0", "--logs-dir", str(tmp_path / "logs")]  # fmt: skip
    simpo = ["--task", "simpo", "--dataset-manifest", pairs, "--val-data", pairs]
    with pytest.raises(ConfigError, match=r"--val-data .* holds pairs.*openlm evaluate --reward"):
        main([*simpo, "--name", "a", *common])
    with pytest.raises(ConfigError, match=r"--val-data .*a reward model predicts no tokens"):
        main(["--task", "reward", *simpo[2:], "--name", "b", *common])


def test_validation_data_of_samples_still_work_beside_preferences(tmp_path):
    manifest = write_data(tmp_path / "data")
    found = main(run_flags(tmp_path, manifest, "--val-data", manifest, steps=1))
    assert found.folder
