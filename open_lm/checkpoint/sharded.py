"""Checkpoints in which every rank writes its own part (torch.distributed.checkpoint): written, checked, read anywhere.

A save makes a folder of its own, so that no two saves ever mix in one. Only tensors go through torch's format, all else
is in `stats.pt` beside them; so nothing has to be unpickled but torch's index, and that only knows its own types.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from open_lm import faults, storage
from open_lm.checkpoint.checksum import ChecksummingFile, FileRecord
from open_lm.errors import CheckpointError, StorageError

INDEX, STATS = ".metadata", "stats.pt"
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "Path"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    """Knows the types of torch's index and nothing else, so that a file of another origin cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if is_type or name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in it")


class _Reader(dcp.FileSystemReader):
    """torch's reader with an index that was read by ours, and at `url`, if given, the files that it speaks of."""

    def __init__(self, folder: Path, url: str | None = None):
        super().__init__(folder)
        self._index = read_tensor_index(folder)
        if url is not None:
            self.fs, self.path = _RemoteFiles(), url

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """One tensor's bytes, read at once."""
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


def read_tensor_index(folder: Path) -> Metadata:
    """The index of `folder`: the file and offset of every tensor.

    Raises:
        CheckpointError: it is missing, is damaged, or holds anything but an index of tensors.
    """
    try:
        index = _IndexUnpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{folder / INDEX}: damaged or not an index ({error}). Use another checkpoint."
        ) from error
    kinds = getattr(index, "state_dict_metadata", None)
    if not isinstance(kinds, dict) or not all(isinstance(kind, TensorStorageMetadata) for kind in kinds.values()):
        raise CheckpointError(f"{folder / INDEX}: is no index of tensors alone. Use another checkpoint.")
    if any(Path(info.relative_path).name != info.relative_path for info in index.storage_data.values()):
        raise CheckpointError(f"{folder / INDEX}: names a file outside its folder. Refused.")
    return index


class _SummingFiles(FileSystem):
    """torch's files, whose checksums are taken while they are written."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[str, _SummingStream] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        faults.at("file.open", str(path))
        with super().create_stream(path, mode) as stream:
            if mode == "wb":
                stream = self._open[Path(path).name] = _SummingStream(stream)  # type: ignore[assignment]
            yield stream

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        faults.at("file.rename", str(new_path))
        super().rename(path, new_path)
        self._open[Path(new_path).name] = self._open.pop(Path(path).name)

    def records(self) -> dict[str, FileRecord]:
        """Of every file that was written."""
        return {name: stream.record() for name, stream in self._open.items()}


class _SummingStream(ChecksummingFile):
    """A file for torch's writer that computes its checksum as it is written."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _RemoteFiles(FileSystem):
    """Remote files as torch's reader asks for them: ranges of them, each tried again while its trouble may pass."""

    def concat_path(self, path: Any, suffix: str) -> Any:
        return storage.join(path, suffix)

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with storage.open_read(path) as file:
            yield file


def write(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, FileRecord]:
    """Write this rank's part of `tensors` into `folder`; the records of its files. Every rank of `group` (None: there
    is one rank) must call it.

    Raises:
        StorageError: any rank could not write; all ranks raise.
    """
    try:  # one writer thread: with several, torch loses the errors of all but one
        writer = dcp.FileSystemWriter(folder, thread_count=1, sync_files=True)
        writer.fs = files = _SummingFiles()
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        return files.records()
    except (CheckpointException, OSError, RuntimeError) as error:
        raise StorageError(f"{folder}: {_reason(error)}") from error


def require_complete(folder: Path, sizes: Mapping[str, int] | None = None) -> None:
    """Check that every part of every tensor in the index lies within a file of `folder`, or of `sizes`.

    Raises:
        StorageError: one does not.
    """
    index = read_tensor_index(folder)
    if sizes is None:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    for name, kind in index.state_dict_metadata.items():
        assert isinstance(kind, TensorStorageMetadata)
        for chunk in kind.chunks:
            info = index.storage_data.get(MetadataIndex(name, chunk.offsets))
            if info is None or sizes.get(info.relative_path, -1) < info.offset + info.length:
                raise StorageError(f"{folder}: a part of {name} was not written.")


def load_into(folder: Path, tensors: dict[str, Tensor], *, alone: bool = True, url: str | None = None) -> None:
    """Fill `tensors` in place from `folder`, however they were spread when saved and are now.

    With `alone` False every rank must call it, each with its shards of the same tensors. With `url` only the index is
    in `folder`; of the files there each rank reads what it needs.

    Raises:
        CheckpointError: one is missing or has another shape, or a file is damaged.
    """
    try:
        with torch.no_grad():
            dcp.load(tensors, storage_reader=_Reader(folder, url), no_dist=alone)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{url or folder} does not fit: {_reason(error)}") from error


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors in `folder` whose names begin with `prefix`, on the CPU, without it; needs no other ranks."""
    kinds = read_tensor_index(folder).state_dict_metadata
    wanted: Mapping[str, Any] = {name: kind for name, kind in kinds.items() if name.startswith(prefix)}
    tensors = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in wanted.items()}
    load_into(folder, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _reason(error: BaseException) -> str:
    """The first cause, of torch's report of what went wrong on which rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
