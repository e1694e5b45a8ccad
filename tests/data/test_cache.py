"""The block cache: the same batches as from disk, each block fetched once, never more on disk than allowed.

`memory://` stands for a remote store here; tests/storage has a real S3 server.
"""

import io
import os
import threading

import fsspec
import numpy as np
import pytest

from open_lm.data import cache as module
from open_lm.data.cache import BlockCache
from open_lm.data.cache_folder import open_cache
from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.data.manifest import Shard, write_manifest
from open_lm.data.shards import describe_shard, write_shard
from open_lm.errors import DataError
from open_lm.storage import remote

N, EACH = 6, 400


@pytest.fixture
def store(tmp_path, monkeypatch):
    """`store(name, first, key)` puts a data set into a remote store; its url."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 64 << 10)
    memory, made = fsspec.filesystem("memory"), []

    def put(name="set", first=0, key="npy", manifest=True):
        rows = []
        for k in range(N):
            samples = np.full((EACH, 5), 7, "<u2")
            samples[:, 0] = np.arange(EACH) + EACH * k + first
            tar = io.BytesIO()
            write_shard(tar, samples, key)
            memory.pipe(f"/{name}/{k}.tar", tar.getvalue())
            rows.append({"shard": str(k), **describe_shard(tar.getvalue(), "x")})
        if manifest:
            write_manifest(f"memory://{name}/manifest.jsonl", rows)
        made.append(name)
        return f"memory://{name}"

    yield put
    for name in set(made):
        memory.rm(f"/{name}", recursive=True)


@pytest.fixture
def requests(monkeypatch):
    """The ranges of shards that were asked for."""
    found, real = [], remote.read_range

    def counted(url, start, stop, etag=None):
        content = real(url, start, stop, etag)
        found.append((url, start, len(content)))
        return content

    monkeypatch.setattr(remote, "read_range", counted)
    return found


def read(url, n_steps=N * EACH // 50, rank=0, world_size=1, **flags):
    config = DataConfig(dataset_manifest=(f"{url}/manifest.jsonl",), **({"workers": 0} | flags))
    loader = build_loader(
        config, vocab_size=60_000, seq_len=4, global_batch=50, rank=rank, world_size=world_size, seed=0
    )
    return [number for batch in loader.batches(0, n_steps) for number in batch.inputs_BT[:, 0].tolist()]


@pytest.mark.parametrize("key", ["npy", "json.gz"])
def test_a_pass_reads_each_byte_once_in_whole_blocks(store, requests, tmp_path, key):
    url = store(key=key)
    size = sum(fsspec.filesystem("memory").size(f"/set/{k}.tar") for k in range(N))
    found = read(url, data_cache=str(tmp_path / "cache"))
    assert sorted(found) == list(range(N * EACH))
    assert sum(n for _, _, n in requests) <= size
    assert len(requests) <= size / (64 << 10) + N
    requests.clear()
    assert read(url, data_cache=str(tmp_path / "cache")) == found
    assert requests == []


def test_ranks_and_workers_of_a_machine_fetch_together_what_one_fetches(store, requests, tmp_path):
    url = store(key="json.gz")
    whole = sum(fsspec.filesystem("memory").size(f"/set/{k}.tar") for k in range(N))
    found = [read(url, rank=rank, world_size=2, data_cache=str(tmp_path / "cache")) for rank in range(2)]
    assert sorted(found[0] + found[1]) == list(range(N * EACH))
    assert sum(n for _, _, n in requests) <= whole


def test_without_a_manifest_headers_are_read_from_the_same_blocks(store, requests, tmp_path):
    url = store(key="json.gz", manifest=False)
    whole = sum(fsspec.filesystem("memory").size(f"/set/{k}.tar") for k in range(N))
    config = DataConfig(train_data=(f"{url}/*.tar",), workers=0, data_cache=str(tmp_path / "cache"))
    loader = build_loader(config, vocab_size=60_000, seq_len=4, global_batch=50, rank=0, world_size=1, seed=0)
    assert sum(len(batch) for batch in loader.batches(0, 48)) == N * EACH
    assert sum(n for _, _, n in requests) <= whole


def test_another_content_under_the_same_url_is_fetched_anew(store, tmp_path):
    assert max(read(store(first=0), data_cache=str(tmp_path / "cache"))) == N * EACH - 1
    assert min(read(store(first=10_000), data_cache=str(tmp_path / "cache"))) == 10_000


def test_the_cache_stays_below_its_limit_with_no_removed_file_held_open(store, tmp_path):
    folder, limit = tmp_path / "cache", 5.5 * (64 << 10)
    found = read(store(), data_cache=str(folder), data_cache_gb=limit / 1e9)
    assert sorted(found) == list(range(N * EACH))
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= limit + (64 << 10)
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    held = [os.readlink(link) for link in links if os.path.lexists(link)]
    assert held
    assert not [path for path in held if str(folder) in path and "deleted" in path]


def test_too_small_a_cache_is_said(store, tmp_path, caplog):
    read(store(), data_cache=str(tmp_path / "cache"), data_cache_gb=3 * (64 << 10) / 1e9, shuffle_lanes=50)
    assert "need about" in caplog.text and "--data-cache-gb" in caplog.text


def test_many_readers_fetch_a_block_once(store, requests, tmp_path):
    url = store()
    caches = [BlockCache(str(tmp_path / "cache"), 1e9, "s") for _ in range(8)]
    shard = Shard("3", f"{url}/3.tar", EACH)
    threads = [threading.Thread(target=lambda c=cache: c.read(c.find(shard), 0, 1000)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(requests) == 1


def test_a_block_cut_off_by_a_crash_of_the_machine_is_fetched_again(store, tmp_path):
    url, folder = store(), tmp_path / "cache"
    found = read(url, data_cache=str(folder))
    for path in folder.glob("*.0"):
        path.write_bytes(path.read_bytes()[:100])
    assert read(url, data_cache=str(folder)) == found


def test_a_shard_that_cannot_be_fetched_is_named_or_masked(store, tmp_path):
    url = store()
    config = DataConfig(dataset_manifest=(f"{url}/manifest.jsonl",), workers=0, data_cache=str(tmp_path / "cache"))
    loader = build_loader(config, vocab_size=60_000, seq_len=4, global_batch=50, rank=0, world_size=1, seed=0)
    fsspec.filesystem("memory").rm("/set/4.tar")
    with pytest.raises(DataError, match=r"4\.tar.*no such file"):
        list(loader.batches(0, 48))


def test_a_remote_miscount_follows_the_policy_of_bad_samples(store, tmp_path):
    url, flags = store(), {"data_cache": str(tmp_path / "cache")}
    lines = [f'{{"shard": "{k}", "num_sequences": {EACH + (k == 5)}}}' for k in range(N)]
    fsspec.filesystem("memory").pipe("/set/manifest.jsonl", "\n".join(lines).encode())
    with pytest.raises(DataError, match=r"5\.tar.*counts 401 samples, the shard holds 400"):
        read(url, **flags)
    assert len(read(url, ignore_parse_errors=True, **flags)) == N * EACH


def test_without_a_folder_the_cache_is_a_temporary_one_that_ends_with_its_last_user(tmp_path, monkeypatch):
    import subprocess
    import sys

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "from open_lm.data.cache_folder import open_cache; c = open_cache(None, 1.0); print(c.folder)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found.startswith(str(tmp_path)) and not os.path.exists(found)
    (tmp_path / f"open_lm-data-{os.getuid()}-killed").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert os.path.isdir(open_cache(None, 1.0).folder)
    assert not (tmp_path / f"open_lm-data-{os.getuid()}-killed").exists()
