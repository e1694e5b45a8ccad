"""`openlm download dataset`: a data set of the Hugging Face Hub to .jsonl.zst, streamed, resumed file by file."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group

SOURCE = "source.json"


@dataclass(frozen=True)
class HfDataset:
    """Input and output"""

    dataset: str = flag("", "Name of the data set on the Hub, as owner/name.")
    output_dir: str = flag("", "Folder or url; gets one .jsonl.zst for each file of the data set, and source.json.")
    config: str | None = flag(None, "Configuration (subset) of the data set. None: its default.")
    split: str = flag("train", "Split of the data set.")
    files: str | None = flag(
        None,
        "Only files whose path in the repository matches this glob; `*` crosses folders (as `hf download --include`).",
    )
    max_files: int | None = flag(None, "Only so many files, the first ones.", least=1)
    revision: str | None = flag(None, "Branch, tag or commit. None: the newest.")
    num_workers: int = flag(4, "Files that are read at a time.", least=1)

    def __post_init__(self) -> None:
        if not self.dataset or not self.output_dir:
            raise ConfigError(f"{'--output-dir' if self.dataset else '--dataset'}: not given. See --help.")


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Fetch the data set the flags describe; the files it became. Those that are there are not fetched again."""
    parser = Parser(description=__doc__)
    add_group(parser, HfDataset)
    return fetch(read_group(parser.parse_args(argv), HfDataset))


def fetch(flags: HfDataset) -> list[str]:
    """As `main`, from flags.

    Raises:
        ConfigError: the folder holds another data set.
        StorageError: the data set is not there, or cannot be read.
        DataError: nothing fits the flags, or a file is damaged.
    """
    from open_lm.preprocess.hub_dataset import convert, select
    from open_lm.preprocess.workers import run_tasks

    storage.require_writable(flags.output_dir, "--output-dir")
    files = select(flags.dataset, flags.config, flags.split, _begun(flags) or flags.revision)
    if flags.files:
        files = [file for file in files if fnmatch.fnmatchcase(file.path, flags.files)]
    files = files[: flags.max_files]
    if not files:
        raise ConfigError(f"--files {flags.files}: no file of {flags.dataset} matches.")
    _note(flags, files[0].revision)
    print(f"{flags.dataset}: {len(files)} files at {files[0].revision} to {flags.output_dir}", flush=True)
    calls = [partial(convert, file, flags.output_dir) for file in files]
    run_tasks(calls, flags.num_workers, label="fetch", total_bytes=0)
    return [storage.join(flags.output_dir, file.output) for file in files]


def _asked(flags: HfDataset) -> dict[str, Any]:
    return {name: getattr(flags, name) for name in ("dataset", "config", "split", "revision")}


def _begun(flags: HfDataset) -> str | None:
    """The commit an earlier call began with, so that a resumed one reads the same files."""
    import orjson

    path = storage.join(flags.output_dir, SOURCE)
    if not storage.exists(path):
        return None
    before = orjson.loads(storage.read_bytes(path))
    if {name: before.get(name) for name in _asked(flags)} != _asked(flags):
        raise ConfigError(f"--output-dir {flags.output_dir}: holds {before}. Choose another folder.")
    return before["commit"]


def _note(flags: HfDataset, commit: str) -> None:
    import orjson

    content = orjson.dumps(_asked(flags) | {"commit": commit}, option=orjson.OPT_INDENT_2)
    storage.write_bytes(storage.join(flags.output_dir, SOURCE), content)
