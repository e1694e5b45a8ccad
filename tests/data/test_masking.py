"""Masks, against tables worked by hand and a loop over single positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from open_lm.data.batch import IGNORED as X
from open_lm.data.masking import masked_batch

SAMPLES = torch.tensor([[5, 6, 9, 7, 8, 1], [5, 6, 7, 8, 1, 1], [9, 5, 9, 6, 1, 7], [5, 5, 5, 5, 5, 9]])


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        ({"left_of": None, "individual": None, "squash": False}, SAMPLES[:, 1:].tolist()),
        (
            {"left_of": 9, "individual": None, "squash": False},
            [[X, X, 7, 8, 1], [6, 7, 8, 1, 1], [5, 9, 6, 1, 7], [X, X, X, X, X]],
        ),
        (
            {"left_of": None, "individual": 1, "squash": False},
            [[6, 9, 7, 8, X], [6, 7, 8, X, X], [5, 9, 6, X, 7], [5, 5, 5, 5, 9]],
        ),
        (
            {"left_of": 9, "individual": 1, "squash": False},
            [[X, X, 7, 8, X], [6, 7, 8, X, X], [5, 9, 6, X, 7], [X, X, X, X, X]],
        ),
        ({"left_of": 9, "individual": None, "squash": True}, [[X, 7, 8, 1], [6, 7, 8, 1], [9, 6, 1, 7], [X, X, X, X]]),
    ],
)
def test_hand_worked_targets(flags, targets):
    assert masked_batch(SAMPLES, **flags).targets_BT.tolist() == targets


def test_squashing_takes_the_marker_out_of_the_inputs():
    batch = masked_batch(SAMPLES, left_of=9, individual=None, squash=True)
    assert batch.inputs_BT.tolist() == [[5, 6, 7, 8], [5, 6, 7, 8], [5, 9, 6, 1], [5, 5, 5, 5]]


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=5), st.booleans(), st.booleans()
)
def test_masks_equal_a_loop_over_single_positions(rows, individual, squash):
    batch = masked_batch(torch.tensor(rows), left_of=2, individual=3 if individual else None, squash=squash)
    for k, row in enumerate(rows):
        place = row.index(2) if 2 in row else -1
        if squash:
            row = [t for i, t in enumerate(row) if i != (place if place >= 0 else 5)]
            place -= 1
        expected = [X if i <= place or (individual and t == 3) else t for i, t in enumerate(row)][1:]
        assert batch.targets_BT[k].tolist() == expected
        assert batch.inputs_BT[k].tolist() == row[:-1]


def test_the_loader_masks_what_the_flags_say(data_set):
    from open_lm.data.config import DataConfig
    from open_lm.data.loader import build_loader

    folder = data_set([8])  # samples are: number, number, 7, 7, 7

    def batch(seq_len, **flags):
        config = DataConfig(dataset_manifest=(f"{folder}/manifest.jsonl",), workers=0, **flags)
        loader = build_loader(config, vocab_size=99, seq_len=seq_len, global_batch=8, rank=0, world_size=1, seed=0)
        return next(loader.batches(0, 1))

    plain, left, one = batch(4), batch(4, target_mask_left=7), batch(4, target_mask_individual=7)
    assert (plain.targets_BT != X).all()
    assert sorted((left.targets_BT == X).sum(1).tolist()) == [0] + [2] * 7  # sample 7 begins with a 7
    assert sorted((one.targets_BT == X).sum(1).tolist()) == [3] * 7 + [4]
    squashed = batch(3, target_mask_left=7, squash_mask_left=True)
    assert squashed.inputs_BT.shape == (8, 3) and (squashed.targets_BT == 7).any()
