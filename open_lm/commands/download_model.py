"""`openlm download owner/name`: a model of the Hugging Face Hub, into the Hub's cache or a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group


@dataclass(frozen=True)
class DownloadModel:
    """Model"""

    model: str = flag("", "owner/name on the Hub, or owner/name@revision.")
    out: str | None = flag(None, "Folder to copy it to; it must not exist. None: the Hub's cache alone.")

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("--model is missing: give owner/name.")
        if self.out and Path(self.out).expanduser().exists():
            raise ConfigError(f"--out {self.out} exists: choose another folder, or remove it.")


def main(argv: Sequence[str] | None = None) -> str:
    """Download the model and print the folder it is in, which every --checkpoint takes; also as hf://owner/name.

    Raises:
        StorageError: there is no such model, no access to it, or no network and nothing in the cache.
    """
    from open_lm.weights.hub import download

    parser = Parser(prog="openlm download model", description=__doc__)
    add_group(parser, DownloadModel)
    asked = read_group(parser.parse_args(argv), DownloadModel)
    folder = download(f"hf://{asked.model.removeprefix('hf://')}")
    if asked.out:
        folder = shutil.copytree(folder, Path(asked.out).expanduser())
    print(folder, flush=True)
    return str(folder)
