"""Foreign bytes: whatever a tar, a manifest, an array or a JSON line holds, the answer is data or a DataError, soon."""

import io
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.config import SAMPLE_FORMATS, DataConfig
from open_lm.data.loader import build_loader
from open_lm.data.manifest import read_manifest
from open_lm.data.shards import decode_member, read_index, write_shard
from open_lm.data.sources import open_source
from open_lm.errors import DataError


def shard(key="npy", n=5):
    tar = io.BytesIO()
    write_shard(tar, np.arange(n * 5, dtype="<u2").reshape(n, 5), key)
    return tar.getvalue()


@pytest.mark.parametrize("size", [b"-0000001000\0", b"0x000000010\0", b"+0000000010\0", b"1_000000010\0", b"\xff" * 12])
def test_a_size_that_is_no_count_ends_at_once(size):
    content = bytearray(shard())
    content[124:136] = size
    tracemalloc.start()
    with pytest.raises(DataError, match=r"evil\.tar"):
        read_index(bytes(content), "evil.tar")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", ["-512", "1e3", "9" * 40, "", "0x10"])
def test_a_pax_size_that_is_no_count_is_damage(size):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo("000000000000.npy")
        member.pax_headers = {"size": size, "comment": "x"}
        file.addfile(member, io.BytesIO(b""))
    with pytest.raises(DataError):
        read_index(tar.getvalue(), "evil.tar")


@given(st.binary(max_size=3000), st.integers(0, 5000), st.sampled_from(sorted(SAMPLE_FORMATS)))
@settings(max_examples=150, deadline=None)
def test_any_bytes_in_a_tar_give_an_index_or_a_data_error(noise, place, key):
    content = bytearray(shard(key))
    place = min(place, len(content))
    content[place : place + len(noise)] = noise
    try:
        index = read_index(bytes(content), "x.tar")
    except DataError:
        return
    assert all(offset + size <= len(content) for offset, size in map(index.span, range(len(index))))


@given(st.binary(max_size=300), st.sampled_from(sorted(SAMPLE_FORMATS)))
@settings(max_examples=200, deadline=None)
def test_any_payload_gives_ids_or_a_value_error(payload, key):
    try:
        tokens = decode_member(payload, key)
    except ValueError:
        return
    assert tokens.ndim == 1


