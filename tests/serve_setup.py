"""A running server over a tiny model of letters, on a free port of loopback, in this process."""

import asyncio
import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from open_lm.model import create_model
from open_lm.model.config import ModelConfig

pytest.importorskip("uvicorn", reason="needs the extra: pip install '.[serve]'")
httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parents[1]
VOCAB = ["<|endoftext|>", "Ġ", "Ċ", *map(chr, range(0x21, 0x7F)), "Ã", "©"]  # ASCII, a line break, the bytes of é
SIZES = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 256, "vocab_size": len(VOCAB)}


def tokenizer_of_bytes():
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(VOCAB)}, []))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two checkpoints and their tokenizer."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer_of_bytes().save(str(folder / "tokenizer.json"))
    config = ModelConfig(**SIZES)
    for number, name in enumerate(("first", "second")):
        torch.manual_seed(number)
        model = create_model(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            model.output.weight[0] = 0  # seldom the end of a text
            model.output.weight.mul_(2)
        facts = {"epoch": 1, "name": name, "step": 1, "config": {"model": config.to_dict(), "flags": {}}}
        torch.save({**facts, "state_dict": model.state_dict()}, folder / f"{name}.pt")
    return folder


def n_open(state):
    return sum(served.service._n_open for served in state.models.values())


def until(what, seconds=5.0):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()


@contextlib.contextmanager
def running(folder, *names, **changes):
    """A server of the checkpoints `names`; gives its url and its state."""
    from open_lm.model.config import ModelFlags
    from open_lm.serve.__main__ import http_server, state_of_flags
    from open_lm.serve.config import ServeConfig

    paths = tuple(str(folder / f"{name}.pt") for name in names or ("first",))
    config = ServeConfig(checkpoint=paths, tokenizer=str(folder / "tokenizer.json"), slots=8, device="cpu")
    state = state_of_flags(dataclasses.replace(config, **changes), ModelFlags())
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = http_server(state, url)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield url, state
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()


@pytest.fixture(scope="session")
def server(folder):
    """A running server of both models, (url, state)."""
    with running(folder, "first", "second") as both:
        yield both


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


@pytest.fixture
def first(server):
    """The first model and its tokenizer: what answers must equal."""
    served = next(iter(server[1].models.values()))
    return served.service.model, served.tokenizer


def started(flags, *, cwd=None, **environment):
    """A process of `openlm serve` on a free port and its url, once it serves."""
    command = [sys.executable, "-m", "open_lm.serve", "--port", "0", "--device", "cpu", *map(str, flags)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd)
    for line in process.stderr:
        if found := re.search(r"serving \S+ on (http://\S+)", line):
            return process, found[1]
    raise AssertionError(f"the server ended with {process.wait()}")
