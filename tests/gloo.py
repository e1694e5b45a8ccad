"""Several ranks in one test: a function run by as many processes, joined by gloo."""

import faulthandler
import os
import socket

import torch
import torch.multiprocessing

from open_lm.distributed import start_world


def run_ranks(work, size, *arguments):
    """`work(world, *arguments)` on each of `size` ranks; what one raises, the test raises."""
    launch(_in_world, size, work, arguments)


def launch(work, size, *arguments):
    """`work(rank, *arguments)` in each of `size` processes that are told to be ranks, as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked, since importing torch takes longer than any test; ranks must leave autograd's threads alone
    torch.multiprocessing.start_processes(_rank, (work, size, port, arguments), nprocs=size, start_method="fork")


def _rank(rank, work, size, port, arguments):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100, exit=True)  # a rank that hangs says where, and ends
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(rank, *arguments)


def _in_world(rank, work, arguments):
    with start_world("cpu", timeout_seconds=60) as world:
        work(world, *arguments)
