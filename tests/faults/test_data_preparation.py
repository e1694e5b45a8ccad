"""Preparing data under faults: killed at random, fed with bad lines, a document that kills its worker."""

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
import pytest
import tokenizers

from open_lm.data.tokenizer import load_tokenizer
from open_lm.preprocess.job import Job
from open_lm.preprocess.make import build_data_set, destination

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    trained.train_from_iterator([(ROOT / "open_lm" / "data" / "plan.py").read_text()], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path


@pytest.fixture
def job(tmp_path, tokenizer_json):
    """Three files, one of them packed, in some 40 blocks, as a job, and as the file that describes it."""
    import zstandard

    texts = [path.read_text() for path in sorted((ROOT / "open_lm" / "data").glob("*.py"))[:18]]
    inputs = []
    for name, part in (("a.jsonl", texts[:8]), ("b.jsonl.zst", texts[8:14]), ("c.jsonl", texts[14:])):
        content = b"".join(orjson.dumps({"text": text}) + b"\n" for text in part)
        path = tmp_path / name
        path.write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
        inputs.append((str(path), path.stat().st_size))
    tokenizer = load_tokenizer(str(tokenizer_json))
    made = Job(
        inputs=tuple(inputs), tokenizer=str(tokenizer_json), tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size, eot_token="<|endoftext|>", eot_id=0, seq_len=31, shard_size=100,
        data_key="npy", content_key="text", seed=1, on_bad_line="stop", max_document_bytes=1 << 20, block_bytes=3000,
    )  # fmt: skip
    (tmp_path / "job.json").write_bytes(made.json)
    return made


def digest(folder):
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def kill(tmp_path, tokenizer_json, n_kills, n_workers=1, whom="all", folder=None, seed=0, **environment):
    """The numbers of kills that hit and of data sets that were finished, in `folder`."""
    folder = folder or str(tmp_path / "out")
    args = [tmp_path / "job.json", tokenizer_json, folder, n_kills, seed, n_workers, whom]
    command = [sys.executable, str(HERE / "killed_builds.py"), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(map(int, done.stdout.split()[-2:]))


def test_ten_kills_at_random_moments_change_no_byte(job, tmp_path, tokenizer_json):
    hits, finished = kill(tmp_path, tokenizer_json, 10)
    straight = build_data_set(job, destination(str(tmp_path / "straight")), tokenizer_json.read_text(), n_workers=1)
    assert straight["documents"]["rejected"] == {} and straight["documents"]["tokenized"] == 18
    assert hits == 10
    last = destination(str(tmp_path / "out" / str(finished)))
    build_data_set(job, last, tokenizer_json.read_text(), n_workers=1, resume=True)
    for k in range(finished + 1):
        assert digest(tmp_path / "out" / str(k)) == digest(tmp_path / "straight")


@pytest.mark.slow
def test_a_hundred_kills_of_all_of_the_coordinator_and_of_workers_change_no_byte(job, tmp_path, tokenizer_json):
    build_data_set(job, destination(str(tmp_path / "straight")), tokenizer_json.read_text(), n_workers=1)
    wanted, total = digest(tmp_path / "straight"), Counter()
    for seed, (n_kills, n_workers, whom) in enumerate([(89, 1, "all"), (8, 2, "coordinator"), (3, 2, "worker")]):
        folder = tmp_path / whom
        hits, finished = kill(tmp_path, tokenizer_json, n_kills, n_workers, whom, str(folder), seed)
        total.update(kills=hits, finished=finished)
        last = destination(str(folder / str(finished)))
        build_data_set(job, last, tokenizer_json.read_text(), n_workers=1, resume=True)
        assert {digest(folder / str(k)) for k in range(finished + 1)} == {wanted}
    assert total["kills"] >= 100
    print(dict(total))


@pytest.mark.slow
def test_kills_while_writing_to_s3_change_no_byte(job, tmp_path, tokenizer_json, monkeypatch):
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs")
    from open_lm import storage
    from open_lm.storage import remote

    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    names["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server._server.server_port}"
    try:
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        remote.filesystem("s3://x").clear_instance_cache()
        remote.filesystem("s3://kills").mkdir("s3://kills")
        hits, finished = kill(tmp_path, tokenizer_json, 8, folder="s3://kills", **names)
        build_data_set(job, destination(str(tmp_path / "straight")), tokenizer_json.read_text(), n_workers=1)
        tokenizer = tokenizer_json.read_text()
        last = destination(f"s3://kills/{finished}", str(tmp_path / "last"))
        build_data_set(job, last, tokenizer, n_workers=1, resume=True)
        assert hits == 8
        for path in (tmp_path / "straight").iterdir():
            for k in range(finished + 1):
                assert storage.read_bytes(f"s3://kills/{k}/{path.name}") == path.read_bytes()
    finally:
        server.stop()


BAD = {
    "malformed_json": b'{"text": "x"', "invalid_utf8": b'{"text": "\xff"}', "missing_key": b'{"other": "x"}',
    "not_text": b'{"text": 5}', "empty": b'{"text": ""}', "too_long": b'{"text": "' + b"x" * 3000 + b'"}', None: b"  ",
}  # fmt: skip


@pytest.mark.parametrize("reason", [*BAD, "mixed"])
def test_bad_lines_two_in_a_hundred_are_counted_exactly_and_the_rest_is_there(job, tmp_path, tokenizer_json, reason):
    import dataclasses

    dice, truth, lines = random.Random(str(reason)), Counter(), []
    for k in range(1000):
        if dice.random() < 0.02:
            kind = dice.choice(list(BAD)) if reason == "mixed" else reason
            truth[kind] += 1
            lines.append(BAD[kind])
        else:
            lines.append(orjson.dumps({"text": f"document number {k}"}))
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines))
    made = dataclasses.replace(
        job, inputs=((str(path), path.stat().st_size),), on_bad_line="skip", max_document_bytes=2000
    )
    ledger = build_data_set(made, destination(str(tmp_path / "out")), tokenizer_json.read_text(), n_workers=1)
    blank = truth.pop(None, 0)
    assert ledger["documents"]["rejected"] == dict(truth) and ledger["blank_lines"] == blank
    assert ledger["documents"]["tokenized"] == 1000 - truth.total() - blank


PLANTED = """
import os, signal, sys
if any("forkserver" in word for word in sys.orig_argv):
    from open_lm.preprocess import input
    real = input.document_of
    def kills(url, line, key):
        if b"POISON" in (line.content or b""): os.kill(os.getpid(), signal.SIGKILL)
        return real(url, line, key)
    input.document_of = kills
"""


@pytest.mark.slow
def test_a_document_that_kills_its_worker_is_set_aside_and_the_other_files_are_done(tmp_path, tokenizer_json):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(PLANTED)
    for k in range(6):
        text = {"text": "some text " * 900_000 + ("POISON" if k == 2 else "")}
        (tmp_path / f"{k}.jsonl").write_bytes(orjson.dumps(text) + b"\n")
    files = [str(tmp_path / f"{k}.jsonl") for k in range(6)]
    command = [
        sys.executable,
        "-m",
        "open_lm",
        "prepare",
        "--input-files",
        *files,
        "--output-dir",
        str(tmp_path / "out"),
    ]
    command += ["--tokenizer", str(tokenizer_json), "--num-workers", "2", "--encoder", "tokenizers", "--seqlen", "127"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'planted'}:{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 65, done.stderr[-1000:]
    assert "set aside" in done.stderr and "2.jsonl" in done.stderr
    finished = {path.name for path in (tmp_path / "out.unfinished").glob("read-*.json")}
    assert len(finished) == 5
    del environment["PYTHONPATH"]
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert resumed.returncode == 0 and (tmp_path / "out" / "manifest.jsonl").exists()
