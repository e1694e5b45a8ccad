"""Reading from an object store: requests and bytes of one pass by many readers, counted by the server.

    python benchmarks/remote_data.py [--shards 64] [--megabytes 27] [--readers 8] [--key npy] [--no-manifest]
        [--cache-gb 100]

A server on the loopback speaks S3 (GET with Range and If-Match, HEAD, ListObjectsV2) and counts; the shards are links
to one file on disk. The readers are ranks of one run, processes that share a --data-cache; together they read one pass.
"""

import argparse
import collections
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SEQ_LEN, VOCAB = 2048, 60_000


class CountingS3(BaseHTTPRequestHandler):
    """S3's reading half over the files of a folder: /bucket/key is FOLDER/key."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    counts: ClassVar[collections.Counter[str]] = collections.Counter()
    guard = threading.Lock()

    def do_HEAD(self) -> None:
        self._object(with_body=False)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path).strip("/").partition("/")[2]
        if key:
            self._object(with_body=True)
        elif parts.path == "/counts":
            self._answer(200, json.dumps(self.counts).encode())
        else:
            self._answer(200, self._listing(parse_qs(parts.query).get("prefix", [""])[0]))

    def _object(self, *, with_body: bool) -> None:
        path = self.folder / unquote(urlsplit(self.path).path).strip("/").partition("/")[2]
        if not path.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>" if with_body else b"")
            return
        size, etag = path.stat().st_size, f'"{path.stat().st_mtime_ns:x}"'
        if self.headers.get("If-Match", etag) != etag:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(span[1]), min(size, int(span[2] or size) + 1)) if span else (0, size)
        kind = "shards" if path.suffix == ".tar" else "others"
        with self.guard:
            self.counts[f"{kind} {self.command}"] += 1
            self.counts[f"{kind} bytes"] += (stop - start) if with_body else 0
            if with_body:
                self.counts[f"GET {path.name}"] += 1
        self.send_response(206 if span else 200)
        for name, value in (("Content-Length", stop - start), ("ETag", etag), ("Accept-Ranges", "bytes")):
            self.send_header(name, str(value))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if with_body:
            with open(path, "rb") as file:
                os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start) if stop > start else None

    def _listing(self, prefix: str) -> bytes:
        found = sorted(path for path in self.folder.rglob("*") if str(path.relative_to(self.folder)).startswith(prefix))
        rows = "".join(
            f"<Contents><Key>{path.relative_to(self.folder)}</Key><Size>{path.stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for path in found
            if path.is_file()
        )
        head = '<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>'
        return f"{head}<KeyCount>{len(found)}</KeyCount>{rows}</ListBucketResult>".encode()

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def serve(folder: str, ports: multiprocessing.Queue) -> None:
    """Serve until killed."""
    CountingS3.folder = Path(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), CountingS3)
    ports.put(server.server_port)
    server.serve_forever()


def make_set(folder: Path, key: str, n_shards: int, megabytes: float, with_manifest: bool) -> tuple[int, int]:
    """Shards of about that size, links to one; how many samples and bytes they are together."""
    import numpy as np

    from open_lm.data.manifest import write_manifest
    from open_lm.data.shards import describe_shard, write_shard

    one_sample = {"npy": 5120, "json.gz": 5120}.get(key, 14_000)
    n = int(megabytes * 1e6 / one_sample)
    samples = np.random.default_rng(0).integers(0, 50_000, (n, SEQ_LEN + 1)).astype("<u2")
    with open(folder / "0.tar", "wb") as file:
        write_shard(file, samples, key)
    row = describe_shard((folder / "0.tar").read_bytes(), "0")
    for k in range(1, n_shards):
        os.link(folder / "0.tar", folder / f"{k}.tar")
    if with_manifest:
        write_manifest(str(folder / "manifest.jsonl"), [{"shard": str(k), **row} for k in range(n_shards)])
    return n * n_shards, n_shards * row["bytes"]


def read(rank: int, world: int, data: dict, cache: str, limit_gb: float, batch: int, n_steps: int, turn: list) -> None:
    """One rank's share of the pass; rank 0 looks at the shards for all, as a run's does."""
    import torch

    from open_lm.data.config import DataConfig
    from open_lm.data.loader import build_loader

    torch.set_num_threads(1)
    config = DataConfig(**data, workers=0, data_cache=cache, data_cache_gb=limit_gb)
    sources, ready = turn

    def on_rank0(work):
        if rank == 0:
            found = work()
            for _ in range(world - 1):
                sources.put(found)
            return found
        return sources.get()

    shape = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "global_batch": batch}
    loader = build_loader(config, **shape, rank=rank, world_size=world, seed=0, n_steps=n_steps, on_rank0=on_rank0)
    ready.wait()
    n = sum(len(rows) for rows in loader.batches(0, n_steps))
    assert n == n_steps * batch // world, (n, n_steps)


def main() -> None:
    """Make the set, read it, print what the server counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--megabytes", type=float, default=27)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--key", default="npy", choices=("npy", "json", "json.gz", "txt"))
    parser.add_argument("--no-manifest", action="store_true")
    parser.add_argument("--cache-gb", type=float, default=100.0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="open_lm-remote-"))
    try:
        print(json.dumps(measure(args, folder)))
    finally:
        shutil.rmtree(folder)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Requests and bytes of one pass, beside what the goal allows."""
    (folder / "set").mkdir()
    n_samples, n_bytes = make_set(folder / "set", args.key, args.shards, args.megabytes, not args.no_manifest)
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    server = context.Process(target=serve, args=(str(folder / "set"), ports), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ports.get()}"
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    where = f"s3://bucket/{{0..{args.shards - 1}}}.tar"
    data = {"train_data": (where,)} if args.no_manifest else {"dataset_manifest": ("s3://bucket/manifest.jsonl",)}
    batch = 8 * args.readers
    shared = [context.Queue(), context.Barrier(args.readers)]
    arguments = (args.readers, data, str(folder / "cache"), args.cache_gb, batch, n_samples // batch, shared)
    started = time.monotonic()
    readers = [context.Process(target=read, args=(rank, *arguments)) for rank in range(args.readers)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    if any(reader.exitcode for reader in readers):
        raise SystemExit("a reader failed")
    import urllib.request

    counts = json.loads(urllib.request.urlopen(f"{url}/counts").read())
    server.terminate()
    requests = counts.get("shards GET", 0) + counts.get("shards HEAD", 0)
    return {
        "set": f"{args.shards} shards of {n_bytes / args.shards / 1e6:.1f} MB, {args.key}",
        "readers": args.readers,
        "needed_bytes": n_bytes,
        "read_bytes": counts["shards bytes"],
        "read_per_needed": round(counts["shards bytes"] / n_bytes, 4),
        "requests": requests,
        "heads": counts.get("shards HEAD", 0),
        "allowed_requests": n_bytes // (4 << 20) + 2 * args.shards,
        "wall_s": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    main()
