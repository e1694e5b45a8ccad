"""Data sets of the Hub become .jsonl.zst, row for row, from a Hub on this machine; a second start reads the rest."""

import functools
import json
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import zstandard
from hub_server import serve

pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    with serve(root) as (hub, endpoint):
        yield hub, endpoint


def rows_of(name, n=2500):
    return [{"id": f"{name}-{k}", "title": "ü", "text": f"document {k} of {name}\n"} for k in range(n)]


def put_parquet(hub, path, rows):
    from pyarrow import parquet

    target = hub.root / "datasets" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), target, row_group_size=1000)


def put(hub, path, content):
    target = hub.root / "datasets" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content.encode() if isinstance(content, str) else content)


def call(command, endpoint, cache):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, env=env)


def read(path):
    return [
        json.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().splitlines()
    ]


def python(script, *arguments):
    return [sys.executable, ROOT / "datapreprocess" / script, *arguments]


def test_the_newest_wikipedia_of_a_language_is_fetched_and_resumed_file_by_file(hub, tmp_path):
    server, endpoint = hub
    for config in ("20220301.en", "20231101.de"):
        put_parquet(server, f"wikimedia/wikipedia/{config}/train-00000-of-00001.parquet", rows_of(config, 10))
    for k in range(2):
        name = f"wikimedia/wikipedia/20231101.en/train-0000{k}-of-00002.parquet"
        put_parquet(server, name, rows_of(f"en{k}"))
    command = python("wiki_download.py", "--output-dir", tmp_path / "out", "--num-workers", "1")
    server.cut["train-00001-of-00002.parquet"] = 3000
    done = call(command, endpoint, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    files = sorted(path for path in (tmp_path / "out").iterdir() if path.suffix == ".zst")
    assert [path.name for path in files] == [f"20231101.en--train-0000{k}-of-00002.jsonl.zst" for k in range(2)]
    assert [read(path) for path in files] == [rows_of("en0"), rows_of("en1")]
    files[0].unlink()
    before = files[1].stat().st_mtime_ns
    server.requests.clear()
    assert call(command, endpoint, tmp_path / "cache").returncode == 0
    assert read(files[0]) == rows_of("en0") and files[1].stat().st_mtime_ns == before
    assert not [path for _, path, _ in server.requests if "resolve" in path and "00001-of" in path]
    other = call([*command, "--language", "de"], endpoint, tmp_path / "cache")
    assert other.returncode == 2 and "holds" in other.stderr


def test_configs_and_splits_are_those_of_the_card(hub, tmp_path):
    server, endpoint = hub
    card = (
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: small/*.jsonl\n"
        "  - split: test\n    path: [t.jsonl]\n---\nA card.\n"
    )
    put(server, "lab/carded/README.md", card)
    put(server, "lab/carded/small/a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n')
    put(server, "lab/carded/t.jsonl", '{"text": "held out"}')
    command = python("hf_dataset.py", "--dataset", "lab/carded", "--num-workers", "1")
    for split, expected in (("train", ["one", "two"]), ("test", ["held out"])):
        done = call([*command, "--output-dir", tmp_path / split, "--split", split], endpoint, tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / split).glob("*.zst")
        assert [row["text"] for row in read(path)] == expected
    wrong = call([*command, "--output-dir", tmp_path / "x", "--config", "big"], endpoint, tmp_path / "cache")
    assert wrong.returncode == 65 and "no --config big. Available: small" in wrong.stderr


def test_what_is_neither_parquet_nor_jsonl_is_taken_from_the_hubs_conversion(hub, tmp_path):
    server, endpoint = hub
    put(server, "lab/csv/data.csv", "text\none\n")
    put_parquet(server, "lab/csv.converted/default/train/0000.parquet", [{"text": "one", "raw": b"\xff"}])
    command = python("hf_dataset.py", "--dataset", "lab/csv", "--num-workers", "1")
    done = call([*command, "--output-dir", tmp_path / "out"], endpoint, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out" / "default--train--0000.jsonl.zst") == [{"text": "one", "raw": "/w=="}]
    none = call([*command, "--output-dir", tmp_path / "x", "--split", "test"], endpoint, tmp_path / "cache")
    assert none.returncode == 65 and "nothing for --config None and --split test" in none.stderr
    missing = call(
        python("hf_dataset.py", "--dataset", "lab/nowhere", "--output-dir", tmp_path / "y"), endpoint, tmp_path
    )
    assert "no such data set" in missing.stderr and "Traceback" not in missing.stderr


def test_the_pile_is_fetched_as_it_is(hub, tmp_path):
    server, endpoint = hub
    content = zstandard.compress(b'{"text": "a", "meta": {}}\n' * 50)
    for name in ("train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst"):
        put(server, f"monology/pile-uncopyrighted/{name}", content)
    script = ["bash", ROOT / "datapreprocess" / "pile_download.sh", tmp_path / "out", "--max-files", "1"]
    done = call([*script, "--num-workers", "1"], endpoint, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "train--00.jsonl.zst").read_bytes() == content
    assert len(list((tmp_path / "out").glob("*.zst"))) == 1
    assert call(script[:2], endpoint, tmp_path / "cache").returncode == 64


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_make_2048_gives_the_same_shards_from_disk_the_web_and_the_hub(hub, raw, tmp_path, tokenizer_json, texts):
    server, endpoint = hub
    file = Path(raw("a.jsonl.gz", texts))
    put(server, "lab/texts/sub/a.jsonl.gz", file.read_bytes())
    web = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(file.parent)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    flags = ["--tokenizer", tokenizer_json, "--seqlen", "15", "--shard-size", "64", "--num-workers", "1"]
    places = {
        "disk": file, "web": f"http://127.0.0.1:{web.server_port}/a.jsonl.gz",
        "hub": "hf://datasets/lab/texts/**/*.jsonl.gz",
    }  # fmt: skip
    found = {}
    for name, place in places.items():
        command = python("make_2048.py", "--input-files", place, "--output-dir", tmp_path / name, *flags)
        done = call(command, endpoint, tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        found[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")}
    web.shutdown()
    assert len(found["disk"]) > 5 and all(shards == found["disk"] for shards in found.values())


def test_shards_go_to_any_fsspec_url(make_2048, raw, tmp_path, tokenizer_json, texts, monkeypatch):
    from open_lm import storage

    monkeypatch.chdir(tmp_path)
    args = ["--input-files", raw("a.jsonl", texts), "--tokenizer", str(tokenizer_json), "--seqlen", "15"]
    args += ["--num-workers", "1", "--shard-size", "64"]
    make_2048([*args, "--output-dir", "memory://set/one"])
    make_2048([*args, "--output-dir", str(tmp_path / "out")])
    for path in (tmp_path / "out").iterdir():
        assert storage.read_bytes(f"memory://set/one/{path.name}") == path.read_bytes()
