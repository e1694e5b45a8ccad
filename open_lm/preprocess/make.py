"""Making a data set, in order: plan, tokenize, shuffle, balance, publish."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from open_lm import storage
from open_lm.data.manifest import FILENAME, read_manifest, write_manifest
from open_lm.errors import ConfigError, DataError
from open_lm.preprocess.accounting import make_flat_ledger, make_ledger
from open_lm.preprocess.job import FLAT, Job, Workplace, text_tasks
from open_lm.preprocess.jsonl import estimated_text_bytes
from open_lm.preprocess.packing import write_tails
from open_lm.preprocess.preloaded import preload
from open_lm.preprocess.shuffle import write_shards
from open_lm.preprocess.tokenize import tokenize
from open_lm.preprocess.workers import RunTasks, SetAside, run_tasks
from open_lm.preprocess.write_flat import write_arrays

log = logging.getLogger(__name__)

LEDGER = "ledger.json"
_UNFINISHED = ".unfinished"
_TRIES = 3
Blocks = dict[str, dict[str, Any]]
"""Records of finished blocks, by name."""


@dataclass(frozen=True)
class Destination:
    """The folder in which a data set appears, and that of its unfinished work; both may be URLs."""

    folder: str
    workplace: str

    @property
    def shards(self) -> str:
        """The folder that shards are written to: for a local destination within the workplace, to be moved as one."""
        return self.folder if storage.is_remote(self.folder) else os.path.join(self.workplace, "shards")


def destination(folder: str, tmp_dir: str | None = None) -> Destination:
    """The workplace of `folder`: beside it, so that a rename publishes it; or in `tmp_dir`."""
    if storage.is_remote(folder):
        name = folder.split("://")[1].strip("/").replace("/", "_") + _UNFINISHED
        return Destination(folder, os.path.join(tmp_dir or os.getcwd(), name))
    folder = str(storage.local_path(folder).absolute())
    return Destination(folder, folder + _UNFINISHED)


def build_data_set(
    job: Job,
    to: Destination,
    tokenizer_json: str,
    *,
    n_workers: int,
    n_writers: int | None = None,
    encoder: str = "tokenizers",
    resume: bool = False,
    overwrite: bool = False,
    run: RunTasks | None = None,
) -> dict[str, Any]:
    """Make the data set and return its ledger. Nothing appears in the folder before all of it is there.

    `run` runs the tasks; None: processes of this machine. With `resume` the work an earlier call left is continued, and
    the result is the same byte for byte.

    Raises:
        ConfigError: the folder holds a data set already, or unfinished work of another job.
        DataError: an input is damaged, holds a bad line, or the books do not balance.
    """
    if (finished := _finished(job, to, resume)) is not None:
        return finished
    _check_folder(job, to, overwrite)
    target, prefix = to.shards, _prefix(job, to)
    with _workplace(job, to, tokenizer_json, resume=resume, overwrite=overwrite) as work:
        if run is None and n_workers > 1:
            preload(job, work.folder, encoder)
        n_writers, run = n_writers or (n_workers if run else None), run or run_tasks
        blocks = _tokenize_all(job, work, encoder, n_workers, run)
        if job.form == FLAT:
            rows = write_arrays(job, work, target, blocks, n_writers or n_workers, run)
            ledger = make_flat_ledger(job, blocks, rows)
        else:
            tails = {
                name: work.sound_block(name, job) or write_tails(job, work, name, blocks, source=source)
                for source, name in enumerate(job.tail_blocks)
            }
            rows = write_shards(job, work, target, prefix, blocks | tails, n_workers, n_writers, run)
            ledger = make_ledger(job, blocks, tails, rows)
        _publish(job, to, rows, ledger, overwrite)
    _remove(to.workplace)
    return ledger


def _remove(folder: str) -> None:
    if not storage.is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for url in storage.glob_in(folder, "**"):
        storage.remove(url)


def _finished(job: Job, to: Destination, resume: bool) -> dict[str, Any] | None:
    """The ledger of a data set that is complete and is this job's own, when asked to resume."""
    if not resume or not storage.exists(storage.join(to.folder, _last_written(job))):
        return None
    ledger_url = storage.join(to.folder, LEDGER)
    ledger = orjson.loads(storage.read_bytes(ledger_url)) if storage.exists(ledger_url) else {}
    if ledger.get("job") != orjson.loads(job.json):
        return None
    _remove(to.workplace)  # left by a run that was killed between its last steps
    if job.form != FLAT:
        _remove_replaced(to.folder)
    return ledger


def _last_written(job: Job) -> str:
    """The file that says the data set is there."""
    return LEDGER if job.form == FLAT else FILENAME


def _check_folder(job: Job, to: Destination, overwrite: bool) -> None:
    if job.form == FLAT and storage.is_remote(to.folder) and storage.exists(storage.join(to.folder, LEDGER)):
        raise ConfigError(
            f"--output-dir {storage.shown(to.folder)}: holds a data set, and arrays in a store cannot be replaced at "
            "once: readers find them by their names. Choose another folder."
        )
    if overwrite or (not storage.is_remote(to.folder) and not os.path.exists(to.folder)):
        return
    used = storage.exists(storage.join(to.folder, FILENAME)) or (
        not storage.is_remote(to.folder) and bool(os.listdir(to.folder))
    )
    if used:
        raise ConfigError(
            f"--output-dir {to.folder}: is not empty. Choose another folder, or --overwrite to replace it."
        )


