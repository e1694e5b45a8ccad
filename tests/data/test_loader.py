"""The loader: the same samples in the same steps at any batch_positions, none lost, errors before the first step."""

import itertools
import json

import pytest
import torch

from open_lm.data.batch import IGNORED
from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.errors import CheckpointError, ConfigError, DataError, StorageError

SEQ_LEN, VOCAB = 4, 60_000


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def loader(config, batch=4, rank=0, world_size=1, seed=0, **kwargs):
    order = {"rank": rank, "world_size": world_size, "seed": seed}
    shape = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "global_batch": batch}
    return build_loader(config, **(shape | order | kwargs))


def manifest(folder, **kwargs):
    return DataConfig(dataset_manifest=(str(folder / "manifest.jsonl"),), **({"workers": 0} | kwargs))


def numbers(batches):
    """The samples of each step, by the number that is their first id."""
    return [batch.inputs_BT[:, 0].tolist() for batch in batches]


def steps(config, start, stop, world_size=1, batch=4, seed=0, **kwargs):
    """Samples of each global batch, over all ranks."""
    ranks = [
        numbers(loader(config, batch, r, world_size, seed, **kwargs).batches(start, stop)) for r in range(world_size)
    ]
    return [flat(parts) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("key", ["npy", "txt", "json", "json.gz"])
def test_one_pass_gives_every_sequence_once(data_set, key):
    found = steps(manifest(data_set([5, 0, 9, 14], key)), 0, 7)
    assert sorted(flat(found)) == list(range(28))


def test_batches_are_int64_inputs_and_the_ids_that_follow(data_set):
    batch = next(loader(manifest(data_set([8]))).batches(0, 1))
    assert batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert batch.inputs_BT.shape == batch.targets_BT.shape == (4, SEQ_LEN)
    assert torch.equal(batch.inputs_BT[:, 1], batch.inputs_BT[:, 0] % 991)
    assert torch.equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])


def test_ranks_and_workers_do_not_change_what_a_step_holds(data_set):
    folder = data_set([40, 3, 77, 20])
    straight = steps(manifest(folder), 0, 30)
    config = {w: manifest(folder, workers=w) for w in (0, 1, 3)}
    for world_size, n_workers, start in [(1, 1, 0), (2, 3, 11), (4, 0, 5), (4, 1, 29)]:
        assert steps(config[n_workers], start, 30, world_size) == straight[start:]


@pytest.mark.parametrize("n_workers", [0, 3])
def test_many_lanes_are_shared_among_workers_without_loss(data_set, n_workers):
    config = manifest(data_set([40, 3, 77, 20]), workers=n_workers, shuffle_lanes=12, shuffle_window=5)
    assert sorted(flat(steps(config, 0, 35))) == list(range(140))


def test_exactly_enough_data_is_enough_and_one_step_more_is_said_before_the_first(data_set):
    config = manifest(data_set([13, 17]))
    assert len(steps(config, 0, 7, n_steps=7)) == 7
    with pytest.raises(DataError, match=r"8 steps of 4 need 32 sequences.*gives 30.*--multiple-data-passes"):
        loader(config, n_steps=8)


def test_passes_follow_each_other_inside_a_batch_and_are_newly_shuffled(data_set):
    config = manifest(data_set([13, 17]), multiple_data_passes=True)
    found = flat(steps(config, 0, 30, n_steps=30))
    passes = [found[k * 30 : (k + 1) * 30] for k in range(4)]
    assert all(sorted(one) == list(range(30)) for one in passes)
    assert len(set(map(tuple, passes))) == 4


def test_another_seed_is_another_order(data_set):
    folder = data_set([30])
    assert steps(manifest(folder), 0, 7, seed=1) != steps(manifest(folder), 0, 7, seed=2)


def test_without_a_manifest_shards_are_counted_and_give_the_same_order(data_set):
    folder = data_set([5, 9, 14], "json")
    with_manifest = steps(manifest(folder), 0, 7)
    (folder / "manifest.jsonl").unlink()
    for url in (f"{folder}/{{00000000..00000002}}.tar", f"{folder}/*.tar", "::".join(map(str, folder.glob("*.tar")))):
        assert steps(DataConfig(train_data=(url,), workers=0), 0, 7) == with_manifest


