"""The samples that were really read are those the plan wants, or the run stops: proven at every step."""

import shutil

import numpy as np
import orjson
import pytest

from open_lm.data import loader as module
from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.data.manifest import read_manifest
from open_lm.data.reader import PlannedSamples
from open_lm.data.rows import SampleRows, changed_row, read_checksum, shard_ids
from open_lm.data.shard_files import _LocalFiles
from open_lm.errors import CheckpointError, DataError
from open_lm.utils import make_wds_manifest


def opened(folder, **flags):
    config = DataConfig(dataset_manifest=(f"{folder}/manifest.jsonl",), **({"workers": 0} | flags))
    return build_loader(config, vocab_size=60_000, seq_len=4, global_batch=8, rank=0, world_size=1, seed=3)


@pytest.fixture
def folder(data_set):
    """Two shards with a manifest that says how their members are named and where they lie."""
    found = data_set([40, 60], manifest=False)
    make_wds_manifest.main(["--data-dir", str(found)])
    return found


class Faulty(PlannedSamples):
    """Reads as asked but for step 3, where `fault` says what is read instead."""

    fault = None

    def __call__(self, positions):
        changed = Faulty.fault(positions.copy()) if positions[0] == 24 else positions
        found = self.plan.locate(changed)
        return self.reader.read(found.source, found.shard, found.place, positions)


FAULTS = {
    "one step ahead": lambda positions: positions + 8,
    "one twice, one not": lambda positions: np.append(positions[:-1], positions[0]),
    "of another place": lambda positions: np.append(positions[:-1], 99),
}


@pytest.mark.parametrize("name", FAULTS)
def test_reading_other_samples_than_planned_stops_the_run_at_that_step(folder, name):
    loader = opened(folder)
    Faulty.fault = staticmethod(FAULTS[name])
    loader._fill = Faulty(loader.plan, loader._fill.reader)
    batches = loader.batches(0, 12)
    for _ in range(3):
        next(batches)
    with pytest.raises(DataError, match="step 3: the data workers read other samples than planned"):
        next(batches)


@pytest.mark.parametrize("n_workers", [0, 1])
@pytest.mark.parametrize("key", ["npy", "json", "json.gz"])
def test_a_file_that_gives_another_place_is_noticed_by_what_it_gives(data_set, monkeypatch, key, n_workers):
    """The bytes say themselves which sample they are: one that always comes first does not pass for the others."""
    found = data_set([16], key, manifest=False)
    make_wds_manifest.main(["--data-dir", str(found)])
    loader, real = opened(found, workers=n_workers), _LocalFiles.read_into

    def always_first(self, shard, number, offset, view):
        return real(self, shard, number, 0, view)

    monkeypatch.setattr(_LocalFiles, "read_into", always_first)
    with pytest.raises(DataError, match=r"00000000\.tar, sample"):
        list(loader.batches(0, 2))


def test_ids_that_change_on_their_way_are_noticed_in_the_batch_itself(folder, monkeypatch):
    """Changed after every check of the reader: only the writer's checksum can tell."""
    real = module.run_pipeline

    def changed(*args, **kwargs):
        for step, rows in enumerate(real(*args, **kwargs)):
            if step == 2:
                rows.tokens[2, 1] ^= 1
            yield rows

    monkeypatch.setattr(module, "run_pipeline", changed)
    batches = opened(folder).batches(0, 12)
    next(batches), next(batches)
    with pytest.raises(DataError, match=r"step 2: shard .*sample \d+: its ids are not those that were written"):
        next(batches)


def test_every_slot_of_a_batch_has_its_turn(folder):
    """A changed row is found within as many steps as there are rows."""
    rows = opened(folder)._fill(np.arange(8))
    tokens = rows.tokens.astype(np.int64)
    assert all(changed_row(tokens, rows.stored, rows.widths, step) is None for step in range(20))
    for row in range(8):
        changed = tokens.copy()
        changed[row, 4] += 1
        assert [changed_row(changed, rows.stored, rows.widths, step) for step in range(8)].count(row) == 1


def test_one_flipped_byte_of_a_shard_stops_the_run_or_is_a_masked_row(folder):
    path = folder / "00000001.tar"
    content = bytearray(path.read_bytes())
    content[640 + 1024 * 7 + 3] ^= 4  # in the ids of member 47: they stay inside the vocabulary
    path.write_bytes(content)
    with pytest.raises(DataError, match="its ids are not those that were written"):
        list(opened(folder, multiple_data_passes=True).batches(0, 200))


def test_a_worker_that_says_nothing_is_noticed(folder, monkeypatch):
    real = module.run_pipeline

    def silent(source, fill, **kwargs):
        return real(source, lambda positions: SampleRows(*fill(positions)[:2]), **kwargs)

    monkeypatch.setattr(module, "run_pipeline", silent)
    with pytest.raises(DataError, match="step 0"):
        next(opened(folder).batches(0, 1))


def test_the_order_within_a_step_does_not_matter_to_the_checksum():
    shards, places = shard_ids(["a", "b", "a", "c"]), np.array([5, 5, 6, 0])
    assert read_checksum(shards, places) == read_checksum(shards[::-1], places[::-1])
    assert read_checksum(shards, places) != read_checksum(shards, places[::-1])
    two = shard_ids(["a", "b"])
    assert read_checksum(two, np.array([1, 2])) != read_checksum(two, np.array([2, 1]))


def test_data_rebuilt_under_the_same_name_are_refused_at_resume(folder, data_set):
    state = opened(folder).state(3)
    rebuilt = data_set([40, 60], name="again", first=500, manifest=False)
    make_wds_manifest.main(["--data-dir", str(rebuilt)])
    for path in rebuilt.iterdir():
        shutil.copy(path, folder / path.name)
    with pytest.raises(CheckpointError, match=r"content of source .*checksums"):
        opened(folder).check_state(state)


def test_a_manifest_that_gains_checksums_is_the_same_data(folder):
    rows = [orjson.loads(line) for line in (folder / "manifest.jsonl").read_bytes().splitlines()]
    whole = (folder / "manifest.jsonl").read_bytes()
    plain = [orjson.dumps({k: row[k] for k in ("shard", "num_sequences")}) for row in rows]
    (folder / "manifest.jsonl").write_bytes(b"\n".join(plain))
    state = opened(folder).state(3)
    (folder / "manifest.jsonl").write_bytes(whole)
    assert read_manifest(f"{folder}/manifest.jsonl")[0].crc32
    opened(folder).check_state(state)
