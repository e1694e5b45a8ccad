"""Hugging Face data sets as .jsonl.zst: file by file, streamed, none of their code executed."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import orjson

from open_lm import storage
from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.preprocess.json_array import array_rows, is_array
from open_lm.preprocess.jsonl import JSON_ENDINGS, read_lines

PARQUET = ".parquet"
CONVERTED = "refs/convert/parquet"
"""The revision that holds the Hub's own conversion of data sets that are not parquet."""
_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
_ROWS = 1024
_LEVEL = 3


@dataclass(frozen=True)
class HubFile:
    """One raw file of a data set at a revision."""

    dataset: str
    revision: str
    path: str
    name: str = ""
    """Stands before the ending of its output, where other files would become the same."""

    @property
    def url(self) -> str:
        return f"hf://datasets/{self.dataset}@{self.revision.replace('/', '%2F')}/{self.path}"

    @property
    def output(self) -> str:
        """Name of the .jsonl.zst it becomes."""
        stem = self.path.removesuffix(PARQUET)
        for ending in JSON_ENDINGS:
            stem = stem.removesuffix(ending)
        return stem.replace("/", "--") + self.name + ".jsonl.zst"


def list_files(dataset: str, revision: str | None = None) -> tuple[list[str], str]:
    """The paths of all files of a data set, and the commit they are of.

    Raises:
        StorageError: there is no such data set or revision, or the Hub cannot be reached.
        ConfigError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi, errors
    except ImportError as error:
        raise ConfigError("data sets of the Hub need: pip install huggingface_hub") from error
    try:
        info = HfApi().dataset_info(dataset, revision=revision)
        commit = info.sha or revision or "main"
        return sorted(HfApi().list_repo_files(dataset, repo_type="dataset", revision=commit)), commit
    except errors.RevisionNotFoundError as error:
        raise StorageError(f"--dataset {dataset}: has no revision {revision}.") from error
    except errors.RepositoryNotFoundError as error:
        raise StorageError(
            f"--dataset {dataset}: no such data set, or a private one. Check the name, or log in: `hf auth login`."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise StorageError(f"--dataset {dataset}: the Hub does not answer ({storage.redacted(str(error))}).") from error


def select(dataset: str, config: str | None, split: str, revision: str | None = None) -> list[HubFile]:
    """The files of one configuration and split: by the data set's card, else by their names.

    Raises:
        DataError: none fits; what there is, is named.
        StorageError: there is no such data set.
    """
    paths, commit = list_files(dataset, revision)
    files = [path for path in paths if path.endswith((PARQUET, *JSON_ENDINGS))]
    patterns = _card_patterns(dataset, commit, config, split) if "README.md" in paths else None
    if patterns is not None:
        found = [path for path in files if any(_matches(path, pattern) for pattern in patterns)]
    else:
        found = [path for path in files if _named(path, config, split)]
        if any(path.endswith(PARQUET) for path in found):
            found = [path for path in found if path.endswith(PARQUET)]
    if not found and revision is None:
        return _converted(dataset, config, split, files)
    if not found:
        raise _nothing(dataset, config, split, files)
    return _apart([HubFile(dataset, commit, path) for path in found])


def _apart(files: list[HubFile]) -> list[HubFile]:
    """The files, each with an output of its own: `en/x.json`, `en/x.jsonl` and `en--x.parquet` have one name."""
    shared = Counter(file.output for file in files)
    return [
        replace(file, name="-" + hashlib.blake2b(file.path.encode(), digest_size=4).hexdigest())
        if shared[file.output] > 1
        else file
        for file in files
    ]


def _converted(dataset: str, config: str | None, split: str, original: Sequence[str]) -> list[HubFile]:
    """The files of the Hub's own conversion to parquet."""
    try:
        paths, commit = list_files(dataset, CONVERTED)
    except StorageError:
        raise _nothing(dataset, config, split, original) from None
    found = [path for path in paths if path.endswith(PARQUET) and _named(path, config or "default", split)]
    if not found:
        raise _nothing(dataset, config, split, [*original, *paths])
    return _apart([HubFile(dataset, commit, path) for path in found])


