"""Ranks of a run as processes of their own, forked from the test: a start costs no import of torch."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from faults import injector
from runs import SEQ_LEN

TINY = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": 16}


class Ranks:
    """`size` ranks of `open_lm.main` with the flags `words`, joined by gloo; `faults` is the injector's plan."""

    def __init__(self, words, size=1, faults=(), log=None, env=None):
        self.began = time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        plan = json.dumps(list(faults))
        self._errors = Path(f"/tmp/faults-{os.getpid()}-{port}")
        self.pids = [self._fork(words, rank, size, port, plan, log, env or {}) for rank in range(size)]
        self.codes = [None] * size

    def _fork(self, words, rank, size, port, plan, log, env):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        os.setpgid(0, 0)
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)} if size > 1 else {}
        os.environ |= {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OPENLM_FAULT_PLAN": plan, **env}
        if log:
            os.environ["OPENLM_FAULT_LOG"] = str(log)
        file = os.open(f"{self._errors}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        try:
            _rank(words)
        finally:
            os._exit(99)

    def wait(self, timeout=60):
        """The exit code of every rank (minus the signal where one ended it); those that do not end are killed."""
        deadline = time.monotonic() + timeout
        while None in self.codes:
            for rank, pid in enumerate(self.pids):
                if self.codes[rank] is None:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    self.codes[rank] = os.waitstatus_to_exitcode(status) if ended else None
                    if ended:
                        self.seconds = time.monotonic() - self.began
            if time.monotonic() > deadline:
                self._show_stacks()
                self.kill()
                raise TimeoutError(f"ranks {self.codes} after {timeout} s:\n{self.output()}")
            time.sleep(0.005)
        return self.codes

    def _show_stacks(self):
        """Let the ranks that do not end say where they are (SIGUSR2, as any run does)."""
        self.send(signal.SIGUSR2)
        time.sleep(2)

    def wait_until(self, holds, timeout=60):
        deadline = time.monotonic() + timeout
        while not holds():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def send(self, number, ranks=None):
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None and (ranks is None or rank in ranks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def kill(self):
        """End all ranks, and the data workers that they started, at once."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def output(self):
        return "".join(Path(f"{self._errors}-{rank}").read_text() for rank in range(len(self.pids)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            Path(f"{self._errors}-{rank}").unlink(missing_ok=True)


def _rank(words):
    from open_lm import faults
    from open_lm.command import run
    from open_lm.main import main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler that a worker of pytest-xdist has
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those that pytest reads
    torch.set_num_threads(1)
    faults._injector = injector.at
    try:
        run(lambda: main([str(word) for word in words]))
    except SystemExit as left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(left.code or 0)
    except BaseException:  # a bug
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run_ranks(words, size=1, faults=(), timeout=60, **options):
    """`(exit codes, output)` of a run."""
    with Ranks(words, size, faults, **options) as ranks:
        return ranks.wait(timeout), ranks.output()
