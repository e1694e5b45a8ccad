"""Reading damaged data: what is trained on is right, masked and counted, or the run stops with the shard's name."""

import gzip
import pickle
import resource
import tarfile
import zlib
from io import BytesIO

import numpy as np
import pytest

from open_lm.data.batch import IGNORED
from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
from open_lm.data.manifest import write_manifest
from open_lm.data.shards import write_shard
from open_lm.data.sources import open_sources
from open_lm.errors import CheckpointError, DataError, StorageError
from open_lm.utils import make_wds_manifest

N, SEQ_LEN, VOCAB = 20, 4, 60_000


def sample(number):
    """A sample that names itself: its first id is its number, the second follows from it."""
    return [number, number % 991, 7, 7, 7]


@pytest.fixture
def folder(tmp_path):
    """`folder(key, manifest)`: three shards of 20 samples; a full manifest, one of counts alone, or none."""

    def make(key="npy", manifest="full"):
        target = tmp_path / "set"
        target.mkdir()
        for k in range(3):
            with open(target / f"{k}.tar", "wb") as file:
                write_shard(file, np.array([sample(N * k + i) for i in range(N)], "<u2"), key, first_number=N * k)
        if manifest == "full":
            make_wds_manifest.main(["--data-dir", str(target)])
        if manifest == "counts":
            write_manifest(str(target / "manifest.jsonl"), [{"shard": str(k), "num_sequences": N} for k in range(3)])
        return target

    return make


def open_loader(folder, **flags):
    where = {"dataset_manifest": (f"{folder}/manifest.jsonl",)}
    if not (folder / "manifest.jsonl").exists():
        where = {"train_data": (f"{folder}/*.tar",)}
    config = DataConfig(**where, workers=0, **flags)
    shape = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "global_batch": 1}
    return build_loader(config, **shape, rank=0, world_size=1, seed=3)


def attempt(folder):
    """As `read_all`; or the error that stopped it, as text."""
    try:
        return read_all(folder)
    except (DataError, StorageError) as error:
        return str(error)


def read_all(folder, **flags):
    """Numbers of the samples of one pass that were trained on, and how many were masked; each must be right."""
    loader = open_loader(folder, ignore_parse_errors=True, **flags)
    trained, n_masked = [], 0
    for batch in loader.batches(0, loader.n_sequences):
        if bool((batch.targets_BT == IGNORED).all()):
            n_masked += 1
            continue
        ids = [*batch.inputs_BT[0].tolist(), int(batch.targets_BT[0, -1])]
        assert ids == sample(ids[0]), "a wrong sample was trained on"
        trained.append(ids[0])
    assert n_masked == len(loader.unreadable)
    assert len(trained) + n_masked == loader.n_sequences, "a short epoch"
    assert len(set(trained)) == len(trained), "a sample came twice"
    return trained, n_masked


def member(content, number):
    """The offsets of a member's header and content."""
    with tarfile.open(fileobj=BytesIO(bytes(content))) as tar:
        found = tar.getmembers()[number]
    return found.offset, found.offset_data


def _cut_at(place):
    def cut(content):
        header, data = member(content, 5)
        del content[{"boundary": header, "header": header + 100, "data": data + 3}[place] :]

    return cut


def _hole(content):
    header, data = member(content, 5)
    content[header : data + 512] = bytes(data + 512 - header)


def _garbage(content):
    header, _ = member(content, 5)
    content[header : header + 512] = np.random.default_rng(0).bytes(512)


def _flip(place):
    def flip(content):
        header, data = member(content, 5)
        content[(header + 3) if place == "header" else data + 3] ^= 1

    return flip


def _no_end(content):
    del content[-1024:]


DAMAGES = {
    "cut at a boundary": _cut_at("boundary"), "cut in a header": _cut_at("header"), "cut in data": _cut_at("data"),
    "hole": _hole, "garbage for a header": _garbage, "bit of a header": _flip("header"), "bit of data": _flip("data"),
    "no end mark": _no_end,
}  # fmt: skip