@contextmanager
def _workplace(job: Job, to: Destination, tokenizer_json: str, *, resume: bool, overwrite: bool) -> Iterator[Workplace]:
    """The folder for unfinished work, with the job and its tokenizer in it; a local one is locked."""
    work = Workplace(to.workplace)
    if storage.exists(work.path("job.json")):
        if storage.read_bytes(work.path("job.json")) != job.json and (resume or not overwrite):
            raise ConfigError(
                f"{work.folder}: holds unfinished work of a job with other settings or inputs. "
                "Give the settings of then with --resume, or --overwrite to start again."
            )
        if not resume and not overwrite:
            raise ConfigError(
                f"{work.folder}: holds unfinished work. Go on with it by --resume, or start again with --overwrite."
            )
    storage.require_writable(work.folder, "--output-dir")
    with _alone(work.folder):
        _clean(work.folder, everything=overwrite and not resume)
        if not storage.exists(work.path("job.json")):
            storage.write_bytes(work.path("tokenizer.json"), tokenizer_json.encode())
            storage.write_bytes(work.path("job.json"), job.json)
        yield work


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """One process at a time works in a local folder. In a remote one two would write the same bytes."""
    if storage.is_remote(folder):
        yield
        return
    with open(os.path.join(folder, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{folder}: locked by another process. Wait for it, or stop it.") from None
        yield


def _clean(folder: str, *, everything: bool) -> None:
    """Remove what a killed run was writing; or all it left."""
    if storage.is_remote(folder):
        if everything:
            _remove(folder)
        return
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            if name.endswith(".tmp") or (everything and name != "lock"):
                os.unlink(os.path.join(root, name))
        if everything and root != folder:
            shutil.rmtree(root)


def _tokenize_all(job: Job, work: Workplace, encoder: str, n_workers: int, run: RunTasks) -> Blocks:
    """Stage 1; the records of all blocks, in the order of the corpus. What is lost or cut off is made again."""
    tasks = text_tasks(job, n_workers)
    left, total_bytes = tasks, estimated_text_bytes(job.inputs)
    for _ in range(_TRIES):
        calls = [partial(tokenize, work.folder, job.fingerprint, encoder, task) for task in left]
        try:
            run(calls, n_workers, label="tokenize", total_bytes=total_bytes)
        except SetAside as error:
            raise DataError(f"{error} They read {_inputs_of(job, error.tasks)}.") from None
        blocks, lost = work.blocks_of(tasks, job)
        if not lost:
            return blocks
        left = list(lost)
        log.warning("%s: %s is missing or cut off; made again.", work.folder, lost[left[0]])
    raise DataError(f"{work.folder}: finished work disappears ({left[0].name}). Is something else deleting there?")


def _inputs_of(job: Job, calls: Sequence[Any]) -> str:
    """The files that set-aside calls of `tokenize` read."""
    numbers = {number for call in calls for number in range(call.args[-1].first, call.args[-1].last + 1)}
    shown = [storage.shown(job.inputs[number][0]) for number in sorted(numbers)[:5]]
    return ", ".join(shown) + (f" and {len(numbers) - 5} more files" if len(numbers) > 5 else "")


def _prefix(job: Job, to: Destination) -> str:
    """The prefix of new shards' names, where shards of another data set have the plain names.

    A store knows no rename of folders: the old shards stay until the manifest names the new ones.
    """
    if not storage.is_remote(to.folder) or not storage.exists(storage.join(to.folder, FILENAME)):
        return ""
    prefix = f"{job.fingerprint[:8]}-"
    mine = any(shard.name.startswith(prefix) for shard in read_manifest(storage.join(to.folder, FILENAME)))
    return f"{job.fingerprint[8:16]}-" if mine else prefix


def _remove_replaced(folder: str) -> None:
    """Remove shards in a remote folder that its manifest does not name: those it named before."""
    if storage.is_remote(folder):
        named = {os.path.basename(shard.url) for shard in read_manifest(storage.join(folder, FILENAME))}
        for url in storage.glob_in(folder, "*.tar"):
            if os.path.basename(url) not in named:
                storage.remove(url)


def _publish(job: Job, to: Destination, rows: list[dict[str, Any]], ledger: dict[str, Any], overwrite: bool) -> None:
    """Put ledger and manifest beside the shards; a local folder then takes its final name by one rename."""
    storage.write_bytes(storage.join(to.shards, LEDGER), orjson.dumps(ledger, option=orjson.OPT_INDENT_2))
    if job.form != FLAT:
        write_manifest(storage.join(to.shards, FILENAME), rows)
    if storage.is_remote(to.folder):
        if overwrite and job.form != FLAT:
            _remove_replaced(to.folder)
        return
    if os.path.isdir(to.folder):
        if overwrite:
            os.replace(to.folder, os.path.join(to.workplace, "replaced"))
        else:
            os.rmdir(to.folder)
    os.makedirs(os.path.dirname(to.folder), exist_ok=True)
    os.replace(to.shards, to.folder)