def test_sources_without_weights_are_pooled_so_that_none_is_lost(data_set):
    folders = [data_set([5, 9], name="a"), data_set([14], name="b", first=100)]
    config = DataConfig(dataset_manifest=tuple(f"{f}/manifest.jsonl" for f in folders), workers=0)
    assert sorted(flat(steps(config, 0, 7, n_steps=7))) == [*range(14), *range(100, 114)]


def test_weights_mix_sources_inside_every_batch_and_each_source_loses_nothing(data_set):
    folders = [data_set([60], name="a"), data_set([20], name="b", first=100)]
    manifests = tuple(f"{f}/manifest.jsonl" for f in folders)
    config = DataConfig(dataset_manifest=manifests, train_data_mix_weights=(3, 1), workers=0)
    found = steps(config, 0, 20, n_steps=20)
    assert all(sum(number >= 100 for number in batch) == 1 for batch in found)
    assert sorted(flat(found)) == [*range(60), *range(100, 120)]
    assert [source["share"] for source in loader(config).state(0)["sources"]] == [0.75, 0.25]
    with pytest.raises(DataError, match="21 steps of 4 need 84 sequences"):
        loader(config, n_steps=21)


def test_upsampling_factors_repeat_a_part(data_set):
    folders = [data_set([30], name="a"), data_set([10], name="b", first=100)]
    url = "::".join(f"{f}/*.tar" for f in folders)
    config = DataConfig(train_data=(url,), train_data_upsampling_factors="1::3", workers=0, multiple_data_passes=True)
    found = flat(steps(config, 0, 15))
    assert sum(number >= 100 for number in found) == 30


def test_resampling_is_endless_and_the_same_at_any_geometry(data_set):
    folder = data_set([5, 9, 14])
    straight = steps(manifest(folder, dataset_resampled=True), 0, 40, n_steps=40)
    assert steps(manifest(folder, dataset_resampled=True, workers=3), 20, 40, 2) == straight[20:]
    assert loader(manifest(folder, dataset_resampled=True)).n_sequences is None


@pytest.mark.parametrize("n_workers", [0, 2])
def test_synthetic_data_needs_no_files_and_is_a_function_of_the_step(n_workers):
    config = DataConfig(dataset_type="synthetic", workers=n_workers)
    one = [b.inputs_BT for b in loader(config, vocab_size=100).batches(0, 4)]
    late = next(loader(config, vocab_size=100).batches(3, 4)).inputs_BT
    assert torch.equal(one[3], late)
    assert torch.stack(one).max() < 100 and len(torch.stack(one).unique()) > 30


def test_skipped_steps_are_left_out_and_later_ones_move_up(data_set):
    folder = data_set([40])
    straight = steps(manifest(folder), 0, 10)
    assert steps(manifest(folder, skip_steps=("2-3", "6")), 0, 7) == straight[:2] + straight[4:6] + straight[7:]
    with pytest.raises(DataError, match="8 steps of 4 need 44 sequences"):
        loader(manifest(folder, skip_steps=("2-3", "6")), n_steps=8)


def test_longer_sequences_are_cropped_each_at_its_own_place(tmp_path):
    import numpy as np

    from open_lm.data.shards import write_shard

    with open(tmp_path / "a.tar", "wb") as file:
        write_shard(file, np.tile(np.arange(50, dtype="<u2"), (40, 1)), "npy")
    config = DataConfig(train_data=(str(tmp_path / "a.tar"),), workers=0)
    batches = list(loader(config, batch=40).batches(0, 1))
    starts = batches[0].inputs_BT[:, 0]
    assert torch.equal(batches[0].inputs_BT, starts[:, None] + torch.arange(SEQ_LEN))
    assert len(starts.unique()) > 15


