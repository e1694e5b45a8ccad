"""Learning from a teacher, as a run."""

import json

import pytest
import torch
from runs import folder_of, metrics, run, weights, write_data

from open_lm.errors import ConfigError


@pytest.fixture
def teacher(tmp_path):
    manifest = write_data(tmp_path / "data")
    run(tmp_path, manifest, name="teacher")
    return manifest, str(folder_of(tmp_path, "teacher") / "checkpoints" / "epoch_1.pt")


def test_a_student_comes_closer_to_its_teacher_and_neither_is_saved_twice(tmp_path, teacher):
    manifest, path = teacher
    run(tmp_path, manifest, "--distill-pretrained", path, "--distill-weight", "1.0", "--seed", "1", "--log-logit-mean")
    distances = metrics(tmp_path, key="train/distill_loss")
    assert distances[12] < 0.5 * distances[1]
    assert set(metrics(tmp_path, key="train/logit_mean")) == set(range(1, 13))
    assert weights(tmp_path).keys() == weights(tmp_path, "teacher").keys()


def test_a_weight_of_0_is_training_without_a_teacher(tmp_path, teacher):
    manifest, path = teacher
    run(tmp_path, manifest, "--distill-pretrained", path, "--distill-weight", "0")
    assert all(torch.equal(w, weights(tmp_path, "teacher")[name]) for name, w in weights(tmp_path).items())


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path, teacher):
    manifest, path = teacher
    keys = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": 16, "vocab_size": 20}
    (tmp_path / "other.json").write_text(json.dumps({**keys, "post_embed_norm": False, "weight_tying": False}))
    with pytest.raises(ConfigError, match=r"--distill-pretrained .* has 16 tokens, the model 20"):
        run(tmp_path, manifest, "--distill-pretrained", path, "--model", str(tmp_path / "other.json"))
