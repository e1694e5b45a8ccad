"""The shard cache: the same batches, each shard fetched once, never more on disk than allowed.

`memory://` stands for a remote store here; tests/storage has a real S3 server.
"""

import threading

import fsspec
import pytest

from open_lm import storage
from open_lm.data.cache import ShardCache
from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.errors import DataError


@pytest.fixture
def remote(data_set):
    """The url of a data set of 6 shards in a remote store, and its local twin."""
    folder = data_set([10] * 6, "json")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/{folder.parent.name}/{path.name}", path.read_bytes())
    yield f"memory://{folder.parent.name}", folder
    memory.rm(f"/{folder.parent.name}", recursive=True)


def loader_of(folder, **flags):
    config = DataConfig(dataset_manifest=(f"{folder}/manifest.jsonl",), workers=0, **flags)
    return build_loader(config, vocab_size=60_000, seq_len=4, global_batch=4, rank=0, world_size=1, seed=0)


def batches(folder, **flags):
    return [batch.inputs_BT.tolist() for batch in loader_of(folder, **flags).batches(0, 15)]


def test_batches_are_the_same_and_each_shard_is_fetched_once(remote, tmp_path, monkeypatch):
    url, folder = remote
    opened, real = [], storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda name: opened.append(name) or real(name))
    assert batches(url, data_cache=str(tmp_path / "cache")) == batches(folder)
    tars = [name for name in opened if name.startswith("memory://") and name.endswith(".tar")]
    assert len(tars) == len(set(tars)) == 6
    opened.clear()
    assert batches(url, data_cache=str(tmp_path / "cache")) == batches(folder)
    assert not [name for name in opened if name.startswith("memory://") and name.endswith(".tar")]


def test_the_cache_stays_below_its_limit_and_still_gives_every_sample(remote, tmp_path):
    url, folder = remote
    size = (folder / "00000000.tar").stat().st_size
    found = batches(url, data_cache=str(tmp_path / "cache"), data_cache_gb=2.5 * size / 1e9)
    assert found == batches(folder)
    assert 1 <= len(list((tmp_path / "cache").glob("*.tar"))) <= 2


def test_the_longest_unused_shard_goes_first(remote, tmp_path):
    import os

    url, folder = remote
    cache = ShardCache(str(tmp_path / "cache"), 2.5 * (folder / "00000000.tar").stat().st_size)
    first, second = (cache.local(f"{url}/{k:08d}.tar") for k in (0, 1))
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    cache.local(f"{url}/00000000.tar")
    cache.local(f"{url}/00000002.tar")
    assert os.path.exists(first) and not os.path.exists(second)


def test_many_readers_fetch_a_shard_once(remote, tmp_path, monkeypatch):
    url, _ = remote
    opened, real = [], storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda name: opened.append(name) or real(name))
    caches = [ShardCache(str(tmp_path / "cache"), 1e9) for _ in range(8)]
    threads = [threading.Thread(target=cache.local, args=(f"{url}/00000003.tar",)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1


def test_a_shard_that_cannot_be_fetched_is_named(remote, tmp_path):
    url, _ = remote
    loader = loader_of(url, data_cache=str(tmp_path / "cache"))
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/") + "/00000004.tar")
    with pytest.raises(DataError, match=r"00000004\.tar.*no such file"):
        list(loader.batches(0, 15))
