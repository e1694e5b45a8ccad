"""The order of the data: every sample once per pass, whoever asks, in whatever pieces."""

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data import permutations as order
from open_lm.data.mixture import Pattern, Plan, positions_before_repeat, share_columns
from open_lm.data.permutations import mix
from open_lm.data.plan import ResampledStream, StripedStream, choose_stripes, together

COUNTS = st.lists(st.integers(0, 64), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)


def names(n):
    return [f"{k:08d}" for k in range(n)]


def samples(stream, start, stop):
    shard, index = stream.locate(np.arange(start, stop))
    return list(zip(shard.tolist(), index.tolist(), strict=True))


@given(COUNTS, st.integers(1, 24), st.integers(1, 16), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_each_pass_holds_every_sample_exactly_once(counts, stripes, block, seed):
    stream = StripedStream(names(len(counts)), counts, seed=seed, salt=0, stripes=stripes, shuffle_block=block)
    everything = {(shard, index) for shard, n in enumerate(counts) for index in range(n)}
    total = sum(counts)
    for number in range(3):
        found = samples(stream, number * total, (number + 1) * total)
        assert len(found) == total
        assert set(found) == everything


@given(COUNTS, st.integers(1, 24), st.integers(1, 16), st.data())
@settings(max_examples=150, deadline=None)
def test_any_positions_in_any_order_give_what_the_straight_stream_gives(counts, stripes, block, data):
    stream = StripedStream(names(len(counts)), counts, seed=1, salt=0, stripes=stripes, shuffle_block=block)
    total = sum(counts)
    straight = samples(stream, 0, 3 * total)
    asked = data.draw(st.lists(st.integers(0, 3 * total - 1), min_size=1, max_size=40))
    fresh = StripedStream(names(len(counts)), counts, seed=1, salt=0, stripes=stripes, shuffle_block=block)
    shard, index = fresh.locate(np.array(asked))
    assert list(zip(shard.tolist(), index.tolist(), strict=True)) == [straight[p] for p in asked]


@given(COUNTS, st.integers(1, 24), st.integers(1, 16), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_the_manifest_does_not_matter(counts, stripes, block, random):
    shuffled = list(range(len(counts)))
    random.shuffle(shuffled)
    one = StripedStream(names(len(counts)), counts, seed=3, salt=0, stripes=stripes, shuffle_block=block)
    other = StripedStream(
        [names(len(counts))[k] for k in shuffled],
        [counts[k] for k in shuffled],
        seed=3,
        salt=0,
        stripes=stripes,
        shuffle_block=block,
    )
    renamed = [(shuffled[shard], index) for shard, index in samples(other, 0, 2 * sum(counts))]
    assert renamed == samples(one, 0, 2 * sum(counts))


@given(COUNTS, st.integers(1, 24), st.integers(1, 16), st.integers(1, 5), st.data())
@settings(max_examples=150, deadline=None)
def test_ranks_and_readers_share_a_batch_without_gap_or_overlap_at_any_stop(counts, stripes, block, batch, data):
    stream = StripedStream(names(len(counts)), counts, seed=2, salt=0, stripes=stripes, shuffle_block=block)
    plan = Plan((stream,), striped=together((stream,)))
    straight = samples(stream, 0, 40 * 12)
    position, seen = 0, []
    for _ in range(4):  # four pieces of a run, each with its own ranks, readers and batch
        n_ranks, n_readers = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 3]))
        size = batch * n_ranks
        for _ in range(data.draw(st.integers(1, 3))):
            whole = np.arange(position, position + size)
            parts = {}
            for mine in whole.reshape(n_ranks, -1):
                reader = plan.reader_of(mine, n_readers)
                for r in range(n_readers):
                    got = plan.locate(mine[reader == r])
                    parts.update(
                        zip(
                            mine[reader == r].tolist(),
                            zip(got.shard.tolist(), got.place.tolist(), strict=True),
                            strict=True,
                        )
                    )
            assert sorted(parts) == whole.tolist()
            seen += [parts[p] for p in whole.tolist()]
            position += size
    assert seen == straight[: len(seen)]


