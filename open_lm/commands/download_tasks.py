"""`openlm download tasks`: LLM Foundry's public benchmark files, fetched by name, resumed, and checked."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage, text
from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.evaluate.tasks.suite import SUITES, foundry_name, read_suite
from open_lm.flags import Parser, add_group, flag, read_group

CLONE = Path(__file__).resolve().parents[2]
SOURCE = "https://raw.githubusercontent.com/mosaicml/llm-foundry/v0.22.0/scripts/eval/local_data"
LOCAL_DATA = CLONE / "eval" / "local_data" if (CLONE / "setup.py").exists() else Path("eval", "local_data")
BLOCK = 1 << 20


@dataclass(frozen=True)
class DownloadConfig:
    """Downloading benchmark files"""

    names: tuple[str, ...] = flag((), "Files to fetch, such as commonsense_reasoning/copa.jsonl.")
    eval_yaml: str | None = flag(None, "Fetch what the tasks of this YAML need and is not there yet.")
    output_dir: str = flag(str(LOCAL_DATA), "Folder that gets the files.")
    source: str = flag(SOURCE, "Where they are: the address of an LLM Foundry local_data folder.")
    timeout_seconds: float = flag(30.0, "How long to wait for the server, in seconds.")

    def __post_init__(self) -> None:
        if not self.names and not self.eval_yaml:
            raise ConfigError("name files (--names world_knowledge/arc_easy.jsonl) or give --eval-yaml.")
        for name in self.names:
            if name.startswith("/") or ".." in name.split("/"):
                raise ConfigError(f"--names {name}: need a path inside local_data.")


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Fetch the files and return their names."""
    parser = Parser(description=__doc__)
    add_group(parser, DownloadConfig)
    config = read_group(parser.parse_args(argv), DownloadConfig)
    storage.require_writable(config.output_dir, "--output-dir")
    names = list(dict.fromkeys([*config.names, *(_needed(config.eval_yaml) if config.eval_yaml else [])]))
    for name in names:
        print(f"{name}: {fetch(name, config)}", flush=True)
    return names


def _needed(eval_yaml: str) -> list[str]:
    """The files of LLM Foundry's local_data that a YAML's tasks read; a line is printed for every other file.

    Raises:
        ConfigError: a file is none of these, and not there.
    """
    tasks = read_suite(eval_yaml).tasks
    others = [task for task in tasks if foundry_name(task.dataset_uri) is None]
    missing = [f"{task.label} ({task.dataset_uri})" for task in others if not storage.exists(task.data_path)]
    if missing:
        raise ConfigError(
            f"--eval-yaml {eval_yaml}: no data for {', '.join(missing)}, and LLM Foundry's local_data/ has none. "
            "Correct dataset_uri, or put the files there."
        )
    for path in dict.fromkeys(task.data_path for task in others):
        print(f"{path}: already there, nothing to fetch", flush=True)
    return [name for task in tasks if (name := foundry_name(task.dataset_uri))]


def fetch(name: str, config: DownloadConfig) -> str:
    """Make sure that file `name` is there and sound; returns what was done.

    Raises:
        StorageError: it cannot be fetched; the message says what to do without a network.
        DataError: what came is not the file that is expected.
    """
    target = Path(config.output_dir) / name
    if target.exists():
        _check(name, target, config)
        return f"already there, {text.size(target.stat().st_size)}"
    partial = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    _download(f"{config.source.rstrip('/')}/{name}", partial, target, config.timeout_seconds)
    try:
        _check(name, partial, config)
    except DataError:
        partial.unlink()
        raise
    os.replace(partial, target)
    return f"fetched, {text.size(target.stat().st_size)}"


def _download(url: str, partial: Path, target: Path, timeout: float) -> None:
    """Bring `partial` to its full length, from where an earlier try ended if the server can."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            resumed = response.status == 206
            expected = int(response.headers.get("Content-Length") or -1)
            with open(partial, "ab" if resumed else "wb") as file:
                received = 0
                while block := response.read(BLOCK):
                    received += file.write(block)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # everything was there already
            return
        raise StorageError(f"{url}: the server answers {error.code} {error.reason}. Check the name.") from error
    except (OSError, ValueError) as error:
        raise StorageError(_offline(url, target, error)) from error
    if expected >= 0 and received != expected:
        found = f"{received} of {expected} bytes"
        raise StorageError(f"{url}: the connection ended after {found}. Run the command again: it goes on from there.")


def _offline(url: str, target: Path, error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return (
        f"{url}: cannot be reached ({reason}). Without a network, fetch that address on another machine and "
        f"put the file at {target}; then run this command again to check it."
    )


def _check(name: str, path: Path, config: DownloadConfig) -> None:
    """Compare `path` with what is known of `name`, or with what came the first time; every line must be JSON."""
    content = path.read_bytes()
    found: dict[str, Any] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seen_path = Path(config.output_dir) / "seen_files.json"
    seen = json.loads(seen_path.read_text()) if seen_path.exists() else {}
    known: dict[str, Any] = json.loads((SUITES / "known_files.json").read_text())
    expected = known.get(name) or seen.get(name)
    if expected and expected != found:
        raise DataError(
            f"{path}: {found['size']} bytes, sha256 {found['sha256'][:12]}…; expected {expected['size']} bytes, "
            f"{expected['sha256'][:12]}…. Delete it and fetch it again, or correct --source."
        )
    if expected is None:
        _require_rows(content, path)
        storage.write_text(str(seen_path), json.dumps({**seen, name: found}, indent=1, sort_keys=True) + "\n")


def _require_rows(content: bytes, path: Path) -> None:
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            if line.strip():
                json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}): this is no task file. Check --source.") from error
    if not content.strip():
        raise DataError(f"{path}: empty. Check --source.")
