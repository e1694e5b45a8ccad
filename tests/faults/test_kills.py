"""Kills: of one rank, of the job, between any two operations on the files of a save (rows 1, 2, 4, 5, 29)."""

import random
import signal

import pytest
from faults.scene import STEPS, log_lines

FORMATS = ["consolidated", "sharded"]


@pytest.mark.parametrize("step", random.Random(1).sample(range(1, STEPS), 2))
def test_one_rank_killed_at_a_random_step(scene, step):
    codes, _ = scene.run(size=2, faults=[{"event": "step", "rank": 1, "step": step, "do": "kill"}])
    assert codes == [71, -signal.SIGKILL]
    assert scene.steps() == [s for s in (6, 12, 18, 24) if s < step]  # the save of this very step may not be whole
    scene.resume(size=2)
    scene.require_as_straight(size=2)


@pytest.mark.slow
def test_four_ranks_are_bit_equal_after_a_kill(scene):
    """torch settles the buckets of DDP after a first step; the order in which four ranks are added depends on them."""
    codes, _ = scene.run(size=4, faults=[{"event": "step", "step": 8, "do": "kill"}])
    assert codes == [-signal.SIGKILL] * 4
    scene.resume(size=4)
    scene.require_as_straight(size=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_job_killed_at_random_moments_until_it_is_done(scene, seed):
    """Other numbers of ranks and workers each time; two formats."""
    rng = random.Random(seed)
    kind = ["--checkpoint-format", FORMATS[seed % 2]]
    for _ in range(4):
        step = rng.randrange(1, STEPS)
        fault = {"event": rng.choice(["step", "file.rename", "gradients"]), "nth": step, "do": "kill"}
        workers = ["--workers", str(rng.choice([0, 1]))]
        with scene.start(*kind, *workers, "--resume", "latest", size=rng.choice([1, 2]), faults=[fault]) as ranks:
            ranks.wait()
        assert scene.steps() == sorted(scene.steps())
    scene.resume(*kind)
    scene.require_as_straight(within=1e-5)


@pytest.mark.parametrize(("kind", "size"), [("consolidated", 1), ("sharded", 2)])
def test_a_kill_between_any_two_operations_on_files_leaves_the_old_checkpoint_or_the_new(scene, kind, size):
    kill_points(scene, kind, size, n_points=3, seed=kind)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("consolidated", 1), ("sharded", 2)])
def test_a_kill_at_fifteen_points_of_a_save(scene, kind, size):
    kill_points(scene, kind, size, n_points=15, seed="all")


def kill_points(scene, kind, size, n_points, seed):
    log = scene.folder / "events"
    note = [{"event": "any", "rank": size - 1, "do": "note"}]
    kinds = ["--checkpoint-format", kind, "--no-async-save"]
    codes, output = scene.run(*kinds, size=size, faults=note, name="noted", log=log)
    assert set(codes) == {0}, output
    events = [line["event"] for line in log_lines(log)]
    saves = [k for k, event in enumerate(events) if event == "save"]
    points = [k for k in range(saves[1], saves[2]) if events[k].startswith(("file", "save"))]
    for number, k in enumerate(random.Random(seed).sample(points, min(n_points, len(points)))):
        fault = {"event": events[k], "rank": size - 1, "nth": events[: k + 1].count(events[k]), "do": "kill"}
        codes, output = scene.run(*kinds, size=size, faults=[fault], name=f"k{number}")
        assert codes[-1] == -signal.SIGKILL, (fault, output)
        steps = scene.steps(f"k{number}")
        assert steps in ([6], [6, 12]), (fault, steps)
        is_last = number == n_points - 1
        if is_last:
            codes, output = scene.run(*kinds, "--resume", "latest", size=size, name=f"k{number}")
            assert set(codes) == {0} and scene.steps(f"k{number}") == [6, 12, 18, 24], output


def test_a_kill_while_a_step_is_saved_again_leaves_its_first_checkpoint_untouched(scene):
    scene.run()
    before = {p.name: p.read_bytes() for p in scene.path().iterdir()}
    back = ["--resume", str(scene.path() / "epoch_2.pt"), "--wd", "0.5"]
    codes, _ = scene.run(*back, faults=[{"event": "file.rename", "path": "optimizer_3", "do": "kill"}])
    assert codes == [-signal.SIGKILL]
    after = {p.name: p.read_bytes() for p in scene.path().iterdir()}
    renamed = {"epoch_3.commit.json": "epoch_3.left-behind.json", "epoch_4.commit.json": "epoch_4.left-behind.json"}
    assert all(after[renamed.get(name, name)] == content for name, content in before.items())
    assert scene.steps() == [6, 12]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_two_good_checkpoints_always_exist_while_saves_are_killed(scene, kind):
    words = ["--checkpoint-format", kind, "--no-async-save", "--keep-last", "2", "--resume", "latest"]
    scene.run(*words, "--stop-at-step", "12")
    newest = 12
    for event in ("file.rename", "file.write", "file.sync"):
        codes, _ = scene.run(*words, faults=[{"event": event, "step": newest + 5, "nth": 2, "do": "kill"}])
        assert codes == [-signal.SIGKILL]
        assert len(scene.steps()) >= 2 and max(scene.steps()) >= newest
    scene.resume(*words)
    assert scene.steps() == [18, 24]
    scene.require_clean()


def test_a_rank_killed_while_its_data_workers_begin_is_missed_at_once(scene):
    """A worker has the sockets of its rank: one that outlived it kept the others waiting until --dist-timeout."""
    fault = {"event": "worker", "rank": 1, "do": "kill_parent"}
    codes, output = scene.run("--workers", "1", size=2, faults=[fault], timeout=30)
    assert codes == [71, -signal.SIGKILL], output
    scene.resume(size=2)
    scene.require_as_straight(size=2)
