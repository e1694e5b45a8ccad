"""`openlm corpus`: real text that every machine has, the sources and documentation of Python and its packages.

The same environment gives the same bytes: neither its place on disk nor times of files matter.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_lm import storage, text
from open_lm.errors import ConfigError, DataError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.progress import progress

STDLIB = "python"
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
ZSTD_LEVEL = 6
_TEST_FOLDERS = frozenset(("test", "tests", "testing", "idle_test", "test_data", "testdata", "test-examples"))
_TABLE_FOLDERS = frozenset(("encodings", "lib2to3"))
_VENDORED_FOLDERS = frozenset(("_vendor", "_vendored", "vendor", "vendored", "third_party", "_distutils"))
_LISTS = re.compile(r"licen[cs]e|copying|notice|authors|record|top_level|entry_points|vendor|requirements|tlds")
_GENERATED = re.compile(
    r"do not edit|don't edit|do not modify|auto[- ]?generated|automatically generated|@generated", re.I
)


@dataclass(frozen=True)
class CorpusConfig:
    """Corpus"""

    output_dir: str = flag("raw", "Folder for train-*.jsonl.zst, held-out.jsonl.zst and corpus.json.")
    max_megabytes: float = flag(
        32.0, "Megabytes (10^6 bytes) of text at most: small packages stay whole, large ones are cut to one level."
    )
    held_out: float = flag(0.02, "Share of the documents held out, chosen by a hash of their id.")
    n_files: int = flag(4, "Files that the training documents are dealt to.")
    stdlib: str = flag(sysconfig.get_path("stdlib"), "Folder of the standard library.")
    site_packages: str = flag(sysconfig.get_path("purelib"), "Folder of the installed packages.")

    def __post_init__(self) -> None:
        if self.max_megabytes <= 0:
            raise ConfigError(f"--max-megabytes {self.max_megabytes} must be above 0.")
        if not 0 < self.held_out < 0.5:
            raise ConfigError(f"--held-out {self.held_out} must be a share between 0 and 0.5.")
        if self.n_files < 1:
            raise ConfigError(f"--n-files {self.n_files} must be at least 1.")
        for name in ("stdlib", "site_packages"):
            if not os.path.isdir(getattr(self, name)):
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: no such folder.")


@dataclass(frozen=True)
class SourceFile:
    """A file that may become a document. `id` holds no absolute path, so it is the same on every machine."""

    id: str
    source: str
    path: str

    @property
    def share_of(self) -> str:
        """The owner of one portion of the corpus: an installed package, or one module of the standard library."""
        return "/".join(self.id.split("/")[:2]) if self.source == STDLIB else self.source

    def draw(self, purpose: str) -> float:
        """A number in [0, 1) that depends on the id and the purpose alone."""
        return int.from_bytes(hashlib.sha256(f"{purpose} {self.id}".encode()).digest()[:8], "big") / 2**64

    def read(self) -> str:
        """The text; of a package's METADATA only the description, which is its README.

        Raises:
            ValueError: not UTF-8, or with NUL bytes.
        """
        content = Path(self.path).read_bytes().decode()
        if "\0" in content:
            raise ValueError("NUL bytes")
        content = content.replace("\r\n", "\n")
        return content.partition("\n\n")[2] if self.path.endswith("METADATA") else content


def main(argv: Sequence[str] | None = None) -> dict:
    """Write the corpus and return what corpus.json holds."""
    parser = Parser(description="Collect the text that every machine with Python has.")
    add_group(parser, CorpusConfig)
    config = read_group(parser.parse_args(argv), CorpusConfig)
    storage.require_writable(config.output_dir, "--output-dir")
    sizes, rejected = judge(find(config.stdlib, config.site_packages))
    chosen = fit(sizes, round(config.max_megabytes * 1e6))
    clear(config.output_dir)
    rejected["beyond the share of its package"] = len(sizes) - len(chosen)
    report = write(chosen, config) | {"rejected": dict(sorted(rejected.items())), "python": platform.python_version()}
    storage.write_text(storage.join(config.output_dir, "corpus.json"), json.dumps(report, indent=2) + "\n")
    say(report, config.output_dir)
    return report


def find(stdlib: str, site_packages: str) -> list[SourceFile]:
    """Every text file of the standard library and the installed packages, in the order of their ids."""
    found = [*_in_stdlib(Path(stdlib)), *_in_packages(site_packages)]
    if not found:
        raise DataError(f"no text in {stdlib} or {site_packages}. Name other ones with --stdlib and --site-packages.")
    return sorted(found, key=lambda document: document.id)


def _in_stdlib(root: Path) -> Iterator[SourceFile]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")]
        for name in names:
            path = Path(folder, name)
            if path.suffix in SUFFIXES:
                yield SourceFile(f"{STDLIB}/{path.relative_to(root).as_posix()}", STDLIB, str(path))


def _in_packages(site_packages: str) -> Iterator[SourceFile]:
    """The files that each package lists as installed; one in development (`pip install -e`) is left out."""
    for package in importlib.metadata.distributions(path=[site_packages]):
        source = package.metadata["Name"].lower().replace("_", "-")
        if '"editable": true' in (package.read_text("direct_url.json") or ""):
            continue
        for file in package.files or ():
            path, is_readme = str(package.locate_file(file)), file.name == "METADATA"
            if ".." not in file.parts and (file.suffix in SUFFIXES or is_readme) and os.path.isfile(path):
                relative = "README" if is_readme else file.as_posix()
                yield SourceFile(f"{source}/{relative}", source, path)


def judge(documents: Sequence[SourceFile]) -> tuple[dict[SourceFile, int], Counter[str]]:
    """The size in bytes of each document worth reading, and how many were rejected for which reason."""

    sizes: dict[SourceFile, int] = {}
    rejected: Counter[str] = Counter()
    seen: set[bytes] = set()
    for document in progress(documents, unit="file", label="reading"):
        reason = flaw_of_name(document)
        if not reason:
            try:
                content = document.read()
            except (ValueError, OSError):
                rejected["not readable as text"] += 1
                continue
            digest = hashlib.sha256(content.strip().encode()).digest()
            reason = "duplicate" if digest in seen else flaw_of_text(content)
            seen.add(digest)
        if reason:
            rejected[reason] += 1
        else:
            sizes[document] = len(content.encode())
    return sizes, rejected


def flaw_of_name(document: SourceFile) -> str | None:
    """The reason, from its name alone, to leave a file unread; None for a file to read."""
    *folders, name = document.id.lower().split("/")[1:]
    if _TEST_FOLDERS.intersection(folders) or name.startswith(("test_", "conftest")) or name.endswith("_test.py"):
        return "test"
    if _TABLE_FOLDERS.intersection(folders):
        return "table"
    if _VENDORED_FOLDERS.intersection(folders):
        return "copy of another package"
    if name.endswith(("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")) or name.startswith("_sysconfigdata"):
        return "generated"
    if not name.endswith((".py", ".pyi")) and name != "readme" and (_LISTS.match(name) or "licenses" in folders):
        return "licence or list"
    return None


def flaw_of_text(content: str) -> str | None:
    """The reason not to train on a text; None for a good one."""
    if len(content) < 200:
        return "shorter than 200 characters"
    if len(content) > 200_000:
        return "longer than 200,000 characters"
    if _GENERATED.search(content[:500]):
        return "generated"
    lines = content.splitlines()
    if max(map(len, lines)) > 1000 or len(content) / len(lines) > 150:
        return "table"
    letters = sum(map(str.isalpha, content))
    return "table" if letters < 0.4 * (len(content) - sum(map(str.isspace, content))) else None


def fit(sizes: dict[SourceFile, int], limit_bytes: int) -> list[SourceFile]:
    """The documents that fit `limit_bytes`: of each package a part drawn by hash, none larger than one common level.

    The level is as high as the limit allows, so packages below it stay whole.
    """
    totals: Counter[str] = Counter()
    for document, size_bytes in sizes.items():
        totals[document.share_of] += size_bytes
    level = _level(sorted(totals.values()), limit_bytes)
    taken: Counter[str] = Counter()
    chosen = []
    for document in sorted(sizes, key=lambda document: document.draw("choice")):
        if taken[document.share_of] + sizes[document] <= level:
            taken[document.share_of] += sizes[document]
            chosen.append(document)
    return sorted(chosen, key=lambda document: document.id)


def _level(totals: Sequence[int], limit: int) -> int:
    """The largest L with sum(min(total, L)) <= limit, for ascending `totals`."""
    for index, total in enumerate(totals):
        if total * (len(totals) - index) > limit:
            return limit // (len(totals) - index)
        limit -= total
    return max(totals, default=0)


def clear(folder: str) -> None:
    """Remove an earlier corpus, so that no file of it is taken for one of this; corpus.json goes first."""
    for name in ("corpus.json", "train-[0-9][0-9].jsonl.zst", "held-out.jsonl.zst"):
        for path in storage.glob_in(folder, name):
            storage.remove(path)


def write(documents: Sequence[SourceFile], config: CorpusConfig) -> dict:
    """Write the documents, one object with id, text and source a line; returns their counts by split and source."""
    held_out = [document for document in documents if document.draw("split") < config.held_out]
    training = [document for document in documents if document.draw("split") >= config.held_out]
    if not held_out or len(training) < config.n_files:
        raise DataError(
            f"{len(documents)} documents are too few: raise --held-out {config.held_out} or --max-megabytes."
        )
    files = {f"train-{k:02d}.jsonl.zst": training[k :: config.n_files] for k in range(config.n_files)}
    files["held-out.jsonl.zst"] = held_out
    sizes = {name: _write_file(storage.join(config.output_dir, name), part) for name, part in files.items()}
    held_out_bytes = sum(sizes["held-out.jsonl.zst"].values())
    by_source = sum(sizes.values(), Counter())
    counts = Counter(document.source for document in documents)
    return {
        "documents": len(documents),
        "bytes": by_source.total(),
        "train": {"documents": len(training), "bytes": by_source.total() - held_out_bytes},
        "held_out": {"documents": len(held_out), "bytes": held_out_bytes},
        "sources": {name: {"documents": counts[name], "bytes": size} for name, size in by_source.most_common()},
    }


def _write_file(path: str, documents: Iterable[SourceFile]) -> Counter[str]:
    """Write one file and return the bytes of text in it by source."""
    import zstandard

    sizes: Counter[str] = Counter()
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    with storage.open_atomic(path) as file, compressor.stream_writer(file, closefd=False) as packed:
        lines = io.TextIOWrapper(packed, encoding="utf-8", newline="\n", write_through=True)
        for document in documents:
            content = document.read()
            sizes[document.source] += len(content.encode())
            lines.write(json.dumps({"id": document.id, "text": content, "source": document.source}) + "\n")
        lines.detach()
    return sizes


def say(report: dict, folder: str) -> None:
    """Print what was collected."""
    for name, found in list(report["sources"].items())[:10]:
        print(f"{found['bytes'] / 1e6:7.2f} MB {text.count(found['documents']):>6} documents  {name}")
    print(f"        and {max(len(report['sources']) - 10, 0)} smaller sources")
    for reason, n_files in report["rejected"].items():
        print(f"{n_files:>17} files left out: {reason}")
    for name, split in (("train", report["train"]), ("held out", report["held_out"])):
        print(f"{name:>10}: {split['documents']} documents, {split['bytes'] / 1e6:.2f} MB of text in {folder}")
