"""Storage against a real S3 HTTP server on loopback: whole objects or none, faults that pass are waited out."""

import io
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from open_lm import storage
from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.storage import remote

pytest.importorskip("s3fs", reason="s3:// needs s3fs (pip install s3fs)")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")

ROOT = Path(__file__).resolve().parents[2]
SECRET = "very-secret-value"


class Faults:
    """A proxy before the server: `plan` holds what to do with the next requests for an object's bytes."""

    def __init__(self, port):
        faults, self.plan, self.seen = self, [], []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def relay(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = faults.plan.pop(0) if faults.plan and self.command in ("GET", "PUT", "POST") else None
                faults.seen.append((self.command, self.path, self.headers.get("Range"), fault))
                if fault == 503:
                    return self.answer(503, {}, b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
                if fault == 403:
                    return self.answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
                if fault == "reset":
                    self.close_connection = True
                    return self.connection.close()
                connection = HTTPConnection("127.0.0.1", port)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                self.answer(response.status, dict(response.getheaders()), response.read(), cut=fault == "cut")

            def answer(self, status, headers, content, cut=False):
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", len(content)) if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self.close_connection = True
                    self.connection.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = relay

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture(scope="module")
def s3_server():
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    proxy = Faults(server._server.server_port)
    yield proxy
    proxy.server.shutdown()
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    import fsspec

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server.url, "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    fsspec.filesystem("s3").clear_instance_cache()
    s3_server.plan.clear()
    filesystem = remote.filesystem("s3://bucket")
    if not filesystem.exists("s3://bucket"):
        filesystem.mkdir("s3://bucket")
    return "s3://bucket"


CONTENT = np.random.default_rng(0).bytes(300_000)


def test_what_is_written_is_read_listed_measured_and_removed(bucket):
    url = f"{bucket}/a b/x.bin"
    storage.write_bytes(url, CONTENT)
    assert storage.read_bytes(url) == CONTENT
    assert storage.size_bytes(url) == len(CONTENT)
    assert storage.read_range(url, 1000, 2000) == CONTENT[1000:2000]
    assert storage.glob(f"{bucket}/**/*.bin") == [url]
    for folder in ("odd[1]", "odd *"):  # taken as it is, not as a pattern
        storage.write_text(f"{bucket}/{folder}/a.txt", "x")
        assert storage.glob_in(f"{bucket}/{folder}", "*.txt") == [f"{bucket}/{folder}/a.txt"]
    assert storage.exists(url) and storage.exists(f"{bucket}/a b")
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)


def test_nothing_appears_when_the_writer_fails(bucket):
    writer = storage.open_atomic(f"{bucket}/never")
    writer.__enter__().write(CONTENT)
    assert not writer.__exit__(RuntimeError, RuntimeError("the writer fails"), None)
    assert not storage.exists(f"{bucket}/never")


@pytest.mark.parametrize("fault", [503, "reset", "cut"])
def test_faults_that_pass_are_waited_out_and_the_bytes_are_right(bucket, s3_server, fault, monkeypatch):
    monkeypatch.setattr(remote, "RANGE_BYTES", 100_000)
    url = f"{bucket}/x"
    storage.write_bytes(url, CONTENT)
    with storage.open_read(url) as file:
        first = file.read(100_000)
        s3_server.seen.clear()
        s3_server.plan[:] = [fault, fault, None]
        rest = file.read()
    assert first + rest == CONTENT
    ranges = [seen for _, _, seen, done in s3_server.seen if done == fault]
    assert len(ranges) == 2 and all(seen and not seen.startswith("bytes=0-") for seen in ranges)


def test_uploads_are_tried_again_and_appear_whole(bucket, s3_server):
    s3_server.plan[:] = [503, "reset"]
    storage.write_bytes(f"{bucket}/up", CONTENT)
    assert storage.read_bytes(f"{bucket}/up") == CONTENT


def test_what_is_forbidden_is_not_tried_again_and_no_secret_is_shown(bucket, s3_server, caplog):
    storage.write_bytes(f"{bucket}/x", CONTENT)
    s3_server.plan[:] = [403]
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/x") as caught:
        storage.read_range(f"{bucket}/x", 0, 10)
    assert s3_server.plan == []
    for text in (str(caught.value), caplog.text):
        assert SECRET not in text and "AKIA" not in text


def test_a_server_that_never_recovers_is_an_error_that_says_how_often_it_was_tried(bucket, s3_server, monkeypatch):
    storage.write_bytes(f"{bucket}/x", CONTENT)
    monkeypatch.setattr(remote, "TRIES", 3)
    s3_server.plan[:] = [503] * 50
    with pytest.raises(StorageError, match="tried 3 times"):
        storage.read_range(f"{bucket}/x", 0, 10)


def test_what_is_missing_is_said_at_once(bucket, s3_server):
    s3_server.seen.clear()
    with pytest.raises(StorageError, match="s3://bucket/nowhere: there is no such file"):
        storage.read_bytes(f"{bucket}/nowhere")
    assert len(s3_server.seen) < 4


def test_a_file_that_changes_while_it_is_read_is_an_error(bucket, monkeypatch):
    monkeypatch.setattr(remote, "RANGE_BYTES", 100_000)
    url = f"{bucket}/x"
    storage.write_bytes(url, CONTENT)
    file = storage.open_read(url)
    file.read(10)
    storage.write_bytes(url, CONTENT[::-1])
    with pytest.raises(StorageError, match="changed during the read"):
        file.read()


@pytest.mark.parametrize("key", ["npy", "json.gz"])
def test_training_reads_the_same_batches_from_s3_as_from_disk(bucket, tmp_path, s3_server, key):
    from open_lm.data.config import DataConfig
    from open_lm.data.loader import build_loader
    from open_lm.data.shards import write_shard
    from open_lm.utils import make_wds_manifest

    samples = np.arange(60 * 9, dtype="<u2").reshape(60, 9)
    for k in range(3):
        tar = io.BytesIO()
        write_shard(tar, samples[20 * k : 20 * k + 20], key)
        storage.write_bytes(str(tmp_path / f"{k}.tar"), tar.getvalue())
        storage.write_bytes(f"{bucket}/{key}/{k}.tar", tar.getvalue())
    found = {}
    for folder in (str(tmp_path), f"{bucket}/{key}"):
        manifest = make_wds_manifest.main(["--data-dir", folder])
        for flags in ({"dataset_manifest": (manifest,)}, {"train_data": (f"{folder}/{{0..2}}.tar",)}):
            config = DataConfig(workers=int("dataset_manifest" in flags), **flags)
            loader = build_loader(config, vocab_size=600, seq_len=8, global_batch=4, rank=0, world_size=1, seed=0)
            s3_server.plan[:] = [503]
            found[(folder, *flags)] = [batch.inputs_BT.tolist() for batch in loader.batches(0, 15)]
    assert len({str(batches) for batches in found.values()}) == 1
    assert sorted(row[0] for batch in found[folder, "train_data"] for row in batch) == samples[:, 0].tolist()


def test_make_2048_reads_from_and_writes_to_s3_what_it_writes_to_disk(bucket, tmp_path, s3_server, monkeypatch):
    import importlib.util

    import tokenizers

    spec = importlib.util.spec_from_file_location("make_2048", ROOT / "datapreprocess" / "make_2048.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    storage.write_text(f"{bucket}/raw/a.jsonl", '{"text": "abba"}\n' * 500)
    args = [
        "--input-files",
        f"{bucket}/raw/*.jsonl",
        "--tokenizer",
        str(tmp_path / "tokenizer.json"),
        "--num-workers",
        "1",
    ]
    args += ["--seqlen", "7", "--shard-size", "100", "--encoder", "tokenizers", "--tmp-dir", str(tmp_path)]
    script.main([*args, "--output-dir", str(tmp_path / "out")])
    s3_server.plan[:] = [None] * 8 + [503, None, "reset"]
    script.main([*args, "--output-dir", f"{bucket}/direct"])
    with pytest.raises(ConfigError, match="S3_BASE"):
        script.main([*args, "--output-dir", str(tmp_path / "based"), "--upload-to-s3"])
    monkeypatch.setenv("S3_BASE", f"{bucket}/base")
    script.main([*args, "--output-dir", str(tmp_path / "based"), "--upload-to-s3"])
    for path in (tmp_path / "out").iterdir():
        for folder in (f"{bucket}/direct", f"{bucket}/base/based"):
            assert storage.read_bytes(f"{folder}/{path.name}") == path.read_bytes()
    assert len(storage.glob(f"{bucket}/direct/*")) == len(list((tmp_path / "out").iterdir())) > 4
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["out", "tokenizer.json"]
    with pytest.raises(ConfigError, match="--overwrite"):
        script.main([*args, "--output-dir", f"{bucket}/direct"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://u:p@h/x?X-Amz-Signature=abc failed", "GET https://h/x failed"),
        ("key AKIAIOSFODNN7EXAMPLE, hf_abcdefghijkl", "key ***, ***"),
        ("token=abc", "token=***"),
        ("nothing here", "nothing here"),
    ],
)
def test_messages_lose_what_may_be_secret(text, expected):
    assert storage.redacted(text) == expected


def training_set(bucket, name, key, n_shards=3, n_samples=1800, length=2049):
    """A data set of shards of several blocks each; its manifest, and the bytes of its shards."""
    from open_lm.data.manifest import write_manifest
    from open_lm.data.shards import describe_shard, write_shard

    rows, total = [], 0
    for k in range(n_shards):
        samples = np.random.default_rng(k).integers(0, 50_000, (n_samples, length)).astype("<u2")
        tar = io.BytesIO()
        write_shard(tar, samples, key, first_number=n_samples * k)
        storage.write_bytes(f"{bucket}/{name}/{k}.tar", tar.getvalue())
        rows.append({"shard": str(k), **describe_shard(tar.getvalue(), "x")})
        total += len(tar.getvalue())
    write_manifest(f"{bucket}/{name}/manifest.jsonl", rows)
    return f"{bucket}/{name}/manifest.jsonl", total


def training_loader(manifest, cache, rank=0, world_size=1, **flags):
    from open_lm.data.config import DataConfig
    from open_lm.data.loader import build_loader

    config = DataConfig(dataset_manifest=(manifest,), workers=0, data_cache=str(cache), **flags)
    shape = {"vocab_size": 60_000, "seq_len": 2048, "global_batch": 36}
    return build_loader(config, **shape, rank=rank, world_size=world_size, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["npy", "json.gz"])
def test_a_pass_over_s3_costs_its_bytes_once_in_requests_of_4_mib_for_all_ranks_together(
    bucket, s3_server, tmp_path, key
):
    manifest, total = training_set(bucket, f"count-{key}", key)
    s3_server.seen.clear()
    for rank in range(2):
        loader = training_loader(manifest, tmp_path / "cache", rank, 2, shuffle_lanes=36, shuffle_window=16)
        assert sum(len(batch) for batch in loader.batches(0, 150)) == 2700
    shards = [(method, ranges) for method, path, ranges, _ in s3_server.seen if path.endswith(".tar")]
    ends = [tuple(map(int, ranges.removeprefix("bytes=").split("-"))) for _, ranges in shards if ranges]
    assert sum(last - first + 1 for first, last in ends) <= total
    heads_at_start = 2 * 3  # a sample of the shards is looked for by each of these loaders
    assert len(shards) - heads_at_start <= total / (4 << 20) + 2 * 3


def test_an_object_replaced_in_the_middle_of_a_run_is_noticed(bucket, tmp_path):
    manifest, _ = training_set(bucket, "replaced", "npy", n_samples=1000)
    batches = training_loader(manifest, tmp_path / "cache", shuffle_lanes=1, shuffle_window=1).batches(0, 80)
    next(batches)
    for k in range(3):
        url = f"{bucket}/replaced/{k}.tar"
        content = bytearray(storage.read_bytes(url))
        content[-1_000_000] ^= 1
        storage.write_bytes(url, bytes(content))
    with pytest.raises(DataError, match=r"changed during the read|make the manifest again"):
        list(batches)
