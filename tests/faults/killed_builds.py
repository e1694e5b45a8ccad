"""Builds of one data set in children that are killed at random moments, until `n_kills` have hit: run as a program.

    python killed_builds.py JOB.json TOKENIZER.json FOLDER N_KILLS SEED N_WORKERS WHOM

Prints how many kills hit, and how many data sets were finished; each is at FOLDER/K.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import orjson

from open_lm.preprocess.job import Job
from open_lm.preprocess.make import build_data_set, destination


def load(path):
    row = orjson.loads(Path(path).read_bytes())
    pairs = {name: tuple(map(tuple, row[name])) for name in ("inputs", "sampling")}
    return Job(**(row | pairs | {"source_of": tuple(row["source_of"])}))


def build(job, tokenizer, folder, tmp, n_workers):
    """In a child of its own group; its pid."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(0 if succeeds(job, tokenizer, folder, tmp, n_workers) else 1)


def succeeds(job, tokenizer, folder, tmp, n_workers):
    with contextlib.suppress(BaseException):
        to = destination(folder, tmp)
        build_data_set(job, to, tokenizer, n_workers=n_workers, resume=True)
        return True
    return False


def victims(pid, whom):
    """Processes to kill: the coordinator, one of its workers, or all."""
    if whom == "all":
        return [-pid]
    if whom == "coordinator":
        return [pid]
    servers = children(pid)  # that which forks workers, and that which tracks resources
    workers = [worker for server in servers for worker in children(server)]
    return [random.choice(workers)] if workers else []


def children(pid):
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if parent(path) == pid]


def parent(path):
    with contextlib.suppress(OSError):
        return int(path.read_text().rpartition(")")[2].split()[1])
    return 0


def main():
    job, tokenizer = load(sys.argv[1]), Path(sys.argv[2]).read_text()
    folder, (n_kills, seed, n_workers), whom = sys.argv[3], map(int, sys.argv[4:7]), sys.argv[7]
    dice, hits, finished, longest = random.Random(seed), 0, 0, 0.4
    while hits < n_kills:
        started = time.monotonic()
        child = build(job, tokenizer, f"{folder}/{finished}", f"/tmp/killed-{os.getpid()}", n_workers)
        moment, status = started + dice.uniform(0.01, longest), 0
        while not status and time.monotonic() < moment:
            time.sleep(0.002)
            done, code = os.waitpid(child, os.WNOHANG)
            status = 1 + code if done else 0
        if not status:
            for pid in victims(child, whom):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    hits += 1
            status = 1 + os.waitpid(child, 0)[1]
        if status == 1:
            finished += 1
            longest = max(0.2, min(20.0, time.monotonic() - started))
    print(hits, finished)


if __name__ == "__main__":  # workers import this file
    main()
