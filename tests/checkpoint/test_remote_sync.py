"""A run folder copied to S3 beside the training, and brought back, against a real S3 server on loopback."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import ROOT, flags, folder_of, metrics, run, weights, write_data
from storage.test_s3 import bucket, s3_server  # noqa: F401  (fixtures)

from open_lm import storage
from open_lm.checkpoint import remote_sync
from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.fetch import bring_back_logs
from open_lm.checkpoint.latest import newest_sound
from open_lm.checkpoint.remote_sync import RemoteSync
from open_lm.distributed import World
from open_lm.errors import StorageError


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def remote(bucket, tmp_path):  # noqa: F811
    return f"{bucket}/{tmp_path.name}"


def synced(remote):
    return ["--remote-sync", remote, "--remote-sync-frequency", "0.05", "--num-checkpoints", "3"]


def test_a_machine_that_has_nothing_goes_on_where_another_stopped(tmp_path, manifest, remote):
    run(tmp_path, manifest, "--num-checkpoints", "3", name="straight")
    run(tmp_path / "first", manifest, *synced(remote), "--stop-at-step", "6")
    arguments = flags(tmp_path / "second", manifest, *synced(remote), "--resume", "latest")
    del arguments[arguments.index("--model") : arguments.index("--model") + 2]  # the checkpoint says which
    from open_lm.main import main

    assert main(arguments).step == 12
    assert all(
        torch.equal(w, weights(tmp_path / "second", label="3")[n])
        for n, w in weights(tmp_path, "straight", "3").items()
    )
    assert metrics(tmp_path / "second") == metrics(tmp_path, "straight")
    commits = committed(f"{remote}/run/checkpoints")
    assert [commit.step for commit in commits] == [12, 8, 6, 4]


def test_what_arrives_is_what_was_written_and_deletions_are_mirrored(tmp_path, manifest, remote):
    run(tmp_path, manifest, *synced(remote), "--keep-last", "1")
    local = {
        p.name: p.read_bytes() for p in (folder_of(tmp_path) / "checkpoints").iterdir() if not p.name.startswith(".")
    }
    found = storage.glob(f"{remote}/run/checkpoints/*")
    assert {name.rpartition("/")[2]: storage.read_bytes(name) for name in found} == local
    assert storage.read_text(f"{remote}/run/metrics.jsonl") == (folder_of(tmp_path) / "metrics.jsonl").read_text()


def test_who_goes_on_from_the_copy_lacks_no_log_and_no_checkpoint_that_was_to_stay(
    tmp_path, manifest, remote, monkeypatch
):
    run(tmp_path, manifest, "--num-checkpoints", "3", "--save-at-steps", "0,2,6")
    copied, upload = [], remote_sync.upload

    def noted(path, url, *rest):
        copied.append(os.path.basename(path))
        upload(path, url, *rest)

    monkeypatch.setattr(remote_sync, "upload", noted)
    RemoteSync(str(folder_of(tmp_path)), f"{remote}/run", 60).sync()
    order = [name.removesuffix(".commit.json") for name in copied if name.endswith(".commit.json")]
    assert order == ["epoch_0", "epoch_0-step2", "epoch_1-step6", "epoch_3", "epoch_2", "epoch_1"]
    assert copied.index("metrics.jsonl") < copied.index("epoch_0.commit.json")


def test_nothing_that_another_start_copied_is_deleted(tmp_path, manifest, remote):
    run(tmp_path / "first", manifest, *synced(remote), "--stop-at-step", "8")
    run(tmp_path / "second", manifest, *synced(remote), "--resume", "latest")
    assert {commit.label for commit in committed(f"{remote}/run/checkpoints")} == {"1", "2", "3"}


@pytest.mark.parametrize("fault", [503, "reset", 403])
def test_a_pass_that_fails_is_said_and_the_next_one_completes(tmp_path, manifest, remote, s3_server, fault, caplog):  # noqa: F811
    run(tmp_path, manifest, "--num-checkpoints", "2")
    mirror = RemoteSync(str(folder_of(tmp_path)), f"{remote}/run", 60)
    s3_server.plan[:] = [fault] * 5
    if fault == 403:
        with pytest.raises(StorageError, match=r"403|Forbidden|AccessDenied|no"):
            mirror.sync()
        s3_server.plan.clear()
    mirror.sync()
    assert {commit.label for commit in committed(f"{remote}/run/checkpoints")} == {"1", "2"}


def test_a_killed_copy_leaves_no_checkpoint_there_and_the_next_start_completes_it(tmp_path, manifest, remote):
    arguments = flags(tmp_path, manifest, *synced(remote), "--multiple-data-passes", steps=3000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [sys.executable, "-m", "open_lm.main", *arguments], stderr=subprocess.DEVNULL, env=environment
    )
    while not storage.glob(f"{remote}/run/checkpoints/epoch_1.pt"):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    for commit in committed(f"{remote}/run/checkpoints"):  # whatever is complete there is complete
        assert all(storage.exists(f"{remote}/run/checkpoints/{name}") for name in commit.files)
    mirror = RemoteSync(str(folder_of(tmp_path)), f"{remote}/run", 60)
    mirror.sync()
    assert "1" in {commit.label for commit in committed(f"{remote}/run/checkpoints")}


def test_a_copy_that_was_tampered_with_is_not_taken(tmp_path, manifest, remote, caplog):
    run(tmp_path / "first", manifest, *synced(remote))
    path = f"{remote}/run/checkpoints/optimizer_3.pt"
    content = bytearray(storage.read_bytes(path))
    content[len(content) // 2] ^= 1
    storage.write_bytes(path, bytes(content))
    folder = tmp_path / "second" / "checkpoints"
    found = newest_sound(World(), [str(folder), f"{remote}/run/checkpoints"])
    assert found.commit.label == "2" and [commit.label for commit in committed(str(folder))] == ["2"]
    assert "optimizer_3.pt does not have the hash" in caplog.text
    assert not list(folder.glob("*_3.*"))
    storage.write_text(f"{remote}/run/mirror.json", json.dumps(["../outside"]))
    with pytest.raises(StorageError, match="leads out of the run folder"):
        bring_back_logs(f"{remote}/run", str(tmp_path / "second"))


def test_a_run_starts_from_a_checkpoint_on_s3(tmp_path, manifest, remote):
    run(tmp_path / "first", manifest, *synced(remote))
    path = f"{remote}/run/checkpoints/epoch_2.pt"
    run(tmp_path / "second", manifest, "--num-checkpoints", "3", "--resume", path)
    first, second = (weights(tmp_path / name, label="3") for name in ("first", "second"))
    assert all(torch.equal(w, first[name]) for name, w in second.items())
    started = run(tmp_path / "third", manifest, "--pretrained", path, "--stop-at-step", "1")
    assert started.step == 1
