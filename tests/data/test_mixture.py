"""Shares of many sources, located fast; every pass of a middling source shuffled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.config import DataConfig
from open_lm.data.manifest import Shard
from open_lm.data.mixture import (
    MOST_ERROR,
    Plan,
    SplitTree,
    make_mixture,
    make_plan,
    positions_before_repeat,
    share_columns,
)
from open_lm.data.plan import StripedStream, choose_stripes, together
from open_lm.data.sources import Source

THOUSAND = [0.5, *[0.5 / 999] * 999]


@pytest.mark.parametrize(
    "weights", [THOUSAND, [0.9999, 0.0001], [0.9999999, 1e-7], [3, 1], [1, 1, 1], [0.5] + [0.5 / 2000] * 2000]
)
def test_every_source_gets_its_share_within_one_percent(weights):
    wanted = np.array(weights) / np.sum(weights)
    mixture = make_mixture(weights, 1024)
    end = 2**44
    assert np.abs(mixture.used(end) / end / wanted - 1).max() < MOST_ERROR


@pytest.mark.parametrize("weights", [THOUSAND[:40], [0.9999, 0.0001], [5, 3, 1]])
def test_a_tree_takes_each_source_s_samples_in_order_and_none_twice(weights):
    tree, n = SplitTree(weights), 20_000
    source, own = tree.split(np.arange(n))
    for s in range(len(weights)):
        assert own[source == s].tolist() == list(range(int((source == s).sum())))
    for end in (0, 1, 777, n):
        assert tree.used(end).tolist() == np.bincount(source[:end], minlength=len(weights)).tolist()
    prefix = np.cumsum(source == 0) - np.arange(1, n + 1) * tree.shares[0]
    assert np.abs(prefix).max() <= 1 + np.log2(len(weights))


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=12), st.integers(0, 2**50))
@settings(max_examples=60, deadline=None)
def test_far_positions_of_a_tree_agree_with_its_counts(weights, start):
    tree = SplitTree(weights)
    source, own = tree.split(np.arange(start, start + 64))
    before, after = tree.used(start), tree.used(start + 64)
    assert (np.bincount(source, minlength=len(weights)) == after - before).all()
    assert all(own[source == s].tolist() == list(range(before[s], after[s])) for s in range(len(weights)))


@given(
    st.lists(st.floats(0.001, 1000), min_size=1, max_size=40),
    st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 100), min_size=1, max_size=40),
)
def test_the_quick_way_through_a_tree_is_the_exact_one(weights, positions):
    tree, places = SplitTree(weights), np.array(positions)
    for quick, exact in zip(tree.split(places), tree._split_far(places), strict=True):
        assert quick.tolist() == exact.tolist()


def test_old_patterns_stay_as_they_were():
    """Of runs that began with them: each column a source, even where a share is off."""
    assert make_mixture([3, 1], 8).columns.tolist() == share_columns([3, 1], 8).tolist()
    assert make_mixture([0.9999, 0.0001], 1024, period=1024).period == 1024


def test_a_thousand_sources_are_located_together():
    sources = [Source(str(k), (Shard(f"{k}-{j}", "u", 25_000),)) for k in range(1000) for j in [0]]
    config = DataConfig(train_data=tuple(map(str, range(1000))), train_data_mix_weights=tuple(THOUSAND))
    plan = make_plan(sources, config, seed=0, global_batch=64)
    assert plan.mixture.shares[0] == pytest.approx(0.5, rel=0.01)
    alone = {s: plan.streams[s].locate(np.arange(10)) for s in range(3)}
    got = plan.locate(np.arange(20_000))
    for s, (shard, place) in alone.items():
        mine = got.source == s
        n = min(10, int(mine.sum()))
        assert (got.shard[mine][:n] == shard[:n]).all() and (got.place[mine][:n] == place[:n]).all()


@pytest.mark.parametrize(("n", "batch"), [(20_000, 4096), (30_000, 4096), (60_000, 8192), (17_000, 2048)])
def test_each_pass_of_a_middling_source_is_newly_shuffled(n, batch):
    stripes, block = choose_stripes(n, batch)
    stream = StripedStream(["a"], [n], seed=0, salt=0, stripes=stripes, shuffle_block=block)
    one, other = (stream.locate(np.arange(k * n, (k + 1) * n))[1] for k in range(2))
    assert sorted(one.tolist()) == list(range(n))
    same = [
        len(set(one[k : k + batch].tolist()) & set(other[k : k + batch].tolist())) for k in range(0, n - batch, batch)
    ]
    assert np.mean(same) / batch < 1.5 * batch / n


@pytest.mark.parametrize("counts", [[40], [3, 900], [20_000]])
@pytest.mark.parametrize(("batch", "distance"), [(8, 8), (5, 20), (1, 1), (2000, 4000)])
def test_steps_located_together_are_those_located_one_by_one(counts, batch, distance):
    """Whatever is asked: steps that follow each other, again, from further on, of another size."""
    streams = [StripedStream([f"{k}"], [n], seed=0, salt=k, stripes=2, shuffle_block=16) for k, n in enumerate(counts)]
    mixture = make_mixture([1] * len(counts), 8)
    plan = Plan(tuple(streams), mixture, positions_before_repeat(mixture, counts), together(streams))
    steps = [np.arange(batch) + k * distance for k in (0, 1, 1, 2, 3, 3, 4, 50, 51, 52, 53, 7, 8, 9)]
    steps += [np.arange(batch + 1) + 9 * distance, np.zeros(0, np.int64), steps[1], steps[3][::-1]]
    for positions in steps:
        for found, wanted in zip(plan.locate_step(positions), plan.locate(positions), strict=True):
            assert found.tolist() == wanted.tolist()