def test_a_bad_sample_stops_the_run_or_is_a_hole_that_shifts_nothing(data_set):
    folder = data_set([8, 8], "json")
    whole = steps(manifest(folder), 0, 4)
    content = bytearray((folder / "00000001.tar").read_bytes())
    content[content.index(b"[9,") + 1] = ord("x")
    (folder / "00000001.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"00000001\.tar, sample 1: member 000000000001\.json.*--ignore-parse-errors"):
        steps(manifest(folder), 0, 4)
    with pytest.raises(DataError, match=r"00000001\.tar, sample 1"):
        steps(manifest(folder, workers=2), 0, 4)
    tolerant = loader(manifest(folder, ignore_parse_errors=True, workers=2))
    batches = list(tolerant.batches(0, 4))
    found = [
        [9 if (t == IGNORED).all() else i for i, t in zip(b.inputs_BT[:, 0].tolist(), b.targets_BT, strict=True)]
        for b in batches
    ]
    assert found == whole
    assert len(tolerant.unreadable) == 1 and "00000001.tar" in tolerant.unreadable[0]["reason"]


def test_ids_beyond_the_vocabulary_are_blamed_on_model_and_tokenizer(data_set):
    folder = data_set([8, 8])
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    named = [json.dumps({**json.loads(line), "tokenizer": "gpt2"}) for line in lines]
    (folder / "manifest.jsonl").write_text("\n".join(named))
    small = {"vocab_size": 5, "seq_len": SEQ_LEN, "global_batch": 4, "rank": 0, "world_size": 1, "seed": 0}
    with pytest.raises(DataError, match=r"outside a vocabulary of 5.* the tokenizer gpt2, .*--model with its"):
        list(build_loader(manifest(folder), **small).batches(0, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_of_which_nothing_can_be_read_are_refused(data_set, workers):
    tolerant = manifest(data_set([8, 8]), ignore_parse_errors=True, workers=workers)
    small = {"vocab_size": 5, "seq_len": SEQ_LEN, "global_batch": 4, "rank": 0, "world_size": 1, "seed": 0}
    with pytest.raises(DataError, match=r"none of 16 samples can be read; the first: .*outside a vocabulary of 5"):
        list(build_loader(tolerant, **small).batches(0, 4))


def test_a_manifest_that_lies_about_a_count_is_noticed(data_set):
    folder = data_set([8, 8], "json")
    (folder / "manifest.jsonl").write_text(
        '{"shard": "00000000", "num_sequences": 8}\n{"shard": "00000001", "num_sequences": 9}'
    )
    with pytest.raises(DataError, match=r"00000001\.tar.*counts 9 samples, the shard holds 8"):
        steps(manifest(folder), 0, 4)


def test_a_shard_that_is_missing_or_cut_is_named_before_the_first_step(data_set):
    from open_lm.utils import make_wds_manifest

    folder = data_set([8, 8, 8], manifest=False)
    make_wds_manifest.main(["--data-dir", str(folder)])
    content = (folder / "00000001.tar").read_bytes()
    (folder / "00000001.tar").write_bytes(content[:-1024])
    with pytest.raises(DataError, match=r"00000001\.tar: \d+ bytes, its manifest says \d+"):
        loader(manifest(folder))
    (folder / "00000001.tar").unlink()
    with pytest.raises(StorageError, match=r"00000001\.tar: No such file"):
        loader(manifest(folder))


def test_the_order_state_is_plain_json_and_continues_only_with_the_same_data(data_set):
    folder = data_set([8, 8])
    state = json.loads(json.dumps(loader(manifest(folder)).state(3)))
    assert (state["samples_consumed"], state["steps"], state["sources"][0]["consumed"]) == (12, 3, 12)
    loader(manifest(folder, workers=3), rank=1, world_size=2).check_state(state)
    with pytest.raises(CheckpointError, match="seed was 0, is now 5"):
        loader(manifest(folder), seed=5).check_state(state)
    with pytest.raises(CheckpointError, match="fingerprint of source"):
        loader(manifest(data_set([8, 9], name="other"))).check_state(state)


def test_another_global_batch_continues_with_the_next_unused_sequence(data_set):
    """Batches of 4 for 9 steps, of 12 for 4, of 2 for 27, of 4 again: one stream, nothing lost."""
    folder = data_set([300])
    config = manifest(folder, shuffle_window=16)
    begun = loader(config, batch=4)
    straight = flat(numbers(begun.batches(0, 75)))
    seen, state = flat(numbers(begun.batches(0, 9))), begun.state(9)
    for batch, stop in ((12, 13), (2, 40), (4, 80)):
        resumed = loader(config, batch=batch)
        resumed.check_state(state)
        seen += flat(numbers(resumed.batches(state["steps"], stop)))
        state = resumed.state(stop)
    assert seen == straight[: len(seen)] and len(seen) == 9 * 4 + 4 * 12 + 27 * 2 + 40 * 4
    assert state["samples_consumed"] == len(seen)


@pytest.mark.parametrize(
    ("flags", "error", "match"),
    [
        ({"train_data": ("nowhere/{000..002}.tar",)}, StorageError, r"nowhere/000\.tar \(and 2 more\): no such shard"),
        ({"train_data": ("nowhere/*.tar",)}, StorageError, "no file matches"),
        ({"train_data": ("pipe:aws s3 cp s3://x -",)}, ConfigError, "shell"),
        ({"train_data": (".",)}, StorageError, "is a folder"),
        ({"dataset_manifest": ("nowhere/manifest.jsonl",)}, ConfigError, "nowhere/manifest"),
        ({}, ConfigError, "--train-data or --dataset-manifest"),
    ],
)
def test_missing_data_is_an_error_before_anything_else(flags, error, match):
    with pytest.raises(error, match=match):
        loader(DataConfig(**flags))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"train_data": ("a",), "dataset_manifest": ("b",)}, "--train-data and --dataset-manifest"),
        ({"train_data": ("a", "b"), "train_data_mix_weights": (1.0,)}, "--train-data-mix-weights: 1 weights"),
        ({"train_data": ("a",), "train_data_mix_weights": (0.0,)}, "above 0"),
        ({"workers": -1}, "--workers"),
        ({"skip_steps": ("5-2",)}, "--skip-steps 5-2"),
        ({"skip_steps": ("1-4", "3-5")}, "overlap"),
        ({"val_data": ("a",), "val_data_key": ("txt", "txt")}, "--val-data-key"),
    ],
)
def test_flags_that_contradict_each_other_are_named(flags, match):
    with pytest.raises(ConfigError, match=match):
        DataConfig(**flags)