def test_stripes_differ_in_length_by_at_most_one_and_a_reader_keeps_its_stripes():
    stream = StripedStream(names(7), [11, 0, 5, 64, 3, 9, 1], seed=0, salt=0, stripes=8, shuffle_block=4)
    stripes = stream.stripe_of(np.arange(93))
    lengths = np.bincount(stripes, minlength=8)
    assert lengths.max() - lengths.min() <= 1
    assert sorted(stripes[:8].tolist()) == list(range(8))
    assert stripes[:8].tolist() == stripes[8:16].tolist() == stripes[80:88].tolist()


def test_hand_worked_lanes_without_window_shuffle():
    """5 samples in one shard, 2 lanes: lane 0 holds 0 1, lane 1 holds 2 3 4; rows (0 2)(1 3)(4)."""
    stream = StripedStream(["a"], [5], seed=0, salt=0, stripes=2, shuffle_block=1)
    assert [index for _, index in samples(stream, 0, 5)] == [0, 2, 1, 3, 4]


def test_every_pass_is_newly_shuffled_even_for_one_small_shard():
    stripes, block = choose_stripes(500, 16)
    stream = StripedStream(["a"], [500], seed=0, salt=0, stripes=stripes, shuffle_block=block)
    orders = {tuple(samples(stream, k * 500, (k + 1) * 500)) for k in range(5)}
    assert len(orders) == 5


def test_small_data_gets_a_permutation_without_pattern():
    """Correlation of place and sample, and of neighbours, is that of chance: |r| < 4 / sqrt(n)."""
    n = 10_000
    stream = StripedStream(["a"], [n], seed=0, salt=0, stripes=1, shuffle_block=n)
    order = np.array([index for _, index in samples(stream, 0, n)], float)
    for shifted in (np.arange(n), np.roll(order, 1)):
        assert abs(np.corrcoef(order, shifted)[0, 1]) < 4 / np.sqrt(n)


def test_batches_of_unmixed_shards_hold_a_fair_mix():
    """Every shard its own domain: the variance of a batch's mix is at most 1.2 times that of random draws."""
    n_shards, each, batch = 64, 512, 64
    stream = StripedStream(names(n_shards), [each] * n_shards, seed=0, salt=0, stripes=256, shuffle_block=64)
    shard, _ = stream.locate(np.arange(n_shards * each))
    halves = (shard.reshape(-1, batch) % 2).mean(axis=1)
    assert halves.var() < 1.2 * 0.25 / batch


@pytest.mark.parametrize("n", [1, 100, 16_385, 50_000, 300_000, 10**6, 10**9])
@pytest.mark.parametrize("batch", [1, 48, 512, 4096])
def test_stripes_are_a_multiple_of_the_batch_and_windows_fit(n, batch):
    stripes, block = choose_stripes(n, batch)
    assert stripes == 1 or stripes % batch == 0
    assert block >= min(n, 16)
    assert stripes * block <= max(n, batch)


def test_sources_get_their_share_in_every_stretch_of_the_stream():
    pattern = Pattern(share_columns([0.7, 0.2, 0.1], 1024), 3)
    streams = tuple(StripedStream([f"{s}"], [100_000], seed=0, salt=s, stripes=4, shuffle_block=8) for s in range(3))
    plan = Plan(streams, pattern, striped=together(streams))
    assert plan.mixture.shares == pytest.approx([0.7, 0.2, 0.1], abs=1e-3)
    got = plan.locate(np.arange(5120))
    for start in range(0, 5120, 64):
        share = np.bincount(got.source[start : start + 64], minlength=3) / 64
        assert share == pytest.approx([0.7, 0.2, 0.1], abs=0.05)


def test_each_source_of_a_mixture_runs_through_its_own_stream():
    streams = tuple(StripedStream(["a", "b"], [30, 11], seed=0, salt=s, stripes=3, shuffle_block=4) for s in range(2))
    plan = Plan(streams, Pattern(share_columns([3, 1], 8), 2), striped=together(streams))
    got = plan.locate(np.arange(400))
    for s in range(2):
        mine = got.source == s
        assert list(zip(got.shard[mine].tolist(), got.place[mine].tolist(), strict=True)) == samples(
            streams[s], 0, int(mine.sum())
        )


