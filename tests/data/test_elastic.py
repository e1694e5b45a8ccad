"""A run killed at a random step and resumed on other ranks and workers trains on the same samples in every step."""

import random

import pytest

from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader

N_STEPS = 24


def loader(folders, world_size, rank, n_workers, **flags):
    config = DataConfig(
        dataset_manifest=tuple(f"{folder}/manifest.jsonl" for folder in folders), workers=n_workers, **flags
    )
    return build_loader(
        config, vocab_size=60_000, seq_len=4, global_batch=8, rank=rank, world_size=world_size, seed=7, n_steps=N_STEPS
    )


def ids(batches):
    return [batch.inputs_BT[:, 0].tolist() for batch in batches]


MODES = {
    "one source, lanes across passes": {"shuffle_lanes": 16, "shuffle_window": 6, "multiple_data_passes": True},
    "one source, a permutation": {"multiple_data_passes": True},
    "weights": {"train_data_mix_weights": (3, 1), "multiple_data_passes": True},
    "resampled": {"dataset_resampled": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_geometry_and_any_stop_give_the_same_samples_per_step(data_set, mode):
    folders = [data_set([31, 0, 17], name="a"), data_set([23], name="b", first=1000)]
    straight = ids(loader(folders, 1, 0, 0, **MODES[mode]).batches(0, N_STEPS))
    geometries = [(1, 0), (1, 1), (2, 0), (4, 0), (2, 3), (4, 1)]
    dice = random.Random(mode)
    dice.shuffle(geometries)
    step, seen = 0, []
    for world_size, n_workers in geometries:
        stop = min(N_STEPS, step + dice.randint(2, 5))
        ranks = [loader(folders, world_size, rank, n_workers, **MODES[mode]) for rank in range(world_size)]
        state = ranks[0].state(step)
        for one in ranks:  # what a checkpoint written by any batch_positions must say to any other
            one.check_state(state)
        running = [one.batches(step, N_STEPS) for one in ranks]
        for _ in range(step, stop):
            seen.append([number for one in running for number in next(one).inputs_BT[:, 0].tolist()])
        for one in running:
            one.close()  # killed with batches on their way
        step = stop
    assert seen == straight[: len(seen)] and len(seen) > 12


@pytest.mark.parametrize("n_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_exactly_enough_data_trains_every_sequence_at_any_geometry(data_set, world_size, n_workers):
    folder = data_set([50, 1, 141])
    whole = [loader([folder], world_size, rank, n_workers).batches(0, N_STEPS) for rank in range(world_size)]
    assert sorted(number for one in whole for batch in ids(one) for number in batch) == list(range(192))
