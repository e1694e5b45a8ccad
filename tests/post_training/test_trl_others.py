"""Fine-tuning, reward models and GRPO: losses and gradients equal TRL's on the same batches."""

import pytest
import torch
from trl_setup import PAD, ROWS, make_llama, make_tokenizer, ours_of, require_same_gradients, trainer_of

from open_lm.data.batch import IGNORED, Batch
from open_lm.post_training.config import RLConfig
from open_lm.post_training.policy import PolicyGradient
from open_lm.post_training.reward_model import RewardModelling, add_value_head
from open_lm.train.tasks import NextToken

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' <|endoftext|>' }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ ' ' }}{% endfor %}"
)
CHATS = [
    [("user", "1 2 3"), ("assistant", "4 5"), ("user", "6"), ("assistant", "7 8 9")],
    [("user", "11 12"), ("assistant", "13")],
    [("system", "20 21 22"), ("user", "23"), ("assistant", "24 25 26 27 28")],
]


def test_fine_tuning_equals_assistant_only_loss(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = make_llama(), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in CHATS]
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"), assistant_only_loss=True, per_device_train_batch_size=3, **settings
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    expected = trainer.compute_loss(model, batch)
    expected.backward()
    ours = ours_of(model, tmp_path / "ours")
    ids, labels = batch["input_ids"], batch["labels"]
    mine = Batch(ids[:, :-1], labels[:, 1:])
    assert (mine.targets_BT != IGNORED).sum() == sum(
        len(c.split()) + 1 for chat in CHATS for r, c in chat if r == "assistant"
    )
    loss = NextToken().loss_sums(ours, mine).total / mine.n_targets
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    require_same_gradients(model, ours)


def test_the_reward_loss_equals_trls(tmp_path):
    from transformers import LlamaForSequenceClassification

    base = make_llama()
    config = base.config
    config.num_labels = 1
    scorer = LlamaForSequenceClassification(config)
    scorer.model.load_state_dict(base.model.state_dict())
    rows = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in ROWS]
    settings = {"center_rewards_coefficient": 0.1}
    trainer = trainer_of("Reward", "trl", scorer, tmp_path, rows=rows, config=settings)
    batch = next(iter(trainer.get_train_dataloader()))
    scorer.train()
    expected = trainer.compute_loss(scorer, batch)
    expected.backward()
    ours = ours_of(base, tmp_path / "ours")
    add_value_head(ours)
    ours.value_head.weight.data.copy_(scorer.score.weight)
    ids, half = batch["input_ids"], len(rows)
    order = [row for k in range(half) for row in (k, k + half)]
    targets = ids.masked_fill(batch["attention_mask"] == 0, IGNORED)
    mine = Batch(ids[order, :-1], targets[order, 1:], group=2)
    losses = RewardModelling(0.1).loss_sums(ours, mine)
    (losses.total / half).backward()
    assert (losses.total / half).item() == pytest.approx(expected.item(), rel=2e-6)
    torch.testing.assert_close(ours.value_head.weight.grad, scorer.score.weight.grad, rtol=1e-4, atol=1e-6)
    theirs = scorer.model.layers[1].self_attn.o_proj.weight.grad
    torch.testing.assert_close(ours.layers[1].attention.out_proj.weight.grad, theirs, rtol=1e-4, atol=1e-6)


def stored_answers(model):
    """Four answers to prompts as they were sampled at a temperature of 0.9 by another model: ids, mask, log-probs."""
    generator = torch.Generator().manual_seed(4)
    prompts, answers = (torch.randint(0, 50, (4, n), generator=generator) for n in (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    answers = answers.masked_fill(mask == 0, PAD)
    with torch.no_grad():
        logits = model(torch.cat([prompts, answers], 1)).logits[:, 2:-1] / 0.9
    log_p = logits.log_softmax(-1).gather(2, answers[..., None])[..., 0]
    return prompts, answers, mask, log_p + 0.5 * torch.randn(log_p.shape, generator=generator)


def batch_of(prompts, answers, mask, old, advantages):
    """The same as our batch."""
    targets = torch.cat([torch.full((4, 2), IGNORED), answers.masked_fill(mask == 0, IGNORED)], 1)
    is_target = targets != IGNORED
    old = torch.nn.functional.pad(old, (2, 0)) * is_target
    extras = {"old": old, "advantage": advantages[:, None] * is_target, "reward": advantages, "finished": advantages}
    return Batch(torch.cat([prompts, answers], 1)[:, :-1], targets, extras=extras)


def policy_trainer(kind, model, folder, **settings):
    """TRL's trainer of GRPO or RLOO."""
    import trl
    from datasets import Dataset

    plain = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=2, beta=0.0, epsilon=0.2,
        temperature=0.9, max_completion_length=5, num_iterations=2, **plain, **settings,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, args=config, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]), processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("kind", ["bnpo", "grpo", "rloo"])
def test_policy_losses_equal_trls_on_stored_answers(tmp_path, kind):
    model, advantages = make_llama(), torch.tensor([1.0, -1.0, 0.5, -0.5])
    prompts, answers, mask, old = stored_answers(model)
    inputs = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": answers,
        "completion_mask": mask, "advantages": advantages, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if kind == "rloo":
        trainer, inputs["old_logps"] = policy_trainer("RLOO", model, tmp_path / "trl"), (old * mask).sum(1)
    else:
        trainer = policy_trainer("GRPO", model, tmp_path / "trl", loss_type=kind)
        inputs["old_per_token_logps"] = old
    model.train()
    expected = trainer.compute_loss(model, inputs)
    expected.backward()
    ours, batch = ours_of(model, tmp_path / "ours"), batch_of(prompts, answers, mask, old, advantages)
    mean = "tokens" if kind == "bnpo" else "sequences"
    task = PolicyGradient("rloo" if kind == "rloo" else "grpo", RLConfig(rollout_temperature=0.9, rl_loss_mean=mean))
    loss = task.loss_sums(ours, batch).total / task.count(batch)[0]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    require_same_gradients(model, ours)