def test_a_mixture_ends_where_its_first_source_would_repeat():
    plan = Plan(
        (StripedStream(["a"], [30], seed=0, salt=0, stripes=1, shuffle_block=1),) * 2,
        Pattern(share_columns([3, 1], 8), 2),
    )
    end = positions_before_repeat(plan.mixture, [30, 30])
    used = np.bincount(plan.split(np.arange(end + 1))[0])
    assert max(used) == 31 and min(used) < 31
    assert max(np.bincount(plan.split(np.arange(end))[0])) == 30


def test_even_a_tiny_weight_gets_a_column():
    assert np.bincount(share_columns([1e-9, 1.0, 1e-9], 16)).tolist() == [1, 14, 1]


def test_resampling_uses_all_samples_of_a_drawn_shard_and_is_the_same_for_every_reader():
    counts = [5, 0, 9, 7]
    stream = ResampledStream(names(4), counts, seed=0, salt=0, stripes=2, shuffle_block=1)
    shard, index = stream.locate(np.arange(0, 4000, 2))  # lane 0
    start = 0
    while start + 9 < len(shard):
        n = counts[shard[start]]
        assert index[start : start + n].tolist() == list(range(n))
        start += n
    fresh = ResampledStream(names(4), counts, seed=0, salt=0, stripes=2, shuffle_block=1)
    late = fresh.locate(np.array([3998]))
    assert (late[0][0], late[1][0]) == (shard[-1], index[-1])


def test_resampling_draws_every_shard_equally_often():
    stream = ResampledStream(names(4), [10] * 4, seed=0, salt=0, stripes=16, shuffle_block=1)
    shard, _ = stream.locate(np.arange(100_000))
    assert np.bincount(shard) / 100_000 == pytest.approx([0.25] * 4, abs=0.03)


def test_mix_is_splitmix64():
    """First outputs of the reference generator with seed 1234567 (its state advances by the golden constant)."""
    state = (np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(1234567)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


GOLDEN = {
    (1, 0, 1, 1): "01c88af0015f7556",
    (5, 1, 4, 3): "b24778025867c3ed",
    (12, 2, 8, 16): "2ade2369a3b782f8",
    (40, 3, 16, 8): "e216fe8b15527dce",
    (100, 4, 1, 4000): "18ff20fb5fe63f4d",
}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_order_never_changes_between_versions(case):
    n_shards, seed, stripes, block = case
    stream = StripedStream(
        names(n_shards),
        [(37 * k) % 41 + 1 for k in range(n_shards)],
        seed=seed,
        salt=0,
        stripes=stripes,
        shuffle_block=block,
    )
    shard, index = stream.locate(np.arange(3 * stream.n_sequences))
    assert hashlib.blake2b(np.stack([shard, index]).tobytes(), digest_size=8).hexdigest() == GOLDEN[case]


def test_a_hundred_thousand_shards_cost_little():
    n = 100_000
    started = time.process_time()
    stream = StripedStream(names(n), [8192] * n, seed=0, salt=0, stripes=2048, shuffle_block=256)
    stream.locate(np.arange(400_000_000, 400_000_512))
    assert time.process_time() - started < 10  # a guard against quadratic work, not a timing


def test_a_plan_of_a_hundred_thousand_shards_fits_in_little_memory():
    import tracemalloc

    n = 100_000
    tracemalloc.start()
    stream = StripedStream(names(n), [8192] * n, seed=0, salt=0, stripes=2048, shuffle_block=256)
    for step in range(3):
        stream.locate(np.arange(400_000_000 + step * 512, 400_000_512 + step * 512))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


@pytest.mark.parametrize("width", [1, 2, 3, 64, 100, 256, 5000])
@pytest.mark.parametrize("kept_bits", [64, 9])
def test_permutations_are_the_stable_argsort_of_hashes(width, kept_bits, monkeypatch):
    """Also where hashes are alike but for their lowest bits, as with `kept_bits` 9."""
    real, dice = order.mix, np.random.default_rng(width)
    monkeypatch.setattr(order, "mix", lambda values: real(values) >> np.uint64(64 - kept_bits))
    keys, lengths = dice.integers(0, 2**63, 5).astype(np.uint64), dice.integers(1, width + 1, 5)
    places = np.arange(width, dtype=np.uint64)
    hashes = order.mix(keys[:, None] + places * order.STRIDE)
    hashes[places >= lengths[:, None].astype(np.uint64)] = 2**64 - 1
    assert (order.permutations(keys, lengths, width) == np.argsort(hashes, axis=1, kind="stable")).all()
