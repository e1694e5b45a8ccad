"""Damage: bits flipped, files cut or missing, all checkpoints bad, a clock that jumps (rows 6, 7, 31)."""

import json
import os
import random
import time
from collections import Counter

import pytest

from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.resolve import newest_in, resolve
from open_lm.errors import CheckpointError

FORMATS = ["consolidated", "sharded"]
KINDS = ("weights", "optimizer", "stats", "index", "shard", "commit")


def kind_of_file(name):
    if name.endswith(".commit.json"):
        return "commit"
    if ".distcp" in name:
        return "shard"
    if name.endswith(".metadata"):
        return "index"
    return next((kind for kind in ("optimizer", "stats") if kind in name), "weights")


def files_of_newest(scene):
    newest = scene.commits()[0]
    return newest.step, [scene.path() / name for name in (*newest.files, newest.commit_name)]


def flip(path, rng):
    """Flip one random bit; what the file was."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    return content


@pytest.mark.parametrize("kind", FORMATS)
def test_100_random_bit_flips_are_all_found_before_use(scene, kind):
    """In weights, optimizer, shards, index, facts and commit file alike; `latest` takes the checkpoint before."""
    scene.run("--checkpoint-format", kind, size=1 + (kind == "sharded"), steps=12)
    last, files = files_of_newest(scene)
    rng, found = random.Random(kind), Counter()
    for k in range(100):
        path = files[k % len(files)]
        before = flip(path, rng)
        taken = newest_in(str(scene.path()), "all")
        found[kind_of_file(path.name)] += taken is not None and taken.commit.step < last
        path.write_bytes(before)
    assert sum(found.values()) == 100
    assert set(found) == ({"weights", "optimizer", "stats", "commit"} if kind == "consolidated" else
                          {"shard", "index", "stats", "commit"})  # fmt: skip
    assert newest_in(str(scene.path()), "all").commit.step == last


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "commit cut"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_continues(scene, damage):
    scene.run(steps=24)
    _, files = files_of_newest(scene)
    path = files[-1] if damage == "commit cut" else files[0]
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        flip(path, random.Random(0))
    else:
        path.write_bytes(path.read_bytes()[:-5])
    output = scene.resume()
    assert path.name in output and "resumed from" in output and "at step 18" in output
    assert scene.steps()[-1] == 24 and path.name not in scene.commits()[0].files
    for name, tensor in scene.straight().items():
        assert tensor.equal(scene.weights()[name])


def test_when_all_checkpoints_are_damaged_the_run_ends_with_66_and_deletes_nothing(scene):
    scene.run()
    for commit in scene.commits():
        flip(scene.path() / f"epoch_{commit.label}.pt", random.Random(1))
    before = {p.name: p.read_bytes() for p in scene.path().iterdir()}
    for size in (1, 2):
        codes, output = scene.run("--resume", "latest", size=size)
        assert codes == [66] * size and "all 4 checkpoints are damaged" in output
    assert {p.name: p.read_bytes() for p in scene.path().iterdir()} == before


def test_a_clock_that_jumps_back_changes_nothing(scene):
    """The newest is the one of the most steps; a lock of tomorrow is still a dead one."""
    scene.run("--stop-at-step", "12")
    for k, path in enumerate(sorted(scene.path().iterdir())):
        os.utime(path, (time.time() - 86400 * (k + 1),) * 2)
    os.utime(scene.path() / "epoch_1.commit.json", (time.time() + 86400,) * 2)
    lock = {"host": os.uname().nodename, "pid": 2**22 - 7, "started": "tomorrow", "token": "x", "beats": 10**9}
    (scene.path().parent / "run.lock").write_text(json.dumps(lock))
    os.utime(scene.path().parent / "run.lock", (time.time() + 86400,) * 2)
    assert "at step 12" in scene.resume()
    scene.require_as_straight()


def test_what_is_named_outright_is_checked_too(scene):
    scene.run(steps=12)
    _, files = files_of_newest(scene)
    flip(files[1], random.Random(2))
    with pytest.raises(CheckpointError, match="does not have the hash"):
        resolve(str(scene.path() / "epoch_4.pt"), "all")
    assert committed(str(scene.path()))  # sizes alone are right
