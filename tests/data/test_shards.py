"""Shards: what is written is read, by us, by tarfile and by webdataset; damage is named, never silent."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from open_lm.data.config import SAMPLE_FORMATS
from open_lm.data.shards import ShardIndex, check_ids, layout_of, read_index, read_samples, write_shard
from open_lm.errors import DataError

KEYS = list(SAMPLE_FORMATS)


def ids(n=6, length=33, vocab=50432, seed=0):
    dtype = "<u2" if vocab <= 65536 else "<u4"
    return np.random.default_rng(seed).integers(0, vocab, (n, length)).astype(dtype)


def shard_at(path, samples, key="npy", **kwargs):
    with open(path, "wb") as file:
        write_shard(file, samples, key, **kwargs)
    return str(path)


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("key", KEYS)
def test_what_the_writer_says_of_a_shard_is_what_it_wrote(key, n):
    file = io.BytesIO()
    written = write_shard(file, ids(n=n), key)
    content = file.getvalue()
    assert (written.size_bytes, written.crc32) == (len(content), zlib.crc32(content))
    assert written.layout == (layout_of(read_index(content, "a", key)) if n and key == "npy" else None)


def whole_index(path):
    return read_index(Path(path).read_bytes(), path)


def tar_with(path, members):
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return str(path)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("vocab", [50432, 70_000])
def test_ids_read_equal_ids_written(tmp_path, key, vocab):
    samples = ids(vocab=vocab)
    found = list(read_samples(shard_at(tmp_path / "a.tar", samples, key, first_number=7)))
    assert [name for name, _ in found] == [f"{7 + k:012d}.{key}" for k in range(6)]
    assert np.array_equal(np.stack([tokens for _, tokens in found]), samples)


@pytest.mark.parametrize("key", KEYS)
def test_pythons_tarfile_reads_our_shards(tmp_path, key):
    path = shard_at(tmp_path / "a.tar", ids(), key)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{k:012d}.{key}" for k in range(6)]
        assert all(m.isreg() and m.mtime == 0 and m.uid == 0 and m.mode == 0o644 for m in members)
        if key == "npy":
            first = np.load(io.BytesIO(tar.extractfile(members[0]).read()))
            assert np.array_equal(first, ids()[0])


def test_webdataset_reads_our_shards_with_its_own_decoders(tmp_path):
    path = shard_at(tmp_path / "a.tar", ids())
    dataset = wds.WebDataset(path, shardshuffle=False, empty_check=False).decode()
    assert np.array_equal(np.stack([sample["npy"] for sample in dataset]), ids())


@pytest.mark.parametrize("key", KEYS)
def test_equal_samples_give_equal_bytes_at_once_or_one_by_one(tmp_path, key):
    at_once, one_by_one = io.BytesIO(), io.BytesIO()
    write_shard(at_once, ids(), key)
    write_shard(one_by_one, iter(ids()), key)
    assert at_once.getvalue() == one_by_one.getvalue()


@needs_shared
@pytest.mark.parametrize(
    ("urls", "name", "n"),
    [(["shard-0000000.tar"], "txt", 24), (["jsongz/00000001.tar", "jsongz/00000002.tar"], "jsongz", 33)],
)
def test_shards_written_by_openlm_read_to_the_expected_sums(urls, name, n):
    """The sums count the Ray tool's padding, -1, as the last id of 50432."""
    folder = SHARED / "fixtures" / "openlm_shards"
    expected = json.loads((folder / "expected.json").read_text())
    found = [tokens for url in urls for _, tokens in read_samples(str(folder / url), vocab_size=50432)]
    assert len(found) == expected[f"sequences_{name}"] == n
    assert sum(int(tokens.sum()) for tokens in found) == expected[f"sum_of_ids_{name}"]
    assert {len(tokens) for tokens in found} == {2049}


def test_the_quoted_end_of_text_of_old_shards_is_id_0(tmp_path):
    path = tar_with(tmp_path / "a.tar", {"0.txt": b"[5, '<|endoftext|>', 7]"})
    assert [tokens.tolist() for _, tokens in read_samples(path)] == [[5, 0, 7]]


def test_negative_ids_count_from_the_end_of_the_vocabulary(tmp_path):
    path = tar_with(tmp_path / "a.tar", {"0.json": b"[-1, 0, -10]"})
    assert [tokens.tolist() for _, tokens in read_samples(path, vocab_size=10)] == [[9, 0, 0]]


