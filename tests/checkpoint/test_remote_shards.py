"""Sharded checkpoints straight to S3 from every rank, each with a disk of its own, and back, against a real server."""

import json
import os
import signal

import pytest
from checkpoint.states import STATS, NoData, assert_same, content, make_checkpoints, make_state, take_steps
from gloo import run_ranks
from storage.test_s3 import bucket, s3_server  # noqa: F401  (fixtures)
from torch.multiprocessing import ProcessExitedException

from open_lm import storage
from open_lm.checkpoint.commit import committed, damaged_file
from open_lm.checkpoint.config import CheckpointConfig
from open_lm.checkpoint.resolve import newest_in
from open_lm.checkpoint.restore import restore
from open_lm.checkpoint.retention import UNFINISHED
from open_lm.distributed import World
from open_lm.errors import ConfigError

FORMAT = {"checkpoint_format": "sharded-remote"}


def checkpoints(world, tmp_path, url, **flags):
    """Of a rank whose disk no other rank sees."""
    found = make_checkpoints(tmp_path / f"disk{world.rank}", remote_sync=url, **FORMAT, **flags)
    found.copy = f"{url}/checkpoints"
    return found


def save(found, state, label):
    saved = found.save(state, NoData(), label=label, stats=STATS, wait=True)
    found.close()
    return saved


def _saved(world, tmp_path, url):
    state = make_state(world, fsdp=True, extra_state=True)
    found = checkpoints(world, tmp_path, url)
    for label in ("1", "2"):
        take_steps(state, 3)
        assert save(found, state, label)
    (tmp_path / f"disk{world.rank}").mkdir(exist_ok=True)
    assert not list((tmp_path / f"disk{world.rank}").iterdir())  # nothing stays on the disks


def _resumed(world, tmp_path, url, step):
    again = make_state(world, fsdp=True, seed=5, extra_state=True)
    restore(checkpoints(world, tmp_path / "other", url, resume="latest"), again, NoData())
    straight = make_state(extra_state=True)
    take_steps(straight, step)
    assert again.step == step
    assert_same(content(again), content(straight))


def _resumed_alone(tmp_path, url, step):
    """By one process, without FSDP."""
    again, straight = make_state(seed=5, extra_state=True), make_state(extra_state=True)
    restore(checkpoints(World(), tmp_path / "alone", url, resume="latest"), again, NoData())
    take_steps(straight, step)
    assert again.step == step
    assert_same(content(again), content(straight))


@pytest.mark.slow
def test_every_rank_sends_and_fetches_its_own_part(tmp_path, bucket):  # noqa: F811
    """Saved by two ranks, restored by two, three and one; a damaged newest is found by the ranks together."""
    url = f"{bucket}/{tmp_path.name}"
    run_ranks(_saved, 2, tmp_path, url)
    folder = f"{url}/checkpoints"
    assert [commit.step for commit in committed(folder)] == [6, 3]
    assert all(damaged_file(folder, commit) is None for commit in committed(folder))
    newest = committed(folder)[0]
    assert sum(name.endswith(".distcp") for name in newest.files) == 2
    for n_ranks in (2, 3):
        run_ranks(_resumed, n_ranks, tmp_path, url, 6)
    _resumed_alone(tmp_path, url, 6)
    path = f"{folder}/{next(name for name in newest.files if '__1_0' in name)}"
    bits = bytearray(storage.read_bytes(path))
    bits[len(bits) // 2] ^= 1
    storage.write_bytes(path, bytes(bits))
    run_ranks(_resumed, 2, tmp_path, url, 3)
    assert newest_in(folder, "all").commit.step == 3


def _one_fails(world, tmp_path, url):
    from open_lm.checkpoint import remote_shards

    real = remote_shards.upload

    def failing(*arguments):
        if world.rank == 1:
            raise OSError("the network is gone")
        return real(*arguments)

    state = make_state(world, fsdp=True)
    found = checkpoints(world, tmp_path, url)
    remote_shards.upload = failing
    assert not save(found, state, "1") and "network is gone" in found.problem
    remote_shards.upload = real
    assert save(found, state, "1")


@pytest.mark.slow
def test_a_rank_that_cannot_send_fails_the_save_on_all(tmp_path, bucket):  # noqa: F811
    url = f"{bucket}/{tmp_path.name}"
    run_ranks(_one_fails, 2, tmp_path, url)
    (commit,) = committed(f"{url}/checkpoints")
    found = storage.remote.filesystem(url).find(f"{url}/checkpoints")
    assert {path.partition("checkpoints/")[2] for path in found} == {*commit.files, commit.commit_name}


def _killed(world, tmp_path, url):
    """One good save, and one that is killed after its shards were sent."""
    from open_lm.checkpoint import remote_shards

    found, state = checkpoints(world, tmp_path, url), make_state()
    assert save(found, state, "1")
    remote_shards._commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    state.step = 3
    save(found, state, "2")


def test_what_a_killed_save_sent_is_deleted_by_the_next_and_nothing_else(tmp_path, bucket):  # noqa: F811
    url = f"{bucket}/{tmp_path.name}"
    folder = f"{url}/checkpoints"
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(_killed, 1, tmp_path, url)
    found = checkpoints(World(), tmp_path, url)
    good = {f"{folder}/{name}" for name in committed(folder)[0].files}
    left = set(storage.files_within(folder)) - good
    assert any(".distcp" in name for name in left) and any(name.endswith(UNFINISHED) for name in left)
    assert [commit.label for commit in committed(folder)] == ["1"]
    storage.write_text(
        f"{folder}/epoch_9{UNFINISHED}",
        json.dumps({"names": [min(good).rpartition("/")[0].rpartition("/")[2]], "owner": {}}),
    )
    state = make_state()
    state.step = 7
    assert save(found, state, "3")
    assert [commit.label for commit in committed(folder)] == ["3", "1"]
    named = {f"{folder}/{name}" for c in committed(folder) for name in (*c.files, c.commit_name)}
    assert set(storage.files_within(folder)) == named


def test_it_needs_a_remote():
    with pytest.raises(ConfigError, match="give the url"):
        CheckpointConfig(**FORMAT)
