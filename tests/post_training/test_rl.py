"""Reinforcement learning: tables worked by hand, ratios, exact resumption, and rewards that are no numbers."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from runs import ROOT, folder_of, metrics, run_command, weights

from open_lm.data.batch import IGNORED, Batch
from open_lm.errors import ConfigError, DataError
from open_lm.generation.config import GenerateConfig
from open_lm.generation.decode import generate
from open_lm.generation.text import Text
from open_lm.main import main
from open_lm.mesh import MeshShape, parse_mesh
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.params import parse_args, read_config
from open_lm.post_training import verifiers
from open_lm.post_training.advantages import generalised, group_relative, leave_one_out
from open_lm.post_training.config import RLConfig
from open_lm.post_training.policy import PolicyGradient
from open_lm.post_training.reward_model import add_value_head
from open_lm.post_training.rollouts import write_together
from open_lm.run.check_mesh import check_mesh

MODEL = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 60, "vocab_size": 400, "model_norm": "rms_norm"}


def test_advantages_equal_tables_worked_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    std = math.sqrt(1 / 3)
    expected = [0.5 / (std + 1e-4) * s for s in (1, -1, -1, 1)] + [0.0] * 4
    assert group_relative(rewards, 4, by_std=True).tolist() == pytest.approx(expected, rel=1e-12)
    assert group_relative(rewards, 4, by_std=False).tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0])
    assert leave_one_out(rewards, 4).tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, 0, 0])
    rewards = torch.tensor([[0.0, 1.0, 2.0, 9.0], [3.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, 1.5, 9.0], [1.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
    is_target = torch.tensor([[True, True, True, False], [True, False, False, False]])
    third = 2.0 - 1.5
    second = 1.0 + 0.9 * 1.5 - 1.0 + 0.9 * 0.8 * third
    first = 0.0 + 0.9 * 1.0 - 0.5 + 0.9 * 0.8 * second
    advantages, returns = generalised(rewards, values, is_target, 0.9, 0.8)
    assert advantages.flatten().tolist() == pytest.approx([first, second, third, 0, 2.0, 0, 0, 0], rel=1e-12)
    assert returns[0].tolist() == pytest.approx([first + 0.5, second + 1.0, third + 1.5, 0], rel=1e-12)


def objective(kind, **settings):
    torch.manual_seed(0)
    model = create_model(ModelConfig(**MODEL)).double()
    ids = torch.randint(0, 400, (3, 7), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[:, :2], targets[1, 4:] = IGNORED, IGNORED
    is_target = targets != IGNORED
    log_p = model(ids[:, :-1])[0].double().log_softmax(-1)
    own = log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0] * is_target
    generator = torch.Generator().manual_seed(2)
    moved = own.detach() + 0.4 * torch.randn(own.shape, generator=generator, dtype=torch.float64) * is_target
    advantage = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)[:, None] * is_target
    extras = {"old": moved, "advantage": advantage, "reference": moved - 0.1 * is_target}
    extras |= {"reward": torch.ones(3), "finished": torch.ones(3)}
    batch = Batch(ids[:, :-1], targets, extras=extras)
    return PolicyGradient(kind, RLConfig(**settings)), model, batch, own, is_target


@pytest.mark.parametrize("mean", ["tokens", "sequences"])
def test_the_clipped_loss_and_its_gradient_equal_the_formula(mean):
    task, model, batch, own, is_target = objective("grpo", kl_coefficient=0.3, rl_loss_mean=mean, clip_high=0.3)
    ratio = (own - batch.extras["old"]).exp()
    a = batch.extras["advantage"]
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a)
    d = batch.extras["reference"] - own
    loss = (loss + 0.3 * (d.exp() - d - 1)) * is_target
    expected = loss.sum() / is_target.sum() if mean == "tokens" else (loss.sum(1) / is_target.sum(1)).mean()
    gradient = torch.autograd.grad(expected, model.layers[0].attention.in_proj.weight)[0]
    losses = task.loss_sums(model, batch)
    got = losses.total / task.count(batch)[0]
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got, model.layers[0].attention.in_proj.weight)[0], gradient, rtol=1e-4, atol=1e-7
    )
    assert len(losses.parts) == len(task.names) == len(task.count(batch))


def test_rloo_takes_the_ratio_of_whole_answers():
    task, model, batch, own, is_target = objective("rloo")
    ratio = ((own - batch.extras["old"]) * is_target).sum(1).exp()
    a = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    expected = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    assert (task.loss_sums(model, batch).total / 3).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_losses_of_ppo_equal_a_table_worked_by_hand():
    task, d = PolicyGradient("ppo", RLConfig(value_clip=0.5, clip_low=0.2, clip_high=0.3)), torch.float64
    # new and old value, return: inside the clip; beyond it and clipped is worse; beyond it and unclipped is worse
    value, old, returns = (torch.tensor([row], dtype=d) for row in ([1.2, 3.0, 3.0], [1.0, 1.0, 1.0], [0.0, 4.0, 1.0]))
    got = task._value_loss(value, {"value": old, "return": returns})
    assert got[0].tolist() == pytest.approx([0.5 * 1.44, 0.5 * (1.5 - 4) ** 2, 0.5 * 4.0], rel=1e-12)
    ratio = torch.tensor([[0.5, 1.1, 1.5, 0.5, 1.1, 1.5]], dtype=d)
    advantage = torch.tensor([[2.0, 2.0, 2.0, -2.0, -2.0, -2.0]], dtype=d)
    loss, clipped, _ = task._surrogate(ratio.log(), advantage, torch.ones(1, 6, dtype=torch.bool))
    assert loss[0].tolist() == pytest.approx([-1.0, -2.2, -2.6, 1.6, 2.2, 3.0], rel=1e-12)
    assert clipped[0].tolist() == [False, False, True, True, False, False]


def test_ppo_adds_the_loss_of_the_value_head_at_its_targets():
    task, model, batch, own, is_target = objective("ppo", value_coefficient=0.25)
    add_value_head(model)
    torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    old, returns = (torch.randn(own.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = replace(batch, extras={**batch.extras, "value": old, "return": returns})
    value = model(batch.inputs_BT, head=lambda hidden, _: model.value_head(hidden))[..., 0]
    near = old + (value - old).clamp(-0.2, 0.2)
    value_loss = 0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2)
    ratio, a = (own - batch.extras["old"]).exp(), batch.extras["advantage"]
    surrogate = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    expected = ((surrogate + 0.25 * value_loss) * is_target).sum() / is_target.sum()
    gradients = torch.autograd.grad(expected, (model.value_head.weight, model.layers[0].attention.in_proj.weight))
    losses = task.loss_sums(model, batch)
    got = losses.total / task.count(batch)[0]
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    parts = dict(zip(task.names, (losses.parts / task.count(batch)).tolist(), strict=True))
    assert parts["value_loss"] == pytest.approx(((value_loss * is_target).sum() / is_target.sum()).item(), rel=1e-5)
    found = torch.autograd.grad(got, (model.value_head.weight, model.layers[0].attention.in_proj.weight))
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)


@pytest.fixture
def learn(tmp_path, make_chat):
    """`learn(*flags, name=, iterations=)` runs reinforcement learning on prompts whose answers are known."""
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in itertools.product(range(3), range(3))]
    _, folder = make_chat(rows, "--form", "prompts", "--chat-template", "plain", "--seqlen", "40", name="prompts")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    torch.manual_seed(3)
    model = create_model(ModelConfig(**MODEL))
    base = str(tmp_path / "base.pt")
    torch.save({"state_dict": model.state_dict(), "config": {"model": model.config.to_dict()}}, base)

    def flags(*extra, task="grpo", name="run", steps=8):
        return [
            "--task", task, "--prompts", f"{folder}/prompts.jsonl", "--reward", "rl_rewards:digits",
            "--model", str(tmp_path / "model.json"), "--pretrained", base, "--train-steps", str(steps),
            "--rollout-prompts", "4", "--group-size", "4", "--rollout-tokens", "6", "--rl-minibatches", "2",
            "--lr", "3e-3", "--warmup", "0", "--device", "cpu", "--precision", "fp32", "--log-every-n-steps", "1",
            "--workers", "0", "--logs-dir", str(tmp_path / "logs"), "--name", name, *extra,
        ]  # fmt: skip

    def train(*extra, **options):
        return main(flags(*extra, **options))

    train.flags, train.base = flags, base
    return train


@pytest.mark.parametrize("task", ["grpo", "rloo", "ppo"])
def test_the_ratio_is_one_in_the_first_minibatch_and_not_in_the_second(tmp_path, learn, task):
    learn(task=task)
    deviations = list(metrics(tmp_path, key="train/ratio_deviation").values())
    assert max(deviations[::2]) < 1e-5
    assert min(deviations[1::2]) > 1e-4


def test_rewards_rise_and_answers_are_shown(tmp_path, learn):
    learn("--show-rollouts-every", "2", "--lr", "3e-2", steps=40)
    rewards = list(metrics(tmp_path, key="train/reward").values())
    assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8 + 0.2
    lines = (folder_of(tmp_path) / "rollouts.jsonl").read_text().splitlines()
    assert len(lines) == 10 * 16
    assert set(json.loads(lines[0])) == {"iteration", "prompt", "answer", "reward"}


@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_a_killed_run_repeats_the_straight_one_bit_for_bit(tmp_path, learn, task):
    flags = ["--kl-coefficient", "0.05", "--rl-epochs", "2", "--show-rollouts-every", "1"]
    learn(*flags, task=task, name="whole")
    learn(*flags, "--save-every-steps", "3", "--stop-at-step", "4", task=task, name="again")
    saved = [p.name for p in (folder_of(tmp_path, "again") / "checkpoints").glob("epoch_*.pt")]
    assert saved == ["epoch_0-step4.pt"]  # asked for after 3 steps, inside an iteration
    learn(*flags, "--resume", "latest", task=task, name="again")
    for name, tensor in weights(tmp_path, "whole").items():
        assert torch.equal(tensor, weights(tmp_path, "again")[name]), name
    shown = [(folder_of(tmp_path, name) / "rollouts.jsonl").read_text() for name in ("whole", "again")]
    assert shown[0] == shown[1] and len(shown[0].splitlines()) == 2 * 16


def test_answers_that_are_written_again_after_a_kill_are_shown_once(tmp_path, learn):
    flags = ["--show-rollouts-every", "1", "--save-every-steps", "4"]
    learn(*flags, name="whole")
    learn(*flags, "--stop-at-step", "4", name="again")
    path = folder_of(tmp_path, "again") / "rollouts.jsonl"
    path.write_text(path.read_text() + '{"iteration":2,"prompt":"x","answer":"lost","reward":0}\n{"itera')  # a kill
    learn(*flags, "--resume", "latest", name="again")
    assert path.read_text() == (folder_of(tmp_path, "whole") / "rollouts.jsonl").read_text()


def test_accumulation_changes_nothing(tmp_path, learn):
    learn(name="one")
    learn("--accum-freq", "4", name="four")
    one, four = (list(metrics(tmp_path, name).values()) for name in ("one", "four"))
    assert four == pytest.approx(one, abs=1e-5)


def test_a_reward_model_scores_and_the_adapter_learns(tmp_path, learn, make_chat):
    rows = [{"prompt": f"{a}?", "chosen": "1", "rejected": "b b"} for a in range(8)]
    _, pairs = make_chat(rows, "--form", "pairs", "--chat-template", "plain", "--seqlen", "60", name="pairs")
    common = ["--device", "cpu", "--precision", "fp32", "--workers", "0", "--logs-dir", str(tmp_path / "logs")]
    reward = main(
        ["--task", "reward", "--dataset-manifest", f"{pairs}/manifest.jsonl", "--pretrained", learn.base,
         "--train-steps", "4", "--global-batch-size", "4", "--multiple-data-passes", "--name", "rm", *common]
    )  # fmt: skip
    learn("--reward", reward.folder, "--lora-rank", "2", "--kl-coefficient", "0.1", steps=2)
    assert set(metrics(tmp_path, key="train/reward")) == {1, 2}


@pytest.mark.parametrize(
    ("reward", "error", "match"),
    [
        ("rl_rewards:broken", DataError, "raised ZeroDivisionError"),
        ("rl_rewards:nan", DataError, "gave nan on the answer"),
        ("rl_rewards:missing", ConfigError, "has no attribute"),
        ("no_such_module:x", ConfigError, "No module named"),
    ],
)
def test_a_reward_that_is_no_number_stops_the_run(learn, reward, error, match):
    with pytest.raises(error, match=match):
        learn("--reward", reward)


def test_lengths_and_settings_that_cannot_be_honoured_are_refused(learn, tmp_path):
    with pytest.raises(ConfigError, match="an iteration takes 2 steps"):
        learn(steps=7)
    with pytest.raises(ConfigError, match="do not divide"):
        learn("--accum-freq", "3")
    with pytest.raises(ConfigError, match="give --prompts and --reward"):
        main(["--task", "grpo", "--dataset-type", "synthetic", "--train-steps", "2", "--logs-dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--fsdp"], "--fsdp"),
        (["--mesh", "fsdp=2"], "--mesh fsdp=2"),
        (["--mesh", "dp=1,fsdp=2"], "--mesh fsdp=2"),
        (["--mesh", "tp=2"], "--mesh tp=2"),
    ],
)
def test_ranks_that_hold_only_shares_of_the_model_are_refused(learn, flags, asked):
    architecture, shape = ModelConfig(**MODEL), parse_mesh(flags[1]) if flags[1:] else {"fsdp": 2}
    nf4 = ["--lora-base", "nf4", "--lora-rank", "2"]
    sft = ["--task", "sft", "--dataset-manifest", "manifest.jsonl"]
    for given, match in ((learn.flags(), "--task grpo writes answers"), (sft, "--lora-base nf4: each rank holds")):
        config = read_config(parse_args([*given, *flags, *nf4]))
        with pytest.raises(ConfigError, match=f"{match}.*leave out {asked}"):
            check_mesh(config, architecture, MeshShape(**shape))


def test_verifiers():
    assert verifiers.exact(" 4 ", {"answer": 4}) == 1 and verifiers.exact("44", {"answer": "4"}) == 0
    assert (
        verifiers.last_number("so 1,000 it is", {"answer": "#### 1000"}) == 1
        and verifiers.last_number("none", {"answer": "1"}) == 0
    )
    row = {"tests": [{"contains": "a"}, {"matches": "^b"}, {"equals": "abc"}]}
    assert verifiers.tests("abc", row) == pytest.approx(2 / 3)


def test_answers_written_together_are_those_written_alone():
    torch.manual_seed(0)
    model = create_model(ModelConfig(**MODEL)).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 400, (n,), generator=generator).tolist() for n in (3, 9, 5, 12)]
    for settings in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 1.0, "seed": 5}):
        config = GenerateConfig(max_gen_len=8, **settings)
        expected = generate(model, prompts, config, stop_ids=[7])
        texts = [Text(prompt, config, 8, [7], copy=0) for prompt in prompts]
        with torch.inference_mode():
            write_together(model, texts)
        assert [text.written() for text in texts] == expected


def test_log_probs_that_are_computed_again_before_each_step_are_noticed(tmp_path, learn, monkeypatch):
    """EasyLM's fault, planted: the tests of the loss and of the ratio must fail under it."""
    honest = PolicyGradient._surrogate
    monkeypatch.setattr(PolicyGradient, "_surrogate", lambda self, d, a, t: honest(self, d - d.detach(), a, t))
    with pytest.raises(AssertionError):
        test_the_clipped_loss_and_its_gradient_equal_the_formula("tokens")
    with pytest.raises(AssertionError):
        test_rloo_takes_the_ratio_of_whole_answers()
    with pytest.raises(AssertionError):
        test_the_ratio_is_one_in_the_first_minibatch_and_not_in_the_second(tmp_path, learn, "grpo")


