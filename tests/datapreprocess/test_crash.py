"""A preprocessing run that is killed anywhere and resumed ends with the same bytes; so does any number of workers."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from open_lm.data.manifest import read_manifest
from open_lm.data.tokenizer import load_tokenizer
from open_lm.errors import ConfigError, DataError
from open_lm.preprocess.job import Job
from open_lm.preprocess.make import build_data_set, destination

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(raw, tokenizer_json, texts):
    """Two files, one of them packed, in blocks of 2000 bytes."""
    tokenizer = load_tokenizer(str(tokenizer_json))
    files = [raw("a.jsonl", texts[:12]), raw("b.jsonl.zst", texts[12:24])]
    return Job(
        inputs=tuple((f, os.path.getsize(f)) for f in files), tokenizer=str(tokenizer_json),
        tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eot_token="<|endoftext|>",
 eot_id=0,
        seq_len=15, shard_size=200, data_key="npy", content_key="text", seed=1, on_bad_line="stop",
        max_document_bytes=1 << 20, block_bytes=2000,
    )  # fmt: skip


def build(job, folder, **kwargs):
    text = Path(job.tokenizer).read_text()
    return build_data_set(
        job, destination(str(folder)), text, **({"n_workers": 1, "resume": False, "overwrite": False} | kwargs)
    )


def tree(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def build_and_die(job, folder, at_rename, after):
    """Build in a child that is gone without any clean-up at its n-th rename; whether it got that far."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    renames, real = [0], os.replace

    def replace(source, target):
        renames[0] += 1
        if after:
            real(source, target)
        if renames[0] == at_rename:
            os._exit(9)
        if not after:
            real(source, target)

    os.replace = replace
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        build(job, folder, resume=True)
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_rename_and_resumed_the_bytes_are_the_same(job, tmp_path, monkeypatch, after):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    build(job, tmp_path / "straight")
    straight, point = tree(tmp_path / "straight"), 0
    while True:
        point += 1
        folder = tmp_path / f"out{point}"
        if not build_and_die(job, folder, point, after):
            break
        assert not folder.exists() or tree(folder) == straight
        build(job, folder, resume=True)
        assert tree(folder) == straight
        assert sorted(p.name for p in tmp_path.glob(f"out{point}*")) == [f"out{point}"]
    assert point > 15


