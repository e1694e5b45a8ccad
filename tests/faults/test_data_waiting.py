"""Stalls: a store that sends nothing, a data worker that never answers."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from open_lm.data import pipeline
from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.errors import DataError, StorageError
from open_lm.storage import remote

pytest.importorskip("aiohttp", reason="http:// needs aiohttp")


@pytest.fixture
def stalling(monkeypatch):
    """A server that answers HEAD, and stalls in as many GETs as `plan` says: before the first byte, or after some."""
    plan, stop = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()

        def do_GET(self):
            kind = plan.pop(0) if plan else None
            if kind == "nothing":
                stop.wait(20)
                return
            self.send_response(206)
            self.send_header("Content-Length", "1000")
            self.send_header("Content-Range", "bytes 0-999/1000")
            self.end_headers()
            for k in range(100):
                self.wfile.write(b"0123456789")
                if kind == "drops" and stop.wait(0.2 if k else 0):
                    return

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(remote, "FIRST_BYTE_SECONDS", 0.4)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    yield f"http://127.0.0.1:{server.server_port}/x", plan
    stop.set()
    server.shutdown()


@pytest.mark.parametrize("kind", ["nothing", "drops"])
def test_a_request_that_stalls_or_drips_is_given_up_and_made_again(stalling, kind):
    url, plan = stalling
    plan += [kind, kind]
    started = time.monotonic()
    assert remote.read_range(url, 0, 1000) == b"0123456789" * 100
    assert time.monotonic() - started < 10


def test_a_store_that_always_stalls_is_an_error_that_says_so(stalling, monkeypatch):
    url, plan = stalling
    monkeypatch.setattr(remote, "TRIES", 2)
    plan += ["nothing"] * 2
    with pytest.raises(StorageError, match=r"no 1000 bytes in 0 s \(tried 2 times\)"):
        remote.read_range(url, 0, 1000)


def test_a_data_worker_that_hangs_is_an_error_after_its_time(monkeypatch):
    monkeypatch.setattr(pipeline, "_HUNG_SECONDS", 3)
    config = DataConfig(dataset_type="synthetic", workers=1)
    loader = build_loader(config, vocab_size=9, seq_len=4, global_batch=2, rank=0, world_size=1, seed=0)
    loader._fill = hanging(loader._fill)
    with pytest.raises(DataError, match=r"--workers: a data worker failed at step 0 .*timed out"):
        next(loader.batches(0, 2))


class hanging:  # called as a function is
    """A reader that never returns."""

    reads_remote = False

    def __init__(self, real):
        self.expected_checksum, self.sample_tokens = real.expected_checksum, real.sample_tokens

    def __call__(self, positions):
        time.sleep(60)
