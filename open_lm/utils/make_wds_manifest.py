"""A manifest for a folder of shards: every tar is read, counted and checked, several side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) if __package__ in (None, "") else None

from open_lm import command, storage  # noqa: E402
from open_lm.data.config import SAMPLE_FORMATS  # noqa: E402
from open_lm.errors import ConfigError, DataError, StorageError  # noqa: E402
from open_lm.flags import Parser, add_group, flag, read_group  # noqa: E402
from open_lm.progress import progress  # noqa: E402


@dataclass(frozen=True)
class MakeManifest:
    """Shards"""

    data_dir: str = flag("", "Folder or url whose *.tar are listed, subfolders included.")
    manifest_filename: str = flag("manifest.jsonl", "Name of the manifest; it is written into --data-dir.")
    tmp_dir: str | None = flag(None, "Accepted for old scripts and ignored: nothing is copied to disk.")
    num_workers: int = flag(4, "Shards that are read side by side.")
    data_key: str = flag(
        "auto", "Extension of the samples. auto: the one a shard has.", choices=("auto", *SAMPLE_FORMATS)
    )

    def __post_init__(self) -> None:
        if not self.data_dir:
            raise ConfigError("--data-dir: not given. Name the folder of shards.")
        if self.num_workers < 1:
            raise ConfigError(f"--num-workers {self.num_workers}: must be 1 or more.")


def main(argv: Sequence[str] | None = None) -> str:
    """Write the manifest; its url.

    Raises:
        StorageError: there are no shards.
        DataError: shards are empty, cut off or damaged: all of them are named, and no manifest is written.
    """
    parser = Parser(prog="make_wds_manifest", description=__doc__)
    add_group(parser, MakeManifest)
    flags = read_group(parser.parse_args(argv), MakeManifest)

    from open_lm.data.manifest import write_manifest

    urls = storage.glob_in(flags.data_dir, "**/*.tar")
    if not urls:
        raise StorageError(f"--data-dir {storage.shown(flags.data_dir)}: holds no *.tar. Check the path.")
    rows, problems = _read_all(urls, flags)
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(f"{len(problems)} of {len(urls)} shards are damaged, no manifest was written:\n  {shown}{more}")
    target = storage.join(flags.data_dir, flags.manifest_filename)
    write_manifest(target, rows)
    print(f"{storage.shown(target)}: {len(rows):,} shards, {sum(row['num_sequences'] for row in rows):,} sequences")
    return target


def _read_all(urls: Sequence[str], flags: MakeManifest) -> tuple[list[dict[str, Any]], list[str]]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(flags.num_workers) as pool:
        results = pool.map(lambda url: _row_or_problem(url, flags), urls)
        done = list(progress(results, total=len(urls), unit="shard", label="read shards"))
    return [row for row in done if isinstance(row, dict)], [row for row in done if isinstance(row, str)]


def _row_or_problem(url: str, flags: MakeManifest) -> dict[str, Any] | str:
    from open_lm.data.shards import describe_shard

    try:
        name = _relative(url, flags.data_dir).removesuffix(".tar")
        return {"shard": name, **describe_shard(storage.read_bytes(url), storage.shown(url), flags.data_key)}
    except (DataError, StorageError) as error:
        return str(error)


def _relative(url: str, folder: str) -> str:
    if storage.is_remote(url):
        path, base = url.split("://", 1)[1], folder.split("://", 1)[1].rstrip("/") + "/"
        return path.removeprefix(base)
    return os.path.relpath(url, storage.local_path(folder))


if __name__ == "__main__":
    command.run(main)
