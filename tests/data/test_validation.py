"""Held-out data: every sequence scored exactly once, the same number of batches on every rank."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.batch import IGNORED
from open_lm.data.loader import validation_batches
from open_lm.errors import DataError


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def read(url, batch, rank, world_size, **kwargs):
    return list(
        validation_batches(url, vocab_size=60_000, seq_len=4, batch=batch, rank=rank, world_size=world_size, **kwargs)
    )


def scored(batches):
    return [
        first
        for batch in batches
        for first, targets in zip(batch.inputs_BT[:, 0].tolist(), batch.targets_BT, strict=True)
        if (targets != IGNORED).any()
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import numpy as np

    from open_lm.data.shards import write_shard

    made = {}
    for total in range(1, 20):
        made[total] = tmp_path_factory.mktemp(f"set{total}")
        for k, numbers in enumerate(np.array_split(np.arange(total), 3)):
            with open(made[total] / f"{k}.tar", "wb") as file:
                write_shard(file, np.tile(numbers[:, None].astype("<u2"), (1, 5)), "json") if len(numbers) else None
    return made


@given(st.integers(3, 19), st.integers(1, 5), st.sampled_from([1, 2, 3, 4]), st.none() | st.integers(1, 25))
@settings(max_examples=60, deadline=None)
def test_each_sequence_is_scored_exactly_once_at_any_world_size(folders, total, batch, world_size, most):
    url = f"{folders[total]}/*.tar"
    ranks = [read(url, batch, rank, world_size, max_sequences=most) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(b) == batch for batches in ranks for b in batches)
    assert sorted(flat(map(scored, ranks))) == list(range(min(total, most or total)))


def test_rows_without_a_sequence_are_masked_whole(folders):
    last = read(f"{folders[19]}/*.tar", 8, 1, 2)[-1]
    assert (last.targets_BT == IGNORED).all() and last.inputs_BT.shape == torch.Size([8, 4])


def test_an_empty_validation_set_is_an_error(folders):
    with pytest.raises(DataError, match="--val-num-samples"):
        read(f"{folders[3]}/*.tar", 8, 0, 1, max_sequences=0)


def test_a_manifest_stands_for_the_shards_it_names(tmp_path):
    import numpy as np

    from open_lm.data.manifest import write_manifest
    from open_lm.data.shards import write_shard

    for k in range(3):
        with open(tmp_path / f"{k}.tar", "wb") as file:
            write_shard(file, np.full((2, 5), k, "<u2"), "npy")
    write_manifest(str(tmp_path / "manifest.jsonl"), [{"shard": f"{k}", "num_sequences": 2} for k in (2, 0)])
    assert sorted(scored(read(f"{tmp_path}/manifest.jsonl", 4, 0, 1))) == [0, 0, 2, 2]


def test_validation_masks_what_training_masks(tmp_path):
    """The loss on a validation set and the training loss on the same samples are means over the same targets."""
    import numpy as np

    from open_lm.data.config import DataConfig
    from open_lm.data.masking import batch_of
    from open_lm.data.shards import write_shard

    samples = np.random.default_rng(0).integers(0, 6, (9, 9)).astype("<u2")
    with open(tmp_path / "0.tar", "wb") as file:
        write_shard(file, samples, "npy")
    for flags in (
        {"target_mask_left": 3},
        {"target_mask_individual": 2},
        {"target_mask_left": 3, "squash_mask_left": True},
    ):
        config = DataConfig(train_data=("x",), **flags)
        (batch,) = validation_batches(
            str(tmp_path / "0.tar"), vocab_size=6, seq_len=8, batch=9, rank=0, world_size=1, config=config
        )
        trained = batch_of(torch.from_numpy(samples.astype("int64")), config, None)
        assert torch.equal(batch.targets_BT, trained.targets_BT) and (trained.targets_BT == IGNORED).any(), flags
        assert torch.equal(batch.inputs_BT, trained.inputs_BT)
