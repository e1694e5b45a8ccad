"""Two runs in one folder, other flags or data at a resume, an upload cut off, secrets (rows 26, 27, 28, 30, 39)."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from open_lm.checkpoint.commit import committed, damaged_file
from open_lm.errors import FolderLocked


def test_a_second_run_in_the_folder_ends_with_73_and_disturbs_nothing(scene):
    fault = {"event": "step", "step": 8, "do": "stop"}
    with scene.start(faults=[fault], log=scene.folder / "log") as first:
        first.wait_until(lambda: (scene.folder / "log").exists())
        codes, output = scene.run("--resume", "latest")
        assert codes == [FolderLocked.exit_code] and "another run works in this folder" in output
        first.send(signal.SIGCONT)
        assert first.wait() == [0]
    scene.require_as_straight()


@pytest.mark.parametrize(("event", "host"), [("step", "here"), ("file.sync", "here"), ("file.sync", "elsewhere")])
def test_a_zombie_that_wakes_after_a_takeover_changes_nothing(scene, event, host):
    """It was stopped, also in the middle of a save, and declared dead: what it wrote of itself is made to be of a dead
    process, or of one on another machine that gives no sign of life."""
    fault = {"event": event, "do": "stop", **({"step": 8} if event == "step" else {"path": "optimizer_1"})}
    with scene.start("--wd", "0.5", "--save-every-steps", "4", faults=[fault], log=scene.folder / "log") as zombie:
        zombie.wait_until(lambda: (scene.folder / "log").exists())
        for path in (scene.path().parent / "run.lock", *scene.path().glob("*.unfinished.json")):
            written = json.loads(path.read_text())
            (written.get("owner") or written).update({"started": "another time", "host": os.uname().nodename})
            if host == "elsewhere" and "owner" in written:
                written["owner"]["host"] = "elsewhere"
            path.write_text(json.dumps(written))
        with scene.start("--save-every-steps", "4", "--resume", "latest", "--stop-at-step", "12") as owner:
            assert owner.wait() == [0], owner.output()
            taken = _files(scene)
        zombie.send(signal.SIGCONT)
        assert zombie.wait() != [0]
    assert _files(scene) == taken and scene.steps() == [4, 6, 8, 12]


def _files(scene):
    return {p.name: p.read_bytes() for p in scene.path().iterdir() if not p.name.startswith(".")}


REFUSED = {
    "--optimizer": ("lion", "--optimizer was adamw, is now lion", 66),
    "--lora-rank": ("2", "--lora-rank was", 66),
    "--global-batch-size": ("7", "--global-batch-size", 66),
    "--model-norm": ("rms_norm", "rms_norm", 66),
    "--seed": ("9", "seed", 66),
}
ALLOWED = {
    "--lr": "1e-3", "--wd": "0.3", "--workers": "1", "--accum-freq": "2", "--precision": "amp_bf16",
    "--log-every-n-steps": "3", "--save-every-steps": "7", "--keep-last": "2", "--checkpoint-format": "sharded",
    "--grad-clip-norm": "1", "--beta2": "0.9", "--global-batch-size": "4", "--grad-checkpointing": None,
}  # fmt: skip


@pytest.mark.slow
def test_flags_that_may_change_at_a_resume_and_flags_that_may_not(scene):
    """Those that would not add up are refused by name; the folder stays as it was."""
    scene.run("--stop-at-step", "12")
    before = _files(scene)
    for flag, (value, message, code) in REFUSED.items():
        codes, output = scene.run("--resume", "latest", flag, value)
        assert codes == [code] and message in output, (flag, codes, output)
        assert _files(scene) == before, flag
    for flag, value in ALLOWED.items():
        words = [flag] if value is None else [flag, value]
        codes, output = scene.run("--resume", "latest", *words, "--stop-at-tokens", str(12 * 8 * 16))
        assert codes == [0] and "resumed from" in output, (flag, output)


def test_shards_in_another_order_continue_and_other_shards_are_refused(scene, tmp_path):
    scene.run("--stop-at-step", "12")
    source = Path(scene.manifest)
    rows = source.read_text().splitlines()

    def resumed(name, lines):
        folder = tmp_path / name
        shutil.copytree(source.parent, folder)
        (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
        for path in folder.glob("*.json"):
            path.unlink()
        scene.manifest = str(folder / "manifest.jsonl")
        return scene.run("--resume", "latest", "--multiple-data-passes")

    for name, lines in (("fewer", rows[:1]), ("count", [rows[0], rows[1].replace("250", "249")])):
        codes, output = resumed(name, lines)
        assert codes != [0] and "manifest" in output, output
        assert scene.steps() == [6, 12]
    assert resumed("order", rows[::-1])[0] == [0]
    scene.require_as_straight()


def test_an_upload_that_is_killed_leaves_no_checkpoint_there_and_the_next_start_completes_it(scene, tmp_path):
    copy = ["--remote-sync", str(tmp_path / "remote"), "--remote-sync-frequency", "0.05", "--resume", "latest"]
    there = tmp_path / "remote" / "run" / "checkpoints"
    for nth in (2, 4, 7):
        scene.run(*copy, faults=[{"event": "upload", "nth": nth, "do": "kill"}])
        assert all(damaged_file(str(there), commit) is None for commit in committed(str(there)))
    scene.resume(*copy)
    assert [c.step for c in committed(str(there))] == [24, 18, 12, 6]
    shutil.rmtree(scene.path().parent)
    scene.resume(*copy)  # a machine that has nothing
    assert scene.weights()["norm.weight"].equal(scene.straight()["norm.weight"])


def test_secrets_in_the_environment_and_in_urls_are_written_nowhere(scene, tmp_path):
    mark = "s3cr3t" + "KEY0123"  # in two, for this file is copied too
    secrets = {
        "AWS_SECRET_ACCESS_KEY": mark,
        "HF_TOKEN": f"hf_{mark}",
        "WANDB_API_KEY": mark,
    }
    codes, output = scene.run("--copy-codebase", env=secrets, faults=[{"event": "step", "step": 8, "do": "term"}])
    assert codes == [85] and mark not in output
    codes, output = scene.run("--resume", f"s3://user:{mark}@nowhere.invalid/a.pt?sig={mark}", env=secrets)
    assert codes != [0] and mark not in output, output
    files = [path for path in scene.path().parent.rglob("*") if path.is_file()]
    assert len(files) > 100 and not [path for path in files if mark.encode() in path.read_bytes()]