def test_models_of_transformers_learn_from_a_reward_model_of_transformers(tmp_path, learn, make_chat, llama):
    rows = [{"prompt": f"{a}?", "chosen": "1", "rejected": "b b"} for a in range(8)]
    _, pairs = make_chat(rows, "--form", "pairs", "--chat-template", "plain", "--seqlen", "60", name="pairs")
    hf = ["--hf-model", llama, "--hf-seq-len", "60"]
    common = ["--device", "cpu", "--precision", "fp32", "--workers", "0", "--logs-dir", str(tmp_path / "logs")]
    reward = main(
        ["--task", "reward", "--dataset-manifest", f"{pairs}/manifest.jsonl", *hf, "--train-steps", "6", "--lr", "1e-2",
         "--warmup", "0", "--global-batch-size", "4", "--multiple-data-passes", "--name", "rm", *common,
         "--log-every-n-steps", "1"]
    )  # fmt: skip
    assert metrics(tmp_path, "rm", "train/preference_accuracy")[6] == 1
    flags = learn.flags("--kl-coefficient", "0.1", "--lora-rank", "2", *hf, steps=4)
    flags[flags.index("--reward") + 1] = reward.folder
    for name in ("--model", "--pretrained"):
        at = flags.index(name)
        del flags[at : at + 2]
    main(flags)
    deviations = list(metrics(tmp_path, key="train/ratio_deviation").values())
    assert max(deviations[::2]) < 1e-5 < min(deviations[1::2])
    assert all(map(math.isfinite, metrics(tmp_path, key="train/reward").values()))
    for broken, match in (("rl_rewards:broken", "raised ZeroDivisionError"), ("rl_rewards:nan", "gave nan")):
        flags[flags.index("--reward") + 1], flags[flags.index("--name") + 1] = broken, broken[-3:]
        with pytest.raises(DataError, match=match):
            main(flags)


@pytest.fixture
def llama(tmp_path):
    """The folder of a tiny Llama of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "llama"
    )
    return str(tmp_path / "llama")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_two_ranks_learn_as_one(tmp_path, learn, task):
    """With one minibatch a step takes all answers, so that who wrote them makes no difference."""
    flags = ["--rl-minibatches", "1", "--kl-coefficient", "0.1", "--kl-in", "reward", "--show-rollouts-every", "1"]
    learn(*flags, task=task, name="one", steps=4)
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = run_command(learn.flags(*flags, task=task, name="two", steps=4), ranks=2, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    for key in ("train/loss", "train/reward", "train/grad_norm", "train/answer_tokens"):
        one, two = (list(metrics(tmp_path, name, key).values()) for name in ("one", "two"))
        assert two == pytest.approx(one, abs=2e-5), key
    torch.testing.assert_close(weights(tmp_path, "two"), weights(tmp_path, "one"), rtol=1e-4, atol=1e-5)
    one, two = ((folder_of(tmp_path, name) / "rollouts.jsonl").read_text() for name in ("one", "two"))
    assert two == one
