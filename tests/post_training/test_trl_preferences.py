"""Each preference loss and its gradients equal TRL's on the same pairs."""

from dataclasses import replace

import pytest
import torch
from trl_setup import ROWS, another, make_llama, ours_of, pairs_of, require_same_gradients, trainer_of

from open_lm.data.batch import IGNORED, Batch
from open_lm.post_training.config import PreferenceConfig
from open_lm.post_training.log_probs import token_log_probs
from open_lm.post_training.preferences import KahnemanTversky, Preferences

pytest.importorskip("trl")
pytestmark = pytest.mark.slow


def our_loss(name, config, ours, reference, batch):
    def ask(_, part, temperature):
        with torch.no_grad():
            return token_log_probs(reference, part, temperature)

    task = Preferences(name, config, ask if reference is not None else None)
    losses = task.loss_sums(ours, batch)
    return losses.total / task.count(batch), dict(
        zip(task.names, (losses.parts / task.count(batch)).tolist(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "theirs", "beta", "smoothing"),
    [
        ("dpo", "sigmoid", 0.3, 0.0), ("ipo", "ipo", 0.2, 0.0), ("hinge", "hinge", 0.3, 0.0),
        ("robust", "robust", 0.3, 0.2), ("dpo-norm", "sigmoid_norm", 2.0, 0.0),
    ],
)  # fmt: skip
def test_losses_with_a_reference_equal_trls(tmp_path, name, theirs, beta, smoothing):
    model = make_llama()
    reference = another(model)
    settings = {"loss_type": [theirs], "beta": beta, "label_smoothing": smoothing}
    trainer = trainer_of("DPO", "trl", model, tmp_path, config=settings, ref_model=reference)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    expected = trainer.compute_loss(model, batch)
    expected.backward()
    ours, fixed = ours_of(model, tmp_path / "ours"), ours_of(reference, tmp_path / "reference")
    config = PreferenceConfig(beta=beta, label_smoothing=smoothing)
    loss, _ = our_loss(name, config, ours, fixed, pairs_of(batch))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6, rel=2e-6)
    require_same_gradients(model, ours)
    for row in range(3):  # item by item
        item = {key: value[[row, row + 3]] for key, value in batch.items()}
        alone, _ = our_loss(name, config, ours, fixed, pairs_of(item))
        assert alone.item() == pytest.approx(trainer.compute_loss(model, item).item(), abs=2e-6, rel=2e-6)


def concatenated(batch, rows=slice(None)):
    """TRL's batch of pairs with a side in tensors of its own (CPO, ORPO), as ours."""
    width = max(batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))
    ids, labels = (
        torch.stack(
            [
                torch.nn.functional.pad(batch[f"{side}_{name}"][rows], (0, width - batch[f"{side}_{name}"].shape[1]),
                                        value=value)
                for side in ("chosen", "rejected")
            ], 1
        ).flatten(0, 1)
        for name, value in (("input_ids", 0), ("labels", IGNORED))
    )  # fmt: skip
    return Batch(ids[:, :-1], labels[:, 1:], group=2)


def test_simpo_equals_trls(tmp_path):
    model = make_llama()
    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 1.5, "simpo_gamma": 0.7, "max_length": 64}
    trainer = trainer_of("CPO", "trl.experimental.cpo", model, tmp_path, config=settings)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    expected = trainer.compute_loss(model, batch)
    expected.backward()
    ours = ours_of(model, tmp_path / "ours")
    loss, _ = our_loss("simpo", PreferenceConfig(beta=1.5, simpo_gamma=0.7), ours, None, concatenated(batch))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6, rel=2e-6)
    require_same_gradients(model, ours)


@pytest.mark.parametrize("row", range(3))
def test_orpo_equals_trls_but_for_the_prompt_in_its_first_term(tmp_path, row):
    """Of one pair a mean over tokens and a mean over answers are the same. TRL's cross-entropy takes in the prompt;
    ours is the paper's, of the answer alone: it is exchanged here, what remains is the odds ratio."""
    model = make_llama()
    settings = {"beta": 0.3, "max_length": 64}
    trainer = trainer_of("ORPO", "trl.experimental.orpo", model, tmp_path, rows=ROWS[row : row + 1], config=settings)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    expected = trainer.compute_loss(model, batch)
    expected.backward()
    ours, mine = ours_of(model, tmp_path / "ours"), concatenated(batch)
    loss, _ = our_loss("orpo", PreferenceConfig(beta=0.3), ours, None, mine)
    chosen = batch["chosen_input_ids"]
    answer = Batch(mine.inputs_BT[:1], mine.targets_BT[:1])
    both = Batch(chosen[:, :-1], chosen[:, 1:].masked_fill(batch["chosen_attention_mask"][:, 1:] == 0, IGNORED))
    answer_nll, whole_nll = (-token_log_probs(ours, one).sum() / one.n_targets for one in (answer, both))
    loss = loss - answer_nll + whole_nll
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6, rel=2e-6)
    require_same_gradients(model, ours)


def test_kto_equals_trls_with_the_divergence_of_its_pairs(tmp_path):
    model = make_llama()
    reference = another(model)
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in ROWS
        for side in ("chosen", "rejected")
    ]
    settings = {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.6, "max_length": 64}
    trainer = trainer_of("KTO", "trl", model, tmp_path, rows=rows, config=settings, ref_model=reference)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    expected = trainer.compute_loss(model, batch)
    expected.backward()
    ours, fixed = ours_of(model, tmp_path / "ours"), ours_of(reference, tmp_path / "reference")
    assert batch["label"].tolist() == [True, False] * 3
    others, mine = (one_by_one(batch, prefix) for prefix in ("KL_", ""))
    with torch.no_grad():
        divergence = (token_log_probs(ours, others) - token_log_probs(fixed, others)).sum(-1).mean().clamp(min=0)
    assert divergence > 0
    config = PreferenceConfig(beta=0.4, desirable_weight=1.3, undesirable_weight=0.6)
    task = KahnemanTversky("kto", config, lambda _, part, temperature: token_log_probs(fixed, part, temperature))
    losses = task.loss_sums(ours, replace(mine, extras={"kl": divergence.expand(6)}))
    loss = losses.total / task.count(mine)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6, rel=2e-6)
    require_same_gradients(model, ours)


def one_by_one(batch, prefix):
    """TRL's rows of KTO, chosen and rejected in turns, as ours."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"].bool()
    return Batch(ids[:, :-1], ids.masked_fill(~mask, IGNORED)[:, 1:], group=2)


def test_cdpo_is_trls_dpo_with_a_share_of_the_pairs_turned_round(tmp_path):
    """TRL's `sigmoid` knows no label smoothing: what the smoothed loss means is asked of it directly."""
    model = make_llama()
    reference = another(model)
    ours, fixed = ours_of(model, tmp_path / "ours"), ours_of(reference, tmp_path / "reference")
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    expected, mine = 0.0, None
    for share, rows in ((0.7, ROWS), (0.3, turned)):
        trainer = trainer_of("DPO", "trl", model, tmp_path, rows=rows, config={"beta": 0.3}, ref_model=reference)
        batch = next(iter(trainer.get_train_dataloader()))
        model.train()
        part = share * trainer.compute_loss(model, batch)
        part.backward()
        expected += part.item()
        mine = mine or pairs_of(batch)
    loss, _ = our_loss("cdpo", PreferenceConfig(beta=0.3, label_smoothing=0.3), ours, fixed, mine)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=2e-6, rel=2e-6)
    require_same_gradients(model, ours)