def _nothing(dataset: str, config: str | None, split: str, paths: Sequence[str]) -> DataError:
    there = ", ".join(sorted({os.path.dirname(path) or path for path in paths})[:20]) or "no parquet or jsonl file"
    return DataError(
        f"--dataset {dataset}: nothing for --config {config} and --split {split}. Available: {there}. "
        "Choose by --config and --split, or --files."
    )


def _card_patterns(dataset: str, commit: str, config: str | None, split: str) -> list[str] | None:
    """The globs that the front matter of the data set's card gives; None where it gives none."""
    import yaml

    text = storage.read_text(HubFile(dataset, commit, "README.md").url)
    match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        configs = (yaml.safe_load(match[1]) or {}).get("configs") if match else None
    except yaml.YAMLError:
        return None
    if not configs:
        return None
    named = {str(row.get("config_name")): row for row in configs}
    default = next((row for row in configs if row.get("default")), named.get("default", configs[0]))
    row = named.get(config) if config else default
    if row is None:
        raise DataError(f"--dataset {dataset}: no --config {config}. Available: {', '.join(named)}.")
    files = row.get("data_files")
    rows = files if isinstance(files, list) else [files]
    patterns: list[str] = []
    for one in rows:
        if isinstance(one, str) and split == "train":
            patterns.append(one)
        elif isinstance(one, dict) and one.get("split", "train") == split:
            patterns += one["path"] if isinstance(one["path"], list) else [one["path"]]
    return patterns


def _matches(path: str, pattern: str) -> bool:
    """As the Hub's own loader: `*` stays within a folder, `**` crosses them."""
    return re.fullmatch(_regex(pattern.removeprefix("./")), path) is not None


_SIGNS = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}


@lru_cache
def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return "".join(_SIGNS.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)


def _named(path: str, config: str | None, split: str) -> bool:
    words = set(re.split(r"[^a-z0-9]+", path.lower()))
    names_it = re.search(rf"(?<![a-z0-9]){re.escape(split.lower())}(?![a-z0-9])", path.lower())  # also train_prefs
    is_split = names_it is not None or (split == "train" and not words & _SPLITS)
    return is_split and (config is None or config in path.split("/"))


def convert(file: HubFile, folder: str) -> Iterator[int]:
    """Write one file as .jsonl.zst into `folder`, unless it is there; yields the bytes of documents written.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: the file is damaged.
        StorageError: it cannot be read, or the folder cannot be written.
    """
    target = storage.join(folder, file.output)
    if storage.exists(target):
        return
    with storage.open_atomic(target) as out:
        if file.path.endswith((".jsonl.zst", ".jsonl.zstd")):
            with storage.open_read(file.url) as source:
                shutil.copyfileobj(source, out, 1 << 20)
            yield out.tell()
            return
        import zstandard

        with zstandard.ZstdCompressor(level=_LEVEL).stream_writer(out, closefd=False) as packed:
            for lines in _parquet_lines(file) if file.path.endswith(PARQUET) else _json_lines(file):
                packed.write(lines)
                yield len(lines)


def _json_lines(file: HubFile) -> Iterator[bytes]:
    if is_array(file.url):
        yield from (row + b"\n" for row in array_rows(file.url))
        return
    for line in read_lines(file.url, max_line_bytes=1 << 30):
        if line.content:
            yield line.content + b"\n"


def _parquet_lines(file: HubFile) -> Iterator[bytes]:
    for row in json_rows_of_parquet(file.url):
        yield row + b"\n"


def json_rows_of_parquet(url: str) -> Iterator[bytes]:
    """Each row of a parquet file as JSON, all columns kept, in pieces of bounded size.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("reading parquet needs pyarrow, which is not installed: pip install pyarrow") from error
    with storage.open_read(url) as source:
        try:
            for batch in parquet.ParquetFile(cast(Any, source)).iter_batches(_ROWS):
                yield from (orjson.dumps(row, default=_plain, option=_OPTIONS) for row in batch.to_pylist())
        except pyarrow.ArrowException as error:
            raise DataError(f"{storage.shown(url)}: damaged parquet ({error}). Try again.") from None


_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY


def _plain(value: Any) -> Any:
    """A JSON form of a value that JSON has no type for: bytes in base64, anything else as its text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