@pytest.mark.parametrize(
    "text", ["[1, 2.0]", "[1, 'a']", "[1, true]", '[1, "3"]', "{}", "[1", "[1, null]", "[[1]]", "3"]
)
@pytest.mark.parametrize("key", ["txt", "json"])
def test_anything_but_an_integer_is_an_error_that_names_shard_and_member(tmp_path, text, key):
    path = tar_with(tmp_path / "a.tar", {f"00.{key}": text.encode()})
    with pytest.raises(DataError, match=rf"a\.tar, member 00\.{key}"):
        list(read_samples(path))


@pytest.mark.parametrize("bad", [10, 2**40, -11])
def test_an_id_outside_the_vocabulary_is_an_error_that_names_it(tmp_path, bad):
    path = tar_with(tmp_path / "a.tar", {"00.json": json.dumps([1, bad]).encode()})
    with pytest.raises(DataError, match=rf"00\.json.*{bad}"):
        list(read_samples(path, vocab_size=10))


@given(st.lists(st.integers(-10, 9), min_size=1))
def test_ids_inside_the_vocabulary_pass_as_python_would_index_it(tokens):
    assert check_ids(np.array(tokens), 10).tolist() == [range(10)[t] for t in tokens]


@pytest.mark.parametrize("payload", [b"", b"\x1f\x8b", b"garbage", None])
def test_damaged_gzip_is_named(tmp_path, payload):
    whole = SAMPLE_FORMATS.load("json.gz").encode(ids()[0])
    path = tar_with(tmp_path / "a.tar", {"0.json.gz": whole[:-3] if payload is None else payload})
    with pytest.raises(DataError, match=r"a\.tar, member 0\.json\.gz"):
        list(read_samples(path))


@pytest.mark.parametrize(
    "array", [np.ones(3), np.ones((2, 2), int), np.array(["a"]), np.array([None]), np.array([True, False])]
)
def test_an_npy_member_that_is_no_vector_of_integers_is_refused_and_nothing_is_unpickled(tmp_path, array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    with pytest.raises(DataError, match=r"0\.npy"):
        list(read_samples(tar_with(tmp_path / "a.tar", {"0.npy": buffer.getvalue()})))


def test_other_members_are_left_alone(tmp_path):
    path = tar_with(
        tmp_path / "a.tar", {"d/0.json": b"[1]", "d/0.url.txt": b"http://x", "d/1.json": b"[2]", "readme": b"x"}
    )
    assert [tokens.tolist() for _, tokens in read_samples(path)] == [[1], [2]]


def test_two_kinds_of_samples_need_a_choice(tmp_path):
    path = tar_with(tmp_path / "a.tar", {"0.json": b"[1]", "0.txt": b"[2]"})
    with pytest.raises(DataError, match="--data-key"):
        list(read_samples(path))
    assert [tokens.tolist() for _, tokens in read_samples(path, key="txt")] == [[2]]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links_of_other_tools_are_understood(tmp_path, form):
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name in ("x" * 180 + ".json", "dir/" * 60 + "b.json", "é" * 70 + ".json"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"[1]"))
        link = tarfile.TarInfo("link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert len(list(read_samples(str(tmp_path / "a.tar")))) == 3


def test_an_index_of_equal_samples_is_three_numbers(tmp_path):
    path = shard_at(tmp_path / "a.tar", ids())
    index = whole_index(path)
    again = ShardIndex.regular("npy", layout_of(index), 6)
    assert [again.span(k) for k in range(6)] == [index.span(k) for k in range(6)]
    ragged = shard_at(tmp_path / "b.tar", ids(), "json")
    assert layout_of(whole_index(ragged)) is None


@pytest.mark.parametrize("key", ["npy", "json.gz"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_cut_tar_is_always_noticed(tmp_path_factory, key, data):
    whole = io.BytesIO()
    write_shard(whole, ids(n=3, length=9), key)
    cut = data.draw(st.integers(0, len(whole.getvalue()) - 1))
    with pytest.raises(DataError, match=r"shard here\.tar"):
        read_index(whole.getvalue()[:cut], "here.tar")


@pytest.mark.parametrize("damage", ["zeroed header", "garbage header", "flipped size"])
def test_a_damaged_header_is_noticed(damage):
    whole = io.BytesIO()
    write_shard(whole, ids(n=3, length=9), "npy")
    content = bytearray(whole.getvalue())
    start = len(content) // 3 // 512 * 512
    start = read_index(bytes(content), "s").offsets[1] - 512
    if damage == "zeroed header":
        content[start : start + 512] = bytes(512)
    elif damage == "garbage header":
        content[start : start + 512] = b"x" * 512
    else:
        content[start + 130] ^= 1
    with pytest.raises(DataError, match=r"shard here\.tar.*byte"):
        read_index(bytes(content), "here.tar")
