"""`openlm evaluate --reward`: the rewards of files are those that training compares, whatever they are batched with."""

import json

import pytest
import rl_rewards
import torch

from open_lm.__main__ import call
from open_lm.checkpoint.load_model import load_model
from open_lm.data.batch import Batch
from open_lm.data.tokenizer import load_tokenizer
from open_lm.errors import CheckpointError, ConfigError, DataError
from open_lm.generation.decode import generate
from open_lm.main import main
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.post_training.reward_model import load_reward_model, rewards_of

MODEL = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 40, "vocab_size": 400, "model_norm": "rms_norm"}
PAIRS = [{"prompt": f"{a} and {b}?", "chosen": str(a + b), "rejected": "no idea"} for a in range(4) for b in range(4)]


@pytest.fixture
def trained(tmp_path, make_chat):
    """The run folder of a small reward model, and the tokenizer's folder that it names."""
    _, folder = make_chat(PAIRS, "--form", "pairs", "--chat-template", "plain", "--seqlen", "40", name="pairs")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    torch.manual_seed(3)
    model = create_model(ModelConfig(**MODEL))
    torch.save({"state_dict": model.state_dict(), "config": {"model": model.config.to_dict()}}, tmp_path / "base.pt")
    return train_reward(tmp_path, folder, "--pretrained", str(tmp_path / "base.pt"))


def train_reward(tmp_path, folder, *flags, name="rm"):
    return main(
        ["--task", "reward", "--dataset-manifest", f"{folder}/manifest.jsonl", "--train-steps", "10", "--lr", "1e-2",
         "--global-batch-size", "8", "--multiple-data-passes", "--device", "cpu", "--precision", "fp32", "--workers",
         "0", "--warmup", "0", "--logs-dir", str(tmp_path / "logs"), "--name", name, *flags]
    ).folder  # fmt: skip


def score(tmp_path, reward, rows, *flags):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores"
    args = ["--reward", reward, "--input-files", str(path), "--output-dir", str(out), "--chat-template", "plain"]
    summary = call(["evaluate", *args, *flags])
    return summary, [json.loads(line) for line in (out / "rewards.jsonl").read_text().splitlines()]


def test_files_get_the_rewards_that_training_compares(tmp_path, trained, tokenizer_of):
    talks = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS[:3]]
    summary, lines = score(tmp_path, trained, [*PAIRS, *talks])
    assert summary["pairs"] == 16 and summary["accuracy"] == 1 and summary["rewards"] == 35
    tokenizer, model = load_tokenizer(str(tokenizer_of("neox"))), load_reward_model(trained, "cpu")
    for row, line in zip(PAIRS, lines, strict=False):
        assert {name: line[name] for name in row} == row
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[*tokenizer.encode(row["prompt"] + row[side]), tokenizer.eot_id]])
            alone = rewards_of(model, Batch(ids[:, :-1], ids[:, 1:])).item()
            assert line[f"reward_{side}"] == pytest.approx(alone, abs=1e-6)
    assert [line["reward"] for line in lines[16:]] == pytest.approx(
        [row["reward_chosen"] for row in lines[:3]], abs=1e-6
    )
    assert summary["mean"] == pytest.approx(
        sum(sum(row[name] for name in row if name.startswith("reward")) for row in lines) / 35, abs=1e-9
    )


def test_rows_that_cannot_be_scored_are_refused_or_counted_by_name(tmp_path, trained, tokenizer_of):
    long = {"prompt": "word " * 60, "completion": "x"}
    bad = [
        {"chosen": "a", "rejected": "a", "prompt": "b"},
        {"prompt": "q"},
        {"messages": [{"role": "x", "content": "y"}]},
    ]
    both_long = {"prompt": "word " * 60, "chosen": "x", "rejected": "y"}
    summary, lines = score(tmp_path, trained, [PAIRS[0], long, both_long, *bad], "--on-bad-line", "skip")
    assert len(lines) == 1 and summary["rows"] == 6
    assert summary["left_out"] == {"equal_sides": 1, "too_long": 2, "unknown_form": 1, "unknown_role": 1}
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: equal sides"):
        score(tmp_path, trained, [PAIRS[0], bad[0]])
    with pytest.raises(DataError, match="no row can be scored"):
        score(tmp_path, trained, [long])
    with pytest.raises(CheckpointError, match="no value head"):
        score(tmp_path, str(tmp_path / "base.pt"), PAIRS, "--tokenizer", str(tokenizer_of("neox")))
    for wrong in (["--reward", trained], ["--input-files", "x.jsonl"], ["--prompts", "x"]):
        with pytest.raises(ConfigError, match="--reward scores one of --input-files and --prompts"):
            call(["evaluate", *wrong])
    with pytest.raises(ConfigError, match="2 are given"):
        call(["evaluate", "--reward", trained, trained, "--input-files", "x"])


def test_the_answers_of_a_checkpoint_to_prompts_are_scored(tmp_path, trained, make_chat):
    rows = [{"question": f"{a} and {b}?", "answer": str(a + b)} for a in range(4) for b in range(3)]
    _, folder = make_chat(rows, "--form", "prompts", "--chat-template", "plain", "--seqlen", "40", name="prompts")
    base, out, digits = str(tmp_path / "base.pt"), tmp_path / "scores", "rl_rewards:digits"
    args = ["--checkpoint", base, "--prompts", f"{folder}/prompts.jsonl", "--output-dir", str(out)]
    summary = call(["evaluate", *args, "--reward", digits, trained, "--answer-tokens", "6"])
    lines = [json.loads(line) for line in (out / "rewards.jsonl").read_text().splitlines()]
    assert len(lines) == summary["answers"] == 12 and {line["answer"] for line in lines} == {
        row["answer"] for row in rows
    }
    written = generate(load_model(base), [line["prompt_ids"] for line in lines], temperature=0, max_gen_len=6)
    tokenizer, model = load_tokenizer(summary["tokenizer"]), load_reward_model(trained, "cpu")
    for line, ids in zip(lines, written, strict=True):
        assert line["answer_written"] == tokenizer.decode(ids)
        assert line["rewards"][digits] == rl_rewards.digits(line["answer_written"], line)
        whole = torch.tensor([[*line["prompt_ids"], *ids]])
        alone = rewards_of(model, Batch(whole[:, :-1], whole[:, 1:])).item()
        assert line["rewards"][trained] == pytest.approx(alone, abs=1e-6)
    cut = call(["evaluate", *args, "--reward", digits, "--answer-tokens", "400"])  # more than the context holds
    assert cut["finished_share"] == sum(len(ids) + len(line["prompt_ids"]) < 40 for ids, line in zip(
        generate(load_model(base), [line["prompt_ids"] for line in lines], temperature=0, max_gen_len=400), lines,
        strict=True)) / 12 < 1  # fmt: skip
    mean = sum(line["rewards"][digits] for line in lines) / 12
    assert summary["rewards"][digits]["mean"] == pytest.approx(mean, abs=1e-12)