def test_killed_again_and_again_it_still_gets_there(job, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    build(job, tmp_path / "straight")
    for _ in range(100):
        if not build_and_die(job, tmp_path / "out", 7, True):
            break
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


@pytest.mark.parametrize("n_workers", [2, 3])
def test_many_blocks_on_many_workers_give_the_same_bytes(job, tmp_path, n_workers):
    one = build(job, tmp_path / "one")
    assert build(job, tmp_path / "many", n_workers=n_workers) == one
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


@pytest.mark.parametrize("block_bytes", [50, 777, 10**6])
def test_blocks_lose_nothing_wherever_they_are_cut(job, tmp_path, block_bytes):
    whole = build(job, tmp_path / "whole")
    cut = build(dataclasses.replace(job, block_bytes=block_bytes), tmp_path / "cut")
    assert [cut[key] for key in ("documents", "tokens", "text_bytes", "samples")] == [
        whole[key] for key in ("documents", "tokens", "text_bytes", "samples")
    ]


def test_a_whole_job_killed_with_its_workers_leaves_no_process_and_resumes(job, tmp_path, tokenizer_json):
    out = tmp_path / "out"
    files = [url for url, _ in job.inputs]
    Path(files[0]).write_bytes(Path(files[0]).read_bytes() * 120)
    line = [sys.executable, str(ROOT / "datapreprocess" / "make_2048.py"), "--input-files", *files, "--output-dir"]
    flags = ["--tokenizer", str(tokenizer_json), "--seqlen", "15", "--num-workers", "2", "--resume"]
    started = subprocess.Popen([*line, str(out), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = []
    while len(workers) < 4 and started.poll() is None:  # what forks, what tracks resources, and two workers
        time.sleep(0.05)
        workers = [pid for child in children(started.pid) for pid in (child, *children(child))]
    started.send_signal(signal.SIGKILL)
    started.wait()
    alive = workers
    for _ in range(400):
        alive = [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists() and _runs(pid)]
        if not alive:
            break
        time.sleep(0.05)
    assert not [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive]
    subprocess.run([*line, str(out), *flags], check=True, capture_output=True, timeout=60)
    subprocess.run([*line, str(tmp_path / "straight"), *flags], check=True, capture_output=True, timeout=60)
    assert tree(out) == tree(tmp_path / "straight")


def children(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


def _runs(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_worker_killed_by_the_system_is_an_error_and_never_a_hang(job, tmp_path, monkeypatch):
    from open_lm.preprocess import workers

    monkeypatch.setattr(workers, "TRIES", 2)
    with pytest.raises(DataError, match=r"2 of 2 tasks were set aside.*was killed 2 times.*_kill_me.*--resume"):
        workers.run_tasks([_kill_me, _kill_me], 2, label="tokenize", total_bytes=0)


@pytest.mark.slow
def test_a_task_that_kills_its_worker_is_set_aside_and_the_others_are_done(tmp_path):
    from functools import partial

    from open_lm.preprocess import workers

    marks = [partial(_mark, str(tmp_path / str(k))) for k in range(6)]
    once = partial(_kill_me_once, str(tmp_path / "once"))
    with pytest.raises(DataError, match=r"1 of 8 tasks were set aside.*killed 3 times.*_kill_me\(\)"):
        workers.run_tasks([marks[0], _kill_me, once, *marks[1:]], 2, label="tokenize", total_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {*"012345", "once"}


def test_workers_have_the_current_environment(tmp_path, monkeypatch):
    from functools import partial

    from open_lm.preprocess import workers

    for value in ("first", "second"):
        monkeypatch.setenv("OF_NOW", value)
        calls = [partial(_note_environment, str(tmp_path / f"{value}{k}")) for k in range(2)]
        workers.run_tasks(calls, 2, label="x", total_bytes=0)
        assert (tmp_path / f"{value}0").read_text() == value


def _note_environment(path):
    Path(path).write_text(os.environ.get("OF_NOW", "nothing"))
    yield 1


def _mark(path):
    Path(path).touch()
    yield 1


def _kill_me_once(path):
    if not os.path.exists(path):
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield 1


def _kill_me():
    os.kill(os.getpid(), signal.SIGKILL)
    yield 0


def test_unfinished_work_is_refused_without_resume_and_with_other_settings(job, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert build_and_die(job, tmp_path / "out", 9, True)
    with pytest.raises(ConfigError, match=r"holds unfinished work.*--resume"):
        build(job, tmp_path / "out")
    with pytest.raises(ConfigError, match="other settings or inputs"):
        build(dataclasses.replace(job, seed=2), tmp_path / "out", resume=True)
    build(dataclasses.replace(job, seed=2), tmp_path / "out", overwrite=True)


def test_two_processes_cannot_work_at_one_data_set(job, tmp_path):
    import fcntl

    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            build(job, tmp_path / "out")


def test_the_shuffle_is_a_permutation_of_all_samples_across_shards(job, tmp_path):
    """With 1000 samples of one token each, places and origins do not correlate, and no shard keeps a block together."""
    import numpy as np

    from open_lm.preprocess.job import write_sorted
    from open_lm.preprocess.packing import shuffle_keys
    from open_lm.preprocess.shuffle import SortedRuns, bins_of

    names = [f"block-{k}" for k in range(10)]
    for k, name in enumerate(names):
        samples = np.arange(400, dtype="<u2")[:, None] + 400 * k
        write_sorted(str(tmp_path / f"{name}.bin"), samples, shuffle_keys(400, seed=0, block=name))
    runs = SortedRuns(str(tmp_path), tuple(names), (400,) * 10, 1, "<u2")
    below = runs.count_bins()
    order = (
        np.concatenate([runs.read(k, k + 250, bins_of(below, k, k + 250)) for k in range(0, 4000, 250)])
        .ravel()
        .astype(float)
    )
    assert sorted(order) == list(range(4000))
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 4 / np.sqrt(4000)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / np.sqrt(4000)
    for shard in order.reshape(16, 250):
        assert np.bincount((shard // 400).astype(int), minlength=10).max() < 50


def test_the_published_data_set_is_what_its_manifest_says(job, tmp_path):
    import zlib

    import orjson

    build(job, tmp_path / "out")
    rows = [orjson.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_bytes().splitlines()]
    for row, shard in zip(rows, read_manifest(f"{tmp_path}/out/manifest.jsonl"), strict=True):
        content = Path(shard.url).read_bytes()
        assert (row["bytes"], row["crc32"]) == (len(content), f"{zlib.crc32(content):08x}")