@pytest.mark.parametrize("manifest", ["full", "counts", "none"])
@pytest.mark.parametrize("key", ["npy", "json", "json.gz", "txt"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_never_gives_a_wrong_sample_or_a_short_epoch(folder, damage, key, manifest):
    where = folder(key, manifest)
    content = bytearray((where / "1.tar").read_bytes())
    DAMAGES[damage](content)
    (where / "1.tar").write_bytes(content)
    found = attempt(where)
    if isinstance(found, str):
        assert "1.tar" in found
        return
    trained, n_masked = found
    untouched = set(range(N)) | set(range(2 * N, 3 * N))
    assert untouched <= set(trained)
    assert n_masked or set(trained) == set(range(3 * N)), "samples are missing and nothing was counted"
    if n_masked:
        with pytest.raises(DataError, match=r"1\.tar"):
            list(open_loader(where).batches(0, 3 * N))


@pytest.mark.parametrize("count", [N - 1, N + 1])
@pytest.mark.parametrize("key", ["npy", "json"])
def test_a_manifest_that_miscounts_is_noticed(folder, key, count):
    where = folder(key, "none")
    write_manifest(
        str(where / "manifest.jsonl"), [{"shard": str(k), "num_sequences": count if k == 1 else N} for k in range(3)]
    )
    with pytest.raises(DataError, match=rf"manifest counts {count} samples, the shard holds {N}"):
        list(open_loader(where).batches(0, 2 * N + count))
    trained, n_masked = read_all(where)
    assert n_masked == count and set(trained) == set(range(N)) | set(range(2 * N, 3 * N))


@pytest.mark.parametrize("manifest", ["full", "counts", "none"])
@pytest.mark.parametrize("harm", ["missing", "empty file", "empty tar"])
def test_a_shard_that_is_missing_or_empty_is_named_before_training(folder, harm, manifest):
    where = folder("npy", manifest)
    (where / "1.tar").write_bytes(b"" if harm == "empty file" else bytes(10_240))
    if harm == "missing":
        (where / "1.tar").unlink()
        if manifest == "none":
            assert read_all(where)[1] == 0  # a glob finds what there is
            return
    found = attempt(where)
    if isinstance(found, str):
        assert "1.tar" in found
    else:
        assert found[1] == N and manifest == "counts"


class Boom:
    def __reduce__(self):
        return (open, ("canary", "w"))


def _npy(array):
    out = BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


CRAFTED = {
    "short": ("json", b"[1, 2]"), "float": ("json", b"[1.0, 2, 3, 4, 5]"), "text": ("json", b'["1", 2, 3, 4, 5]'),
    "true": ("json", b"[true, 2, 3, 4, 5]"), "beyond the vocabulary": ("json", b"[60000, 2, 3, 4, 5]"),
    "beyond 64 bits": ("json", b"[18446744073709551616, 2, 3, 4, 5]"), "nested": ("json", b"[[1, 2, 3, 4, 5]]"),
    "not JSON": ("json", b"\xff\xfe"), "a call": ("txt", b"__import__('pathlib').Path('canary').touch()"),
    "bomb": ("json.gz", gzip.compress(b"[" + b" " * (512 << 20) + b"1]", 9)),
    "cut gzip": ("json.gz", gzip.compress(b"[1, 2, 3, 4, 5]")[:-4]),
    "raw deflate": ("json.gz", zlib.compress(b"[1, 2, 3, 4, 5]")),
    "pickle": ("npy", pickle.dumps(Boom())), "objects": ("npy", _npy(np.array([Boom()], object))),
    "floats": ("npy", _npy(np.arange(5.0))), "a table": ("npy", _npy(np.arange(10).reshape(5, 2))),
    "a header that lies": ("npy", _npy(np.arange(5, dtype="<u2")).replace(b"(5,)", b"(9,)")),
}  # fmt: skip


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_sample_is_rejected_with_its_reason_and_runs_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    key, payload = CRAFTED[kind]
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as tar:
        for number, content in enumerate([payload, None]):
            good = BytesIO()
            write_shard(good, np.array([sample(number)], "<u2"), key)
            if content is None:
                content = good.getvalue()[512 : 512 + int(good.getvalue()[124:135], 8)]
            info = tarfile.TarInfo(f"{number:012d}.{key}")
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trained, n_masked = read_all(tmp_path / "set")
    assert (trained, n_masked) == ([1], 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10
    with pytest.raises(DataError, match=r"0\.tar, sample 0: .+"):
        list(open_loader(tmp_path / "set").batches(0, 2))
    assert not (tmp_path / "canary").exists()


CHANGES = {
    "order": lambda rows: rows[::-1],
    "a row removed": lambda rows: rows[:2],
    "a count": lambda rows: [rows[0] | {"num_sequences": N - 1}, *rows[1:]],
    "a name": lambda rows: [rows[0] | {"shard": "moved/0"}, *rows[1:]],
    "the content": lambda rows: [rows[0] | {"crc32": "00000000"}, *rows[1:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_changed_before_a_resume_is_refused_unless_only_its_order_is_another(folder, change):
    import orjson

    where = folder()
    state = open_loader(where).state(5)
    rows = [orjson.loads(line) for line in (where / "manifest.jsonl").read_bytes().splitlines()]
    (where / "moved").mkdir()
    (where / "moved" / "0.tar").write_bytes((where / "0.tar").read_bytes())
    lines = [orjson.dumps(row) for row in CHANGES[change](rows)]
    (where / "manifest.jsonl").write_bytes(b"\n".join(lines))
    loader = open_loader(where)
    if change == "order":
        loader.check_state(state)
        return
    with pytest.raises(CheckpointError, match="the checkpoint's data differs"):
        loader.check_state(state)


HOSTILE = [
    "../outside", "a/../../outside", "/etc/passwd", "..", "s3://elsewhere/x", "http://127.0.0.1:9/x", "file:///etc/passwd",
    "pipe:touch canary", "a\0b", "a\nb", "", "\\\\server\\share", "..\\outside", "C:\\x", "a/./../..", "\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_manifest_stay_inside_its_folder(folder, tmp_path, name):
    import orjson

    where = folder()
    (tmp_path / "outside.tar").write_bytes((where / "0.tar").read_bytes())
    (where / "manifest.jsonl").write_bytes(orjson.dumps({"shard": name, "num_sequences": N}))
    with pytest.raises((DataError, StorageError), match=r"line 1|no such|cannot"):
        open_loader(where)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("url", ["pipe:cat x", "", "a::", "::"])
def test_urls_that_would_run_or_name_nothing_are_refused(url):
    from open_lm.errors import ConfigError

    with pytest.raises((ConfigError, StorageError)):
        open_sources(DataConfig(train_data=(url,), workers=0))