def test_a_batch_that_does_not_divide_names_the_flag(data_set):
    with pytest.raises(ConfigError, match="--global-batch-size 5 does not divide among 2"):
        loader(manifest(data_set([8])), batch=5, world_size=2)


def test_the_training_generator_is_not_touched(data_set):
    folder = data_set([40])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader(manifest(folder, workers=1)).batches(0, 2))
    assert torch.equal(torch.rand(1), expected)


def test_what_workers_need_survives_pickling_so_that_they_may_be_spawned(data_set):
    import pickle

    from open_lm.data.pipeline import StepSource, run_pipeline

    begun = loader(manifest(data_set([30, 11])))
    next(begun.batches(0, 1))  # descriptors are open now
    source = StepSource(begun.batch_positions.positions_of, begun.plan.reader_of, 0, 5)
    copies = pickle.loads(pickle.dumps((source, begun._fill)))
    found = [step.tokens[:, 0].tolist() for step in run_pipeline(*copies, n_workers=0, batch=4)]
    assert found == numbers(begun.batches(0, 5))


def test_sources_without_weights_say_what_each_counts(data_set, caplog):
    caplog.set_level("INFO")
    folders = [data_set([10], name="a"), data_set([30], name="b", first=100)]
    loader(DataConfig(dataset_manifest=tuple(f"{f}/manifest.jsonl" for f in folders), workers=0))
    assert "25%" in caplog.text and "75%" in caplog.text and "OpenLM gives equal shares" in caplog.text
