"""tokenize_shuffle on a real Ray cluster of two nodes: the bytes of make_2048, whatever dies and wherever they go."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from open_lm.commands import prepare_ray
from open_lm.data.manifest import read_manifest
from open_lm.data.shards import read_samples
from open_lm.errors import ConfigError, DataError, StorageError

pytest.importorskip("ray", reason="needs Ray (pip install ray==2.60.0)")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "datapreprocess" / "ray" / "tokenize_shuffle.py"


@pytest.fixture(scope="module")
def s3():
    """The url of an S3 server on loopback with a bucket; the cluster's nodes know it from their environment."""
    moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="s3:// needs s3fs (pip install s3fs)")
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server._server.server_port}"
    named = {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in named.items():
            patch.setenv(name, value)
        import fsspec

        fsspec.filesystem("s3").clear_instance_cache()
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        yield "s3://bucket"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def cluster(s3):
    """The address of a cluster of two nodes with a core each."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    cluster.add_node(**small)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def shuffle(script, cluster, tokenizer_json):
    """`shuffle(input, output, *flags)` runs the tool on the cluster."""
    main = script("datapreprocess/ray/tokenize_shuffle.py").main
    settings = [
        "--tokenizer",
        str(tokenizer_json),
        "--seqlen",
        "15",
        "--wds_chunk_size",
        "32",
        "--ray_address",
        cluster,
    ]
    return lambda source, out, *flags: main(["--input", str(source), "--output", str(out), *settings, *flags])


def tree(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix == ".tar"}


def samples_of(folder):
    shards = read_manifest(f"{folder}/manifest.jsonl")
    return [tuple(tokens.tolist()) for shard in shards for _, tokens in read_samples(shard.url)]


def test_a_cluster_writes_the_bytes_of_make_2048(shuffle, make_2048, raw, tmp_path, tokenizer_json, texts):
    for k in range(4):
        raw(f"{k}.jsonl.zst", texts[k::4])
    ledger = shuffle(tmp_path / "raw", tmp_path / "ray", "--seed", "5")
    alone = ["--input-files", str(tmp_path / "raw"), "--output-dir", str(tmp_path / "one"), "--seqlen", "15"]
    alone += ["--tokenizer", str(tokenizer_json), "--shard-size", "32", "--num-workers", "1", "--seed", "5"]
    assert make_2048(alone) == ledger
    assert tree(tmp_path / "ray") == tree(tmp_path / "one") and len(tree(tmp_path / "one")) > 3
    shuffle(tmp_path / "raw", tmp_path / "narrow", "--seed", "5", "--force_parallelism", "1", "--encoder", "tokenizers")
    assert tree(tmp_path / "narrow") == tree(tmp_path / "one")
    assert not list(tmp_path.glob("*.unfinished"))


def test_from_s3_to_s3_through_s3_the_shards_are_the_same(shuffle, raw, tmp_path, s3, texts):
    from open_lm import storage

    for k in range(3):
        storage.write_bytes(f"{s3}/raw/deep/{k}.jsonl.gz", Path(raw(f"{k}.jsonl.gz", texts[k::3])).read_bytes())
    for source, out in ((f"{s3}/raw", f"{s3}/out"), (tmp_path / "raw", tmp_path / "out")):
        shuffle(source, out, "--wds_chunk_size", "512")
    remote = {Path(url).name: storage.read_bytes(url) for url in storage.glob(f"{s3}/out/*.tar")}
    assert Counter(samples_of(f"{s3}/out")) == Counter(samples_of(tmp_path / "out"))
    assert remote.keys() == tree(tmp_path / "out").keys()
    assert storage.glob(f"{s3}/out.unfinished/**") == []
    with pytest.raises(ConfigError, match="--overwrite"):
        shuffle(f"{s3}/raw", f"{s3}/out", "--seed", "9")


def test_a_killed_worker_is_replaced_and_the_bytes_are_the_same(
    shuffle, cluster, raw, tmp_path, tokenizer_json, texts, s3
):
    for k in range(2):
        raw(f"{k}.jsonl", texts * 60)
    arguments = ["--input", str(tmp_path / "raw"), "--tokenizer", str(tokenizer_json), "--seqlen", "15"]
    arguments += ["--ray_address", cluster, "--encoder", "tokenizers"]
    line = [sys.executable, str(SCRIPT), *arguments, "--output", str(tmp_path / "killed")]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed = None
    while running.poll() is None and killed is None:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if process.read_bytes().startswith(b"ray::tokenize"):
                    killed = int(process.parent.name)
                    os.kill(killed, signal.SIGKILL)
                    break
            except (FileNotFoundError, ProcessLookupError):
                continue
        time.sleep(0.01)
    output, _ = running.communicate(timeout=120)
    assert killed and running.returncode == 0, output
    shuffle(tmp_path / "raw", tmp_path / "straight", "--wds_chunk_size", "8192")
    assert tree(tmp_path / "killed") == tree(tmp_path / "straight")


@pytest.fixture
def tasks(cluster):
    """The executor, connected to the cluster."""
    from open_lm.preprocess import ray_workers

    ray = ray_workers.connect(cluster, n_cores=None, dashboard_host="127.0.0.1")
    yield ray_workers.RayTasks(ray)
    ray.shutdown()


def test_tasks_reach_both_nodes_and_errors_come_back_as_they_are(tasks, tmp_path):
    tasks([partial(_note_node, str(tmp_path), k) for k in range(8)], 2, label="x", total_bytes=8)
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 2
    with pytest.raises(DataError, match="the file is bad"):
        tasks([partial(_fail, "the file is bad")], 2, label="x", total_bytes=1)


def test_a_task_that_always_kills_its_worker_ends_the_run(tasks, monkeypatch):
    from open_lm.preprocess import ray_workers

    monkeypatch.setattr(ray_workers, "_TIMES_STARTED_AGAIN", 1)
    with pytest.raises(DataError, match=r"1 of 1 tasks.*died 2 times.*--resume"):
        tasks([partial(_die)], 1, label="tokenize", total_bytes=1)


def test_a_poisoned_task_is_set_aside_and_the_others_are_done(tasks, tmp_path, monkeypatch):
    from open_lm.preprocess import ray_workers

    monkeypatch.setattr(ray_workers, "_TIMES_STARTED_AGAIN", 0)
    calls = [partial(_die), *(partial(_note_node, str(tmp_path), k) for k in range(4))]
    with pytest.raises(DataError, match=r"1 of 5 tasks were set aside.*_die"):
        tasks(calls, 2, label="tokenize", total_bytes=5)
    assert len(list(tmp_path.iterdir())) == 4


def test_trouble_of_the_store_that_passes_is_tried_again(tasks, tmp_path):
    tasks([partial(_flaky, str(tmp_path / "flag"))], 1, label="x", total_bytes=1)
    assert (tmp_path / "flag").exists()


def _flaky(flag):
    from open_lm.errors import StorageError

    if not os.path.exists(flag):
        Path(flag).touch()
        raise StorageError("cannot read s3://b/x: slow down (tried 8 times).")
    yield 1


def _note_node(folder, number):
    import ray

    time.sleep(0.05)
    Path(folder, str(number)).write_text(ray.get_runtime_context().get_node_id())
    yield 1


def _fail(message):
    raise DataError(message)
    yield 0


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
    yield 0


YAML = """
sources:
  - {source: A, markers: [/a/]}
  - {source: B, markers: [/b/, bbb]}
  - {source: UNKNOWN, markers: []}
sampling_frequencies: {A: 3.5, B: 0.25, UNKNOWN: 1}
"""


def test_each_source_is_written_as_often_as_the_yaml_says_and_copies_lie_apart(shuffle, raw, tmp_path, texts):
    for source in "abc":
        os.makedirs(tmp_path / "in" / source)
        os.replace(raw(f"{source}.jsonl", [f"{source} {t}" for t in texts]), tmp_path / "in" / source / "x.jsonl")
    (tmp_path / "y.yaml").write_text(YAML)
    (tmp_path / "once.yaml").write_text(re.sub(r"(A|B|UNKNOWN): [\d.]+", r"\1: 1", YAML))
    once = ["--do_sample", "--default_dataset_yaml", str(tmp_path / "once.yaml")]
    plain = shuffle(tmp_path / "in", tmp_path / "plain", *once)
    ledger = shuffle(
        tmp_path / "in", tmp_path / "out", "--do_sample", "--default_dataset_yaml", str(tmp_path / "y.yaml")
    )
    books = ledger["sampling"]
    assert {name: row["frequency"] for name, row in books.items()} == {"A": 3.5, "B": 0.25, "UNKNOWN": 1}
    for row in books.values():
        expected, spread = row["samples"] * row["frequency"], 4 * (row["samples"] * 0.25) ** 0.5
        assert abs(row["written"] - expected) <= spread
    assert sum(row["written"] for row in books.values()) == ledger["samples"] > plain["samples"]
    found = samples_of(tmp_path / "out")
    once = {sample for sample, n in Counter(samples_of(tmp_path / "plain")).items() if n == 1}
    times = Counter(sample for sample in found if sample in once)
    assert set(times.values()) == {1, 3, 4}
    assert not any(one == other for one, other in itertools.pairwise(found) if one in once)
    assert ledger["tokens"]["in"] == plain["tokens"]["in"]


def test_without_shuffling_the_samples_are_the_text_in_order(shuffle, raw, tmp_path, tokenizer_json, texts):
    import tokenizers

    for k in range(3):
        raw(f"{k}.jsonl", texts[k * 40 : k * 40 + 40])
    shuffle(tmp_path / "raw", tmp_path / "out", "--no_shuffle")
    encode = tokenizers.Tokenizer.from_file(str(tokenizer_json)).encode
    stream = [t for x in texts[:120] for t in [*encode(x, add_special_tokens=False).ids, 0]]
    expected = [tuple(stream[i : i + 16]) for i in range(0, len(stream) // 16 * 16, 16)]
    assert samples_of(tmp_path / "out") == expected


def flags_of(*arguments):
    return prepare_ray.TokenizeShuffle(input="x", output="y", **dict(arguments))


def test_the_choice_of_files_depends_on_the_seed_alone():
    chosen = prepare_ray.chosen
    urls = [f"/d/{k}.jsonl" for k in range(100)]
    some = chosen(urls, flags_of(("subset", 50), ("subfraction", 0.2)))
    assert len(some) == 10 and some == sorted(some)
    assert some == chosen(urls[::-1], flags_of(("subset", 50), ("subfraction", 0.2)))
    assert some != chosen(urls, flags_of(("subset", 50), ("subfraction", 0.2), ("seed", 1)))
    with pytest.raises(StorageError, match="--subfraction"):
        chosen(urls, flags_of(("subfraction", 0.001)))


def test_the_flags_of_dclm_s_wrapper_are_taken():
    """It names the yaml of sources also where nothing is sampled."""
    flags_of(("default_dataset_yaml", "rpj_lm_data.yaml"), ("num_writers_per_node", 1), ("ray_spill_location", "/tmp"))
    with pytest.raises(ConfigError, match="needs --default_dataset_yaml"):
        flags_of(("do_sample", True))


def test_old_flags_without_a_meaning_are_one_warning(script, caplog):
    flags_of(("presort", True), ("ray_spill_location", "/x"), ("allow_imbalanced_write", True))
    assert len(caplog.messages) == 1 and "--ray_spill_location, --presort, --allow_imbalanced_write" in caplog.text
    caplog.clear()
    flags_of(("ray_dashboard_host", "0.0.0.0"))
    assert "--ray_dashboard_host 0.0.0.0" in caplog.text


@pytest.mark.parametrize(
    ("yaml", "match"),
    [
        ("sources: 5", "need sources"),
        ("{", "not yaml"),
        ("sources: [{source: A, markers: [x]}]\nsampling_frequencies: {A: .nan}", "give 0 or more"),
        ("sources: [{source: A, markers: [x]}]\nsampling_frequencies: {A: 1}", "no sampling_frequencies for UNKNOWN"),
    ],
)
def test_a_yaml_that_says_no_frequencies_is_refused(tmp_path, yaml, match):
    from open_lm.preprocess.source_rates import assign

    (tmp_path / "y.yaml").write_text(yaml)
    with pytest.raises(ConfigError, match=match):
        assign(["/d/a.jsonl"], str(tmp_path / "y.yaml"), "--default_dataset_yaml")


def test_the_folder_hides_no_package_and_the_command_says_what_is_wrong(tmp_path):
    assert not (SCRIPT.parent / "__init__.py").exists()
    line = [sys.executable, str(SCRIPT), "--input", "nowhere", "--output", "x"]
    done = subprocess.run(line, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == StorageError.exit_code
    assert done.stderr.startswith("error: --input /nowhere: no file matches")


def test_without_ray_the_pip_line_is_given(monkeypatch):
    from open_lm.preprocess import ray_workers

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install ray"):
        ray_workers.connect(None, n_cores=1, dashboard_host="127.0.0.1")


def test_copies_are_spread_evenly_and_chances_are_kept():
    from open_lm.preprocess.packing import copies, keys_of_copies, shuffle_keys

    numbers, copy = copies(10_000, 2.25, seed=1, block="b")
    times = np.bincount(numbers, minlength=10_000)
    assert set(times) == {2, 3} and abs(times.mean() - 2.25) < 4 * (0.1875 / 10_000) ** 0.5
    keys = keys_of_copies(numbers, copy, seed=1, block="b")
    assert (keys[copy == 0] - shuffle_keys(10_000, seed=1, block="b") < 2**62).all()
    for k in range(200):
        mine = np.sort(keys[numbers == k])
        gaps = np.diff(np.append(mine, mine[:1]))  # around the circle of 64 bits
        assert int(gaps.min()) >= 2**64 // int(times[k]) // 2 - 2
    assert np.array_equal(copies(50, 1.0, seed=1, block="b")[0], np.arange(50))


def test_unfinished_work_in_s3_is_gone_on_with_and_other_work_is_refused(s3, raw, tmp_path, tokenizer_json, texts):
    import dataclasses

    from open_lm import storage
    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.preprocess.job import make_job
    from open_lm.preprocess.make import Destination, build_data_set
    from open_lm.preprocess.workers import run_tasks

    settings = {"seq_len": 15, "shard_size": 512, "data_key": "npy", "content_key": "text", "seed": 1}
    settings |= {"on_bad_line": "stop", "max_document_bytes": 1 << 20, "block_bytes": 60_000}
    job = make_job([raw("a.jsonl", texts)], load_tokenizer(str(tokenizer_json)), **settings)
    done = []

    def stopped(tasks, n_workers, /, *, label, total_bytes):
        for number, task in enumerate(tasks):
            if label == "write shards" and number == 2:
                raise KeyboardInterrupt
            done.append(sum(task()))

    def build(folder, **more):
        where = Destination(folder, f"{folder}.unfinished")
        return build_data_set(job, where, tokenizer_json.read_text(), n_workers=1, **more)

    with pytest.raises(KeyboardInterrupt):
        build(f"{s3}/halted", run=stopped)
    assert len(done) == 3 and not storage.exists(f"{s3}/halted/manifest.jsonl")
    with pytest.raises(ConfigError, match="--resume"):
        build(f"{s3}/halted", run=run_tasks)
    other = dataclasses.replace(job, seed=2)
    with pytest.raises(ConfigError, match="other settings"):
        build_data_set(other, Destination(f"{s3}/halted", f"{s3}/halted.unfinished"), "", n_workers=1, resume=True)
    written = storage.size_bytes(f"{s3}/halted/00000000.tar")
    assert build(f"{s3}/halted", resume=True) == build(str(tmp_path / "straight"))
    assert written == (tmp_path / "straight" / "00000000.tar").stat().st_size
    for path in (tmp_path / "straight").iterdir():
        assert storage.read_bytes(f"{s3}/halted/{path.name}") == path.read_bytes()
    assert storage.glob(f"{s3}/halted.unfinished/**") == []
