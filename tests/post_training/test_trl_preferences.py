"""Each preference loss and its gradients equal TRL's on the same pairs."""

import pytest
import torch
from trl_setup import another, make_llama, ours_of, pairs_of, require_same_gradients, trainer_of

from open_lm.post_training.config import PreferenceConfig
from open_lm.post_training.log_probs import token_log_probs
from open_lm.post_training.preferences import Preferences

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