@given(
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers(), st.lists, max_leaves=4)
)
@settings(max_examples=25, deadline=None)
def test_any_value_in_a_manifest_gives_shards_or_a_data_error(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("m") / "manifest.jsonl"
    rows = [{"shard": "a", "num_sequences": 1}, {"shard": "b", "num_sequences": 1}]
    for field in ("shard", "num_sequences", "layout", "bytes", "first_key", "last_key", "crc32", "eot_id"):
        row = rows[1] | {field: value}
        path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(row))
        try:
            found = read_manifest(str(path))
        except DataError:
            continue
        assert len(found) == 2


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("key", ["json", "npy"])
def test_names_longer_than_a_header_are_read_as_any_other(tmp_path, form, key):
    from open_lm.data.shards import sample_format

    with tarfile.open(tmp_path / "long.tar", "w", format=form) as tar:
        for k in range(8):
            content = sample_format(key).encode(np.array([k, 1, 2, 3, 4], "<u2"))
            member = tarfile.TarInfo("x" * 120 + f"{k}.{key}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    config = DataConfig(train_data=(str(tmp_path / "long.tar"),), workers=0)
    loader = build_loader(config, vocab_size=100, seq_len=4, global_batch=4, rank=0, world_size=1, seed=0)
    assert sorted(n for batch in loader.batches(0, 2) for n in batch.inputs_BT[:, 0].tolist()) == list(range(8))


def test_a_shard_named_twice_is_found_among_a_thousand(tmp_path):
    for k in range(600):
        (tmp_path / f"{k:04d}.tar").write_bytes(shard(n=1))
    with pytest.raises(DataError, match="twice"):
        open_source(f"{tmp_path}/*.tar::{tmp_path}/*.tar")
    (tmp_path / "manifest.jsonl").write_text('{"shard":"a","num_sequences":5}\n{"shard":"a.tar","num_sequences":5}\n')
    with pytest.raises(DataError, match=r"duplicate shard a\.tar"):
        read_manifest(f"{tmp_path}/manifest.jsonl")


def test_webdataset_reads_our_shards_and_we_read_its(tmp_path):
    import webdataset as wds

    samples = np.random.default_rng(0).integers(0, 50_000, (20, 9)).astype("<u2")
    with open(tmp_path / "ours.tar", "wb") as file:
        write_shard(file, samples, "json")
    theirs = [json.loads(row["json"]) for row in wds.WebDataset(str(tmp_path / "ours.tar"), shardshuffle=False)]
    assert theirs == samples.tolist()
    with wds.ShardWriter(str(tmp_path / "%04d.tar"), maxcount=10, verbose=0) as writer:
        for k, row in enumerate(samples):
            writer.write({"__key__": f"{k:06d}", "json": row.tolist()})
    config = DataConfig(train_data=(f"{tmp_path}/000*.tar",), workers=0)
    loader = build_loader(config, vocab_size=50_000, seq_len=8, global_batch=4, rank=0, world_size=1, seed=0)
    found = sorted(row for batch in loader.batches(0, 5) for row in batch.inputs_BT.tolist())
    assert found == sorted(samples[:, :-1].tolist())


def test_a_line_of_any_length_takes_no_memory_to_skip(tmp_path):
    from open_lm.preprocess.jsonl import read_lines

    with open(tmp_path / "huge.jsonl", "wb") as file:
        file.truncate(200 << 20)
    tracemalloc.start()
    assert list(read_lines(str(tmp_path / "huge.jsonl"), start=8 << 20, stop=16 << 20, max_line_bytes=1 << 20)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_text_without_spaces_is_cut_after_punctuation_with_the_ids_of_the_whole():
    import tokenizers

    from open_lm.data.tokenizer import Tokenizer
    from open_lm.preprocess.encoding import ReferenceEncoder, cut_safely

    text = "日本語の文章です。空白はありません、" * 200
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.train_from_iterator([text[:500]], trainer)
    tokenizer = Tokenizer(trained, "t")
    pieces = cut_safely(ReferenceEncoder(tokenizer), text, 500)
    assert len(pieces) > 5 and "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_reading_a_remote_file_whole_takes_few_requests(monkeypatch):
    import fsspec

    from open_lm import storage
    from open_lm.storage import remote

    memory, calls = fsspec.filesystem("memory"), []
    memory.pipe("/few/a.bin", bytes(20 << 20))
    real = type(memory).cat_file
    monkeypatch.setattr(type(memory), "cat_file", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert len(storage.read_bytes("memory://few/a.bin")) == 20 << 20
    assert len(calls) == -(-(20 << 20) // remote.RANGE_BYTES)
    memory.rm("/few", recursive=True)


def test_training_from_a_web_server_without_ranges_reads_the_right_samples(tmp_path):
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    pytest.importorskip("aiohttp", reason="http:// needs aiohttp")

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    samples = np.full((300, 500), 7, "<u2")
    samples[:, 0] = np.arange(300)
    with open(tmp_path / "0.tar", "wb") as file:
        write_shard(file, samples, "npy")
    (tmp_path / "manifest.jsonl").write_text('{"shard":"0","num_sequences":300}')
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/manifest.jsonl"
    loader = build_loader(
        DataConfig(dataset_manifest=(url,), workers=0, data_cache=str(tmp_path / "cache")),
        vocab_size=60_000, seq_len=499, global_batch=10, rank=0, world_size=1, seed=0,
    )  # fmt: skip
    found = [n for batch in loader.batches(0, 30) for n in batch.inputs_BT[:, 0].tolist()]
    assert sorted(found) == list(range(300))
    server.shutdown()
