"""Tars of raw data: every document comes out, or an error names file and byte; cut anywhere, never a silent loss."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.errors import ConfigError, DataError
from open_lm.preprocess.input import document_of, read_documents
from open_lm.preprocess.jsonl import Rejected


def tar_of(members, form=tarfile.GNU_FORMAT):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return held.getvalue()


def npy(ids):
    held = io.BytesIO()
    np.save(held, np.array(ids))
    return held.getvalue()


MEMBERS = [
    ("a/1.txt", "über\n".encode()), ("a/1.json", b'{"t": "one", "n": 5}'), ("a/1.npy", npy([1, 2, 3])),
    ("x" * 150 + ".txt", b"long name"), ("2.json", b'{"t": "two"}'), ("2.npy", npy([-1, 0])), ("2.bin", b"\0" * 700),
]  # fmt: skip


def documents(path, key):
    lines = read_documents(str(path), key, max_bytes=10_000)
    return [document_of(str(path), line, key) for line in lines]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_the_wanted_kind_are_the_documents(tmp_path, form):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(MEMBERS, form))
    assert documents(path, "txt") == ["über\n", "long name"]
    assert documents(path, "json:t") == ["one", "two"]
    assert [ids.tolist() for ids in documents(path, "npy")] == [[1, 2, 3], [-1, 0]]
    assert documents(path, "json:n") == [Rejected("not_text"), Rejected("missing_key")]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_a_tar_cut_anywhere_is_an_error_that_names_it(tmp_path_factory, cut):
    content = tar_of(MEMBERS)
    data_end = len(content.rstrip(b"\0")) // 512 * 512 + 512  # the zeros after are padding and end mark
    path = tmp_path_factory.mktemp("cut") / "a.tar"
    path.write_bytes(content[: cut % data_end])
    with pytest.raises(DataError, match=r"a\.tar: cut off or damaged at byte \d+"):
        documents(path, "npy")


def test_a_hole_of_zeros_or_garbage_is_an_error(tmp_path):
    content = bytearray(tar_of(MEMBERS))
    start = content.index(b"2.json")
    for damage in (b"garbage", bytes(512)):
        hurt = content.copy()
        hurt[start : start + len(damage)] = damage
        (tmp_path / "a.tar").write_bytes(hurt)
        with pytest.raises(DataError, match=rf"a\.tar: .* at byte {start}"):
            documents(tmp_path / "a.tar", "txt")


def test_keys_that_no_tar_has_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(MEMBERS[:1]))
    for key in ("text", "json", "txt:x"):
        with pytest.raises(ConfigError, match=f"{key}: for .tar inputs give"):
            documents(tmp_path / "a.tar", key)
    with pytest.raises(DataError, match=r"no member \*\.npy"):
        documents(tmp_path / "a.tar", "npy")
