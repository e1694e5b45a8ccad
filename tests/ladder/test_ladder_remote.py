"""A ladder whose dir is a bucket, against a real S3 server on loopback: killed, and finished by another machine."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import pytest
from ladder.test_ladder_runs import SHORT, start, wait_for
from ladders import SIZES, write_ladder
from storage.test_s3 import bucket, s3_server  # noqa: F401  (fixtures)

from open_lm import storage
from open_lm.checkpoint.commit import committed
from open_lm.errors import ConfigError
from open_lm.ladder import ModelLadder
from open_lm.ladder.__main__ import main

ONE = {"a": SIZES["a"]}
FLAGS = {"precision": "fp32", "multiple_data_passes": True, "workers": 0}


def command_lines():
    """Those of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_text(errors="replace")


@pytest.mark.slow
def test_another_machine_finishes_a_ladder_from_its_bucket(tmp_path, bucket, capfd):  # noqa: F811
    straight = ModelLadder.from_file(write_ladder(tmp_path, sizes=ONE, run=SHORT))
    straight.run("a")
    remote = f"{bucket}/{tmp_path.name}"
    flags = {**FLAGS, "remote_sync_frequency": 0.05}
    path = write_ladder(tmp_path, sizes=ONE, run=SHORT, dir=remote, flags=flags)
    ladder, work = ModelLadder.from_file(path), tmp_path / "tiny-work"
    process = start(path)
    wait_for(
        lambda: any(commit.step > 20 for commit in committed(f"{remote}/a/checkpoints")) or process.poll() == 0, 400
    )
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    wait_for(lambda: not any(str(work) in line for line in command_lines()), 60)  # its trainer ends with it, and saves
    shutil.rmtree(work)  # another machine has only the ladder file and the bucket

    with pytest.raises(ConfigError, match="seed was 3, is now 4"):
        main(["run", "--ladder", write_ladder(tmp_path, sizes=ONE, run=SHORT, dir=remote, flags=flags, seed=4)])
    write_ladder(tmp_path, sizes=ONE, run=SHORT, dir=remote, flags=flags)
    assert ladder.steps_done("a") == 0
    main(["run", "--ladder", path])
    assert "resumed from" in capfd.readouterr().err
    found, expected = ladder.get_metrics(), straight.get_metrics()
    assert found[["step", "tokens", "loss"]].equals(expected[["step", "tokens", "loss"]])  # bit-equal

    for left in storage.glob(f"{remote}/a/checkpoints/*_1.*"):
        storage.remove(left)  # as if a kill had come between the last save and its copy
    assert not ladder.is_complete("a")
    main(["run", "--ladder", path])
    assert ladder.is_complete("a")

    shutil.rmtree(work)  # a third machine only looks
    assert "3/3          3/3      100 %    done" in main(["status", "--ladder", path])
    assert len(main(["metrics", "--ladder", path])) == 3
    assert all(checkpoint.path.startswith(remote) for checkpoint in main(["checkpoints", "--ladder", path]))
    assert {c.step for c in committed(f"{remote}/a/checkpoints")} == {0, 58, 65}
    kept = storage.read_text(f"{remote}/a/checkpoints/metrics_step65.json")
    assert json.loads(kept)["loss"] == expected["loss"].iloc[-1]
    other = write_ladder(tmp_path, dir="elsewhere")
    rows = main(["metrics", "--ladder", other, "--alternative-dirs", remote])
    assert sorted(rows["step"]) == [0, 58, 65]
