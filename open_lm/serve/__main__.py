"""`openlm serve`: models over HTTP, for OpenAI's and EasyLM's clients and for a browser."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from open_lm.command import run
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, read_group
from open_lm.model.config import ModelFlags
from open_lm.serve.config import ServeConfig
from open_lm.serve.silence import SILENT_SECONDS, Silence

if TYPE_CHECKING:
    from open_lm.serve.metrics import Metrics
    from open_lm.serve.served import Served
    from open_lm.serve.state import State

LAST_SECONDS = 10
"""After --grace-seconds, for answers that say that the server shut down."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load the models and serve them until SIGTERM or Ctrl-C."""
    parser = Parser(prog="openlm serve", description=__doc__)
    for group in (ServeConfig, ModelFlags):
        add_group(parser, group)
    args = parser.parse_args(argv)
    config, flags = read_group(args, ServeConfig), read_group(args, ModelFlags)
    if config.api_key is None:
        config = dataclasses.replace(config, api_key=os.environ.get("OPENLM_API_KEY"))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s | %(levelname)s | %(message)s")
    require_packages()
    if not config.is_loopback and config.api_key is None:
        logging.warning("--host %s lets other machines in, and no --api-key keeps anybody out.", config.host)
    with _listening(config) as listener:  # before the models are read: a port that is taken is known at once
        serve(state_of_flags(config, flags), listener)


def require_packages() -> None:
    """See that what the server needs is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"openlm serve needs {error.name}: pip install fastapi uvicorn") from error


def _listening(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {config.host} --port {config.port}: {error}. Choose another, or --port 0."
        ) from error
    return listener


def state_of_flags(config: ServeConfig, flags: ModelFlags) -> State:
    """Every model of --checkpoint and --adapter, loaded, under a name of its own."""
    from open_lm.serve.metrics import Metrics
    from open_lm.serve.state import State

    metrics = Metrics()
    models: dict[str, Served] = {}
    asked = [(path, None) for path in config.checkpoint]
    for path, adapter in [*asked, *((config.checkpoint[0], adapter) for adapter in config.adapter)]:
        name = _name_of(adapter or path, models)
        models[name] = _served(name, path, adapter, config, flags, metrics, list(models.values()))
    return State(config, models, metrics)


def _name_of(path: str, taken: Any) -> str:
    """The last part of a path that says something, made unique."""
    parts = [part for part in path.replace("hf://", "").rstrip("/").split("/") if part not in ("", ".", "checkpoints")]
    name = parts[-1] if parts else "model"
    if name.endswith((".pt", ".safetensors", ".bin")) and len(parts) > 1:
        name = f"{parts[-2]}-{name.rpartition('.')[0]}"
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique


def _served(
    name: str,
    path: str,
    adapter: str | None,
    config: ServeConfig,
    flags: ModelFlags,
    metrics: Metrics,
    others: Sequence[Served],
) -> Served:
    import torch

    from open_lm.checkpoint.load_model import load_model, stored_chat_template, stored_tokenizer
    from open_lm.checkpoint.resolve import resolve
    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.post_training.chat.template import load_template
    from open_lm.serve.served import Served
    from open_lm.serve.service import Service, slot_bytes, slots_that_fit

    found = resolve(path)
    tokenizer = load_tokenizer(config.tokenizer or stored_tokenizer(found))
    template = load_template(config.chat_template, tokenizer, stored_chat_template(found))
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    given = {key: value for key, value in vars(flags).items() if value != getattr(ModelFlags(), key)}
    model = load_model(found, device=device, dtype=config.dtype, **given)
    if adapter is not None:
        model = _adapted(model, adapter, device)
    promised = sum(slot_bytes(other.service.model) * other.service.n_slots for other in others)
    n_slots = slots_that_fit(model, config.slots, promised)
    logging.info("%s: %s on %s, %d slots of %d tokens", name, adapter or path, device, n_slots, model.config.seq_len)
    service = Service(name, model, n_slots, config.max_queue, metrics)
    return Served(name, service, tokenizer, template, int(time.time())).warmed()


def require_device(device: str) -> None:
    """See that torch can compute there.

    Raises:
        ConfigError: it cannot.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--device {device}: {reason}. Give cpu, or the GPU of a machine that has one.") from error


def _adapted(model: Any, adapter: str, device: str) -> Any:
    """The model with an adapter in its weights: so it computes as fast as any other."""
    from open_lm.checkpoint.load_model import build
    from open_lm.model.lora import without_additions
    from open_lm.post_training.peft_format import load_adapter

    load_adapter(model, model.config, adapter)
    return build(model.config, without_additions(model.state_dict()), adapter, device, None).eval()


def serve(state: State, listener: socket.socket) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then finish those that run."""
    host, port = listener.getsockname()[:2]
    server = http_server(state, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    gc.collect()
    gc.freeze()  # later collections leave alone what is there for good: torch and the models
    try:
        server.run(sockets=[listener])
    finally:
        gc.unfreeze()


def http_server(state: State, url: str) -> Any:
    """uvicorn's server of the models, which are at `url`.

    It says when requests are taken, and when no more are; ends those that take longer than they may; and closes
    connections on which nothing is asked.
    """
    import uvicorn

    from open_lm.serve.app import create_app

    silence = Silence()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            logging.info("serving %s on %s", ", ".join(state.models), url)

        async def on_tick(self, counter: int) -> bool:
            if counter % 10 == 0:  # about every second
                silence.end(self.server_state.connections)
            return await super().on_tick(counter)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            end = asyncio.get_running_loop().call_later(state.config.grace_seconds, state.end_texts)
            await super().shutdown(sockets=sockets)
            end.cancel()

        def handle_exit(self, sig: int, frame: Any) -> None:
            if not state.is_ending:
                logging.info("no new requests; those that run have %g seconds", state.config.grace_seconds)
            else:
                self.force_exit = True
            state.is_ending = self.should_exit = True  # not super(): it would raise the signal again at the end

    config = uvicorn.Config(
        create_app(state),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(state.config.grace_seconds) + LAST_SECONDS,
        timeout_keep_alive=math.ceil(SILENT_SECONDS),
        server_header=False,
    )
    return Server(config)


if __name__ == "__main__":
    run(main)
