"""Full disks, quotas and broken files while a run saves and logs (rows 8, 9, 10)."""

import pytest
from faults.scene import log_lines


@pytest.mark.parametrize(("kind", "event"), [("consolidated", "file.sync"), ("sharded", "file.write")])
def test_a_disk_that_is_full_for_one_save_costs_that_save_only(scene, kind, event):
    """On one rank, in the middle of its file; the next save succeeds, and training is not disturbed."""
    rank = int(kind == "sharded")
    faults = [{"event": event, "rank": rank, "step": 11, "do": "full"}]
    words = ["--checkpoint-format", kind, "--no-async-save"]
    log = scene.folder / "log"
    codes, output = scene.run(*words, size=2, faults=faults, log=log)
    assert codes == [0, 0] and len(log_lines(log)) == 1
    assert "checkpoint 2 was not written" in output and "No space left" in output
    assert scene.steps() == [6, 18, 24]
    scene.require_as_straight(size=2)


def test_a_disk_that_stays_full_ends_the_run_after_three_saves(scene):
    faults = [{"event": "file.sync", "path": "optimizer", "nth": 2, "always": True, "do": "full"}]
    codes, output = scene.run(faults=faults)
    assert codes == [74] and "Make room, then use --resume latest" in output
    assert scene.steps() == [6]
    scene.require_clean()
    scene.resume()
    scene.require_as_straight()


@pytest.mark.parametrize("do", ["quota", "broken"])
def test_an_error_on_the_commit_file_alone_leaves_the_checkpoint_before(scene, do):
    faults = [{"event": "file.rename", "path": "epoch_2.commit", "do": do}]
    codes, output = scene.run(faults=faults)
    assert codes == [0] and "checkpoint 2 was not written" in output
    assert scene.steps() == [6, 18, 24]
    scene.require_as_straight()


def test_logs_that_cannot_be_written_do_not_end_the_run(scene):
    folder = scene.path().parent
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", "out.log"):
        (folder / name).symlink_to("/dev/full")
    codes, output = scene.run()
    assert codes == [0] and "No space left on device" in output
    scene.require_as_straight()
