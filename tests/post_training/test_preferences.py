"""Preferences and reward models: losses by hand in fp64, the reference in its three forms, whole runs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import metrics, weights

from open_lm.checkpoint.load_model import load_model
from open_lm.data.batch import IGNORED, Batch
from open_lm.errors import CheckpointError, ConfigError
from open_lm.main import main
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.post_training.config import PREFERENCE_LOSSES, PreferenceConfig
from open_lm.post_training.log_probs import linear_log_probs
from open_lm.post_training.preference_losses import Pairs, Side, kto
from open_lm.post_training.preferences import mismatched
from open_lm.post_training.reference_log_probs import main as compute_reference
from open_lm.post_training.reward_model import add_value_head, load_reward_model, rewards_of

MODEL = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 120, "vocab_size": 400, "model_norm": "rms_norm"}
ROWS = [
    {"prompt": f"What is {a} plus {b}?", "chosen": f"{a + b}.", "rejected": "No idea at all", "margin": a / 8}
    for a in range(4) for b in range(4)
]  # fmt: skip


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_each_loss_equals_its_formula_worked_by_hand():
    d = torch.float64
    chosen = Side(torch.tensor([-5.0], dtype=d), torch.tensor([-6.0], dtype=d), torch.tensor([4]))
    rejected = Side(torch.tensor([-9.0], dtype=d), torch.tensor([-7.0], dtype=d), torch.tensor([3]))
    pairs = Pairs(chosen, rejected, torch.ones(1, dtype=d))
    h, mean_h = 1.0 - -2.0, 1 / 4 + 2 / 3
    odds = [math.log(math.exp(m) / (1 - math.exp(m))) for m in (-5 / 4, -3.0)]
    expected = {
        "dpo": -math.log(sigmoid(0.3 * h)),
        "dpo-norm": -math.log(sigmoid(0.3 * mean_h)),
        "cdpo": -0.8 * math.log(sigmoid(0.3 * h)) - 0.2 * math.log(sigmoid(-0.3 * h)),
        "robust": (-0.8 * math.log(sigmoid(0.3 * h)) + 0.2 * math.log(sigmoid(-0.3 * h))) / 0.6,
        "ipo": (mean_h - 1 / 0.6) ** 2,
        "hinge": max(0, 1 - 0.3 * h),
        "simpo": -math.log(sigmoid(0.3 * (-5 / 4 + 3) - 0.5)),
        "orpo": 5 / 4 - 0.3 * math.log(sigmoid(odds[0] - odds[1])),
    }
    assert set(expected) == set(PREFERENCE_LOSSES)
    config = PreferenceConfig(beta=0.3, label_smoothing=0.2)
    for name, value in expected.items():
        assert PREFERENCE_LOSSES.load(name)(pairs, config).item() == pytest.approx(value, rel=1e-9), name
    ratios = torch.tensor([[1.0, -2.0]], dtype=d)
    got = kto(ratios, torch.tensor([True, False]), torch.tensor(0.5), replace(config, undesirable_weight=2.0))
    assert got[0].tolist() == pytest.approx([1 - sigmoid(0.3 * 0.5), 2 * (1 - sigmoid(0.3 * 2.5))], rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_their_gradients_equal_plain_torch(temperature):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(60, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 60, (300,), generator=generator)
    targets[::7] = IGNORED
    upstream = torch.randn(300, dtype=torch.float64, generator=generator)
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    expected = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    gradients = torch.autograd.grad(expected @ upstream, (hidden, weight))
    got = linear_log_probs(hidden, weight, targets, temperature)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got @ upstream, (hidden, weight)), gradients)


@pytest.fixture
def pairs(tmp_path, make_chat):
    """`pairs(*flags, name=, steps=)` trains on pairs, from a base model that `base` holds."""
    _, folder = make_chat(ROWS, "--form", "pairs", name="pairs")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    torch.manual_seed(3)
    model = create_model(ModelConfig(**MODEL))
    base = tmp_path / "base.pt"
    torch.save({"state_dict": model.state_dict(), "config": {"model": model.config.to_dict()}}, base)

    def train(*flags, name="run", steps=4):
        manifest = f"{folder}/manifest.jsonl"
        model = ["--model", str(tmp_path / "model.json"), "--pretrained", str(base), "--train-steps", str(steps)]
        args = [*model, "--multiple-data-passes", "--lr", "3e-3", *flags]
        return run_pairs(tmp_path, manifest, args, name)

    train.base, train.folder = str(base), folder
    return train


def run_pairs(tmp_path, manifest, args, name):
    from open_lm.main import main

    common = ["--dataset-manifest", manifest, "--device", "cpu", "--precision", "fp32", "--global-batch-size", "8"]
    common += ["--warmup", "0", "--log-every-n-steps", "1", "--workers", "0", "--logs-dir", str(tmp_path / "logs")]
    return main([*common, "--name", name, *args])


@pytest.mark.parametrize(
    ("task", "loss"),
    [("dpo", math.log(2)), ("cdpo", math.log(2)), ("robust", math.log(2)), ("dpo-norm", math.log(2)),
     ("ipo", 25.0), ("hinge", 1.0), ("kto", 0.5)],
)  # fmt: skip
def test_the_first_loss_is_that_of_a_model_that_is_its_reference(tmp_path, pairs, task, loss):
    pairs("--task", task, steps=3)
    losses = list(metrics(tmp_path).values())
    assert losses[0] == pytest.approx(loss, rel=1e-5)
    assert losses[-1] < losses[0]
    assert metrics(tmp_path, key="train/reward_margin")[3] > 0


@pytest.mark.parametrize("task", ["simpo", "orpo"])
def test_losses_without_a_reference_learn_the_preference(tmp_path, pairs, task):
    pairs("--task", task, steps=6)
    margins = list(metrics(tmp_path, key="train/reward_margin").values())
    assert margins[-1] > margins[0]
    with pytest.raises(ConfigError, match="--reference belongs to"):
        pairs("--task", task, "--reference", pairs.base, name="x")


def test_cached_and_live_references_and_any_accumulation_train_alike(tmp_path, pairs):
    cache = str(tmp_path / "reference.npz")
    compute_reference(
        ["--checkpoint", pairs.base, "--dataset-manifest", f"{pairs.folder}/manifest.jsonl", "--out", cache]
    )
    pairs("--task", "dpo", name="live")
    pairs("--task", "dpo", "--reference-log-probs", cache, "--accum-freq", "4", name="cached")
    live, cached = (list(metrics(tmp_path, name).values()) for name in ("live", "cached"))
    assert cached == pytest.approx(live, abs=2e-6)
    other = torch.load(pairs.base, weights_only=True)
    other["state_dict"]["norm.weight"][0] += 1e-3
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="computed with other weights"):
        pairs("--task", "dpo", "--reference-log-probs", cache, "--pretrained", str(tmp_path / "other.pt"), name="x")


def test_a_cache_of_other_tokens_is_refused(tmp_path, pairs, make_chat):
    _, other = make_chat(ROWS[:4], "--form", "pairs", name="fewer")
    cache = str(tmp_path / "reference.npz")
    compute_reference(["--checkpoint", pairs.base, "--dataset-manifest", f"{other}/manifest.jsonl", "--out", cache])
    with pytest.raises(ConfigError, match="computed of other data"):
        pairs("--task", "dpo", "--reference-log-probs", cache)


def test_the_model_with_its_adapter_off_is_the_reference(tmp_path, pairs):
    pairs("--task", "dpo", "--lora-rank", "4", "--lr", "3e-2", name="off")
    pairs("--task", "dpo", "--lora-rank", "4", "--lr", "3e-2", "--reference", pairs.base, name="live")
    off, live = (list(metrics(tmp_path, name).values()) for name in ("off", "live"))
    assert off == pytest.approx(live, abs=1e-6)
    assert off[0] == pytest.approx(math.log(2), rel=1e-5) and off[-1] < off[0]


@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_a_killed_run_resumes_bit_equal(tmp_path, pairs, task):
    pairs("--task", task, name="whole")
    pairs("--task", task, "--save-every-steps", "2", "--stop-at-step", "2", name="again")
    pairs("--task", task, "--resume", "latest", name="again")
    for name, tensor in weights(tmp_path, "whole").items():
        assert torch.equal(tensor, weights(tmp_path, "again")[name]), name


def test_kto_measures_its_divergence_on_the_answers_of_others():
    X = IGNORED
    batch = Batch(
        torch.tensor([[1, 2, 3, 4, 0], [1, 2, 5, 0, 0], [6, 7, 8, 9, 9], [6, 7, 8, 4, 0]]),
        torch.tensor([[X, 3, 4, 2, X], [X, 5, 2, X, X], [X, X, 9, 9, 2], [X, X, 4, 2, X]]),
        group=2,
    )
    other = mismatched(batch)
    assert other.inputs_BT.tolist() == [[1, 2, 9, 9, 2], [1, 2, 4, 2, 0], [6, 7, 8, 3, 4], [6, 7, 8, 5, 2]]
    assert other.targets_BT.tolist() == [[X, 9, 9, 2, X], [X, 4, 2, X, X], [X, X, 3, 4, 2], [X, X, 5, 2, X]]


def test_a_reward_model_learns_margins_and_scores_whatever_the_padding(tmp_path, pairs):
    result = pairs("--task", "reward", "--reward-centring", "0.01", "--lr", "1e-2", steps=12)
    assert metrics(tmp_path)[1] == pytest.approx(np.mean([-math.log(sigmoid(-a / 8)) for a in range(4)]), abs=0.05)
    assert metrics(tmp_path, key="train/preference_accuracy")[12] == 1
    model = load_reward_model(result.folder, "cpu")
    ids = torch.randint(0, 400, (1, 9), generator=torch.Generator().manual_seed(0))
    short = Batch(ids[:, :-1], torch.cat([torch.full((1, 4), IGNORED), ids[:, 5:]], 1))
    long = Batch(
        torch.nn.functional.pad(torch.cat([short.inputs_BT] * 2), (0, 7), value=3),
        torch.nn.functional.pad(torch.cat([short.targets_BT] * 2), (0, 7), value=IGNORED),
    )
    values = model(ids, head=lambda hidden, _: model.value_head(hidden))[0, :, 0]
    assert rewards_of(model, short)[0].item() == pytest.approx(values[-1].item(), abs=1e-6)
    assert rewards_of(model, long).tolist() == pytest.approx([values[-1].item()] * 2, abs=1e-6)
    assert load_model(result.folder)(ids)[0].shape == (1, 9, 400)
    with pytest.raises(CheckpointError, match="no value head"):
        load_reward_model(pairs.base, "cpu")


def test_the_reward_loss_is_the_formula(tmp_path):
    from open_lm.post_training.reward_model import RewardModelling

    torch.manual_seed(0)
    model = create_model(ModelConfig(**MODEL)).double()
    add_value_head(model)
    torch.nn.init.normal_(model.value_head.weight)
    ids = torch.randint(0, 400, (4, 8))
    batch = Batch(ids[:, :-1], ids[:, 1:], group=2, extras={"margin": torch.tensor([0.5, 0.5, 0.0, 0.0])})
    r = model(ids, head=lambda hidden, _: model.value_head(hidden))[:, -1, 0].tolist()
    expected = [-math.log(sigmoid(r[0] - r[1] - 0.5)) + 0.1 * (r[0] + r[1]) ** 2]
    expected += [-math.log(sigmoid(r[2] - r[3])) + 0.1 * (r[2] + r[3]) ** 2]
    losses = RewardModelling(0.1).loss_sums(model, batch)
    assert losses.total.item() == pytest.approx(sum(expected), rel=1e-5)


def test_a_task_on_data_of_another_form_is_refused(tmp_path, pairs):
    with pytest.raises(ConfigError, match="holds pairs, --task needs samples"):
        pairs("--task", "sft")


def test_a_reward_model_with_a_table_of_positions_needs_one_behind_its_context(tmp_path, make_chat):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 400, "n_positions": 60, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    rows = [{"prompt": f"{a}?", "chosen": "1", "rejected": "b b"} for a in range(4)]
    for seq_len in (60, 59):
        _, pairs = make_chat(rows, "--form", "pairs", "--seqlen", str(seq_len), name=f"pairs{seq_len}")
        flags = ["--task", "reward", "--dataset-manifest", f"{pairs}/manifest.jsonl", "--hf-model",
                 str(tmp_path / "gpt2"), "--hf-seq-len", str(seq_len), "--train-steps", "1", "--global-batch-size", "2",
                 "--device", "cpu", "--precision", "fp32", "--workers", "0", "--logs-dir", str(tmp_path / "logs"),
                 "--name", f"rm{seq_len}", "--warmup", "0", "--log-every-n-steps", "1"]  # fmt: skip
        if seq_len == 60:
            with pytest.raises(ConfigError, match="--hf-seq-len 60: a reward is read at the token behind the context"):
                main(flags)
        else:
            main(flags)
    assert metrics(tmp_path, "rm59")[1] == pytest.approx(math.log(2), abs=1e-6)
