import http.server
import json
import threading

import pytest
from icl_setup import ROOT

from open_lm.commands import download_tasks as download
from open_lm.errors import ConfigError, DataError, StorageError

ROWS = b"".join(json.dumps({"context": f"c{i}", "continuation": "d"}).encode() + b"\n" for i in range(200))


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, files):
        self.files, self.ranges, self.cut = files, [], None
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            return self.send_error(404, "Not Found")
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.cut])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server({"a/b.jsonl": ROWS, "page.jsonl": b"<html>", "commonsense_reasoning/copa.jsonl": ROWS}) as serving:
        yield serving
        serving.shutdown()


def fetched(server, folder, *names):
    return download.main(["--names", *names, "--source", server.url, "--output-dir", str(folder)])


def test_a_file_is_fetched_whole_and_not_fetched_again(server, tmp_path, capsys):
    fetched(server, tmp_path, "a/b.jsonl")
    fetched(server, tmp_path, "a/b.jsonl")
    assert (tmp_path / "a" / "b.jsonl").read_bytes() == ROWS
    assert len(server.ranges) == 1
    assert "already there" in capsys.readouterr().out


def test_a_cut_download_goes_on_from_where_it_ended(server, tmp_path):
    server.cut = 1000
    with pytest.raises(StorageError, match=r"connection ended after 1000 of|cannot be reached"):
        fetched(server, tmp_path, "a/b.jsonl")
    assert not (tmp_path / "a" / "b.jsonl").exists()
    server.cut = None
    fetched(server, tmp_path, "a/b.jsonl")
    assert server.ranges[-1] == "bytes=1000-"
    assert (tmp_path / "a" / "b.jsonl").read_bytes() == ROWS


def test_a_file_that_differs_from_the_known_one_is_refused(server, tmp_path):
    with pytest.raises(DataError, match=r"copa.jsonl.*expected 14627 bytes"):
        fetched(server, tmp_path, "commonsense_reasoning/copa.jsonl")
    assert list(tmp_path.rglob("copa*")) == []


def test_a_file_that_changed_since_it_came_is_noticed(server, tmp_path):
    fetched(server, tmp_path, "a/b.jsonl")
    (tmp_path / "a" / "b.jsonl").write_bytes(ROWS[:-5])
    with pytest.raises(DataError, match="Delete it and fetch it again"):
        fetched(server, tmp_path, "a/b.jsonl")


def test_a_web_page_instead_of_data_is_refused(server, tmp_path):
    with pytest.raises(DataError, match="no task file"):
        fetched(server, tmp_path, "page.jsonl")


def test_an_unknown_name_is_an_error(server, tmp_path):
    with pytest.raises(StorageError, match="404"):
        fetched(server, tmp_path, "a/c.jsonl")


def test_without_a_network_it_says_what_to_do(tmp_path):
    with pytest.raises(StorageError, match="put the file at"):
        download.main(["--names", "a.jsonl", "--source", "http://127.0.0.1:9", "--output-dir", str(tmp_path)])


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.jsonl"])
def test_names_stay_inside_the_folder(name, tmp_path):
    with pytest.raises(ConfigError, match="inside local_data"):
        download.main(["--names", name, "--output-dir", str(tmp_path)])


@pytest.mark.parametrize(("yaml", "n_files"), [("openlm_tasks", 11), ("light", 6), ("dclm_core", 21)])
def test_the_yamls_of_the_project_name_their_files(yaml, n_files):
    names = download._needed(str(ROOT / "eval" / "yamls" / f"{yaml}.yaml"))
    assert len(set(names)) == n_files


def test_the_yaml_under_openlms_old_name_needs_no_download():
    assert download._needed(str(ROOT / "eval" / "in_memory_hf_eval.yaml")) == []
