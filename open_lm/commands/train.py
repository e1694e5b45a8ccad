"""`openlm train`: the training command, with the ranks of this machine started by itself."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.commands.ranks import Ranks, cores, free_port
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group


@dataclass(frozen=True)
class LaunchConfig:
    """Ranks"""

    nproc_per_node: str | None = flag(
        None,
        "Ranks to start on this machine: a number, or gpu for one on each GPU. None: this process is the only rank, or "
        "one of those that torchrun, SLURM or MPI started.",
        aliases=("--nproc_per_node",),
    )
    nnodes: int = flag(1, "Machines; run the same command on each, with its own --node-rank.", least=1)
    node_rank: int = flag(0, "Number of this machine, from 0.", least=0, aliases=("--node_rank",))
    master_addr: str | None = flag(None, "Address of machine 0, for several machines.", aliases=("--master_addr",))
    master_port: int | None = flag(
        None,
        "Free port of machine 0. None: any on one machine, 29500 for several.",
        least=1,
        aliases=("--master_port",),
    )

    def __post_init__(self) -> None:
        n = self.nproc_per_node
        if n not in (None, "gpu") and not (n.isdecimal() and int(n) > 0):
            raise ConfigError(f"--nproc-per-node {n}: give a number of ranks above 0, or gpu.")
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"--node-rank {self.node_rank}: must be below --nnodes {self.nnodes}.")
        if self.nnodes > 1 and n is None:
            raise ConfigError(f"--nnodes {self.nnodes}: needs --nproc-per-node, the ranks of this machine.")
        if self.nnodes > 1 and not self.master_addr:
            raise ConfigError(f"--nnodes {self.nnodes}: needs --master-addr, the address of machine 0.")


def main(argv: Sequence[str] | None = None) -> Any:
    """Train in this process, or start the ranks and wait for them.

    Raises:
        SystemExit: the ranks have ended; the code is that of the first one that failed, 85 after a saved stop.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(add_help=False, allow_abbrev=False)
    add_group(parser, LaunchConfig)
    known, flags_of_main = parser.parse_known_args(argv)
    launch = read_group(known, LaunchConfig)
    if {"-h", "--help"} & set(flags_of_main):
        show_help()
    elif launch.nproc_per_node is None:
        from open_lm.main import main as train

        return train(flags_of_main)
    else:
        sys.exit(start(launch, flags_of_main, shlex.join(["openlm", "train", *argv])))


def show_help() -> None:
    """Print the flags of the ranks, then all of the training command."""
    from open_lm.params import build_parser

    parser = build_parser()
    add_group(parser, LaunchConfig)
    parser.print_help()


def start(launch: LaunchConfig, argv: Sequence[str], typed: str) -> int:
    """Check the flags once, then run the ranks of this machine, which log `typed`; the exit code of them all."""
    from open_lm.params import COMMAND_VARIABLE, parse_args, read_config

    read_config(parse_args(argv))  # a wrong flag is one message, before any rank starts
    n = count_gpus() if launch.nproc_per_node == "gpu" else int(launch.nproc_per_node or 1)
    shared = {
        "MASTER_ADDR": launch.master_addr or "127.0.0.1",
        "MASTER_PORT": str(launch.master_port or (free_port() if launch.nnodes == 1 else 29500)),
        "WORLD_SIZE": str(n * launch.nnodes),
        "LOCAL_WORLD_SIZE": str(n),
        COMMAND_VARIABLE: typed,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // n))),
    }
    command = [sys.executable, "-m", "open_lm.main", *argv]
    each = [{**shared, "RANK": str(launch.node_rank * n + k), "LOCAL_RANK": str(k)} for k in range(n)]
    return Ranks(command, each).wait()


def count_gpus() -> int:
    """The GPUs of this machine.

    Raises:
        ConfigError: there is none.
    """
    count = "import torch; print(torch.cuda.device_count())"
    n = int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout)
    if n == 0:
        raise ConfigError("--nproc-per-node gpu: torch sees no GPU here. Give the number of ranks.")
    return n
