"""`openlm download wikipedia`: the newest dump of a language to .jsonl.zst, streamed, resumed file by file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from open_lm.commands.download_dataset import HfDataset, fetch
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group

DATASET = "wikimedia/wikipedia"


@dataclass(frozen=True)
class WikiDownload:
    """Input and output"""

    output_dir: str = flag("", "Folder or url; gets one .jsonl.zst for each file, lines with id, url, title and text.")
    language: str = flag("en", "Language code of the Wikipedia, as in its address.")
    dump: str | None = flag(None, "Day of the dump, as 20231101. None: the newest on the Hub.")
    max_files: int | None = flag(None, "Only so many files, the first ones.", least=1)
    num_workers: int = flag(4, "Files that are read at a time.", least=1)

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ConfigError("--output-dir: not given. See --help.")


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Fetch the dump the flags name; the files it became."""
    parser = Parser(description=__doc__)
    add_group(parser, WikiDownload)
    flags = read_group(parser.parse_args(argv), WikiDownload)
    return fetch(
        HfDataset(
            dataset=DATASET,
            output_dir=flags.output_dir,
            config=f"{flags.dump or newest_dump(flags.language)}.{flags.language}",
            max_files=flags.max_files,
            num_workers=flags.num_workers,
        )
    )


def newest_dump(language: str) -> str:
    """The day of the newest dump of a language.

    Raises:
        ConfigError: there is none.
    """
    from open_lm.preprocess.hub_dataset import list_files

    paths, _ = list_files(DATASET)
    days = {match[1] for path in paths if (match := re.match(rf"(\d{{8}})\.{re.escape(language)}/", path))}
    if not days:
        raise ConfigError(f"--language {language}: {DATASET} has no such Wikipedia.")
    return max(days)
