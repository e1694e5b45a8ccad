"""The order of samples: the same whoever reads, however often it is stopped; and as random as it should be."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.data.manifest import Shard, write_manifest
from open_lm.data.mixture import make_plan
from open_lm.data.permutations import mix
from open_lm.data.plan import StripedStream
from open_lm.data.shards import write_shard
from open_lm.data.sources import Source

N = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("order")
    rows = []
    for k, n in enumerate((150, 1, 249)):
        first = sum(row["num_sequences"] for row in rows)
        samples = np.tile(np.arange(first, first + n, dtype="<u2")[:, None], (1, 5))
        with open(where / f"{k}.tar", "wb") as file:
            write_shard(file, samples, "npy")
        rows.append({"shard": str(k), "num_sequences": n})
    write_manifest(str(where / "manifest.jsonl"), rows)
    return where


def loaders(folder, batch, world, workers, state=None):
    config = DataConfig(
        dataset_manifest=(f"{folder}/manifest.jsonl",), workers=workers, multiple_data_passes=True,
        shuffle_lanes=16, shuffle_window=6,
    )  # fmt: skip
    shape = {"vocab_size": 1000, "seq_len": 4, "global_batch": batch}
    found = [build_loader(config, **shape, rank=rank, world_size=world, seed=1) for rank in range(world)]
    for loader in found:
        if state is not None:
            loader.check_state(state)
    return found


def ids(batch):
    return batch.inputs_BT[:, 0].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_ranks_workers_and_batches_change_at_random_stops_and_the_samples_are_those_of_the_straight_run(folder, seed):
    """A state goes through JSON-like plain values from one loader to another, workers dying with batches on their
    way; the concatenated stream is the straight one."""
    straight = [n for batch in loaders(folder, 8, 1, 0)[0].batches(0, 120) for n in ids(batch)]
    dice, seen, step, state = random.Random(seed), [], 0, None
    while len(seen) < 700:
        batch, world = dice.choice([4, 8, 16]), dice.choice([1, 2, 4])
        ranks = loaders(folder, batch, world, 1 if dice.random() < 0.15 else 0, state)
        stop = step + dice.randint(1, 7)
        running = [rank.batches(step, stop + 3) for rank in ranks]
        for _ in range(step, stop):
            seen += [number for one in running for number in ids(next(one))]
        for one in running:
            one.close()
        step, state = stop, ranks[0].state(stop)
    assert seen == straight[: len(seen)]


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any),
    batch=st.sampled_from([1, 2, 8, 64]),
    seed=st.integers(0, 2**31),
    lanes=st.sampled_from([0, 1, 7]),
)
def test_every_pass_holds_every_sample_once_for_any_shards_and_batch(counts, batch, seed, lanes):
    shards = tuple(Shard(f"s{k}", f"s{k}.tar", n) for k, n in enumerate(counts))
    plan = make_plan([Source("x", shards)], DataConfig(shuffle_lanes=lanes), seed=seed, global_batch=batch)
    n, starts = sum(counts), np.cumsum([0, *counts])
    for number in range(2):
        found = plan.locate(np.arange(number * n, (number + 1) * n))
        assert sorted((starts[found.shard] + found.place).tolist()) == list(range(n))


def order(n, seed, number=0, stripes=1, block=1 << 20):
    """The samples of one pass over 20 shards, as numbers."""
    counts = [n // 20] * 20
    stream = StripedStream(
        [f"s{k}" for k in range(20)], counts, seed=seed, salt=0, stripes=stripes, shuffle_block=block
    )
    shard, place = stream.locate(np.arange(number * n, (number + 1) * n))
    return shard * (n // 20) + place


@pytest.mark.parametrize("shape", [(1, 200_000, 12), (64, 256, 6)], ids=["a permutation", "stripes"])
def test_neither_bits_nor_differences_nor_batches_show_a_pattern(shape):
    """Low bits of neighbours do not correlate, no difference of neighbours is common, and shards mix in batches as in
    random draws."""
    n, (stripes, block, n_bits) = 200_000, shape
    for seed in range(2):
        found = order(n, seed, stripes=stripes, block=block)
        for bit in range(n_bits):
            values = (found >> bit & 1).astype(float)
            assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01, "4 sigma are 0.009"
        _, often = np.unique(np.diff(found), return_counts=True)
        assert often.max() < 20 or stripes > 1  # neighbours of a row stand one stride of stripes apart, by design
        shards = (found // (n // 20)).reshape(-1, 200)
        counts = np.stack([np.bincount(row, minlength=20) for row in shards])
        assert counts.var() / (200 * (1 / 20) * (19 / 20)) < 1.2


def test_passes_and_seeds_are_unrelated():
    one, two, other = order(40_000, 0), order(40_000, 0, 1), order(40_000, 1)
    for pair in ((one, two), (one, other)):
        assert (pair[0] == pair[1]).sum() < 10
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.03


@given(st.integers(0, 2**63), st.integers(0, 63))
def test_the_hash_behind_it_changes_half_the_bits_for_one(value, bit):
    values = np.array([value, value ^ 1 << bit], np.uint64)
    one, two = mix(values).tolist()
    assert 8 <= (one ^ two).bit_count() <= 56
