"""Storage without a cloud: local files all-or-nothing, plain web servers, packages that are not installed."""

import functools
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from open_lm import storage
from open_lm.errors import StorageError
from open_lm.storage import remote


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    storage.write_text(str(path), "old")
    writer = storage.open_atomic(str(path))
    writer.__enter__().write(b"new, but")
    assert not writer.__exit__(RuntimeError, RuntimeError("the writer fails"), None)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*a\.txt: No space left on device"):
        storage.write_text(str(tmp_path / "a.txt"), "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("read", [storage.read_bytes, storage.size_bytes, lambda url: storage.read_range(url, 0, 5)])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(StorageError, match=r"nowhere\.bin"):
        read(str(tmp_path / "nowhere.bin"))


def test_a_folder_that_cannot_be_written_is_said_with_its_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"--logs .*Choose another"):
        storage.require_writable(str(tmp_path / "file" / "sub"), "--logs")


def test_a_scheme_without_its_package_names_the_pip_line(monkeypatch):
    import fsspec

    def missing(*_, **__):
        raise ImportError("no s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(StorageError, match="pip install s3fs"):
        storage.read_bytes("s3://bucket/x")


def test_a_url_is_shown_without_user_and_query():
    assert storage.shown("https://me:secret@host/x?key=secret") == "https://host/x"


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_plain_web_server_without_ranges_is_read_to_the_end(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp")
    monkeypatch.setattr(remote, "RANGE_BYTES", 1000)
    content = os.urandom(5500)
    (tmp_path / "a.bin").write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert storage.read_bytes(f"{url}/a.bin") == content
    assert storage.size_bytes(f"{url}/a.bin") == len(content)
    with pytest.raises(StorageError, match="no such file"):
        storage.read_bytes(f"{url}/b.bin")
    server.shutdown()
