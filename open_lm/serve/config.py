"""Flags of the server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own: localhost, ::1 and all of 127.0.0.0/8."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class ServeConfig:
    """Server"""

    checkpoint: tuple[str, ...] = flag(
        (),
        "Run folders (their newest checkpoint), weights files, folders of transformers, or hf://owner/name; each is "
        "served under the last part of its name.",
    )
    adapter: tuple[str, ...] = flag(
        (), "Folders of LoRA adapters in PEFT's format; each is served, merged into the one --checkpoint, beside it."
    )
    tokenizer: str | None = flag(
        None, "Hub id, local folder or tokenizer.json. None: the one each checkpoint names, if it names one."
    )
    chat_template: str | None = flag(
        None,
        "Jinja file, or the name of a built-in one (tulu, chatml, plain). None: the one that "
        "the checkpoint's data were made with, else the tokenizer's own, else tulu.",
    )
    device: str | None = flag(None, "Where to compute, such as cpu or cuda:0. None: the GPU if there is one.")
    dtype: str | None = flag(
        None, "Type of the weights. None: the checkpoint's.", choices=("float32", "bfloat16", "float16")
    )
    host: str = flag("127.0.0.1", "Address to listen on. Anything but loopback lets other machines in: see --api-key.")
    port: int = flag(8000, "Port to listen on; 0 = a free one, which the log names.", least=0)
    api_key: str | None = flag(
        None, "Key that requests must carry as `Authorization: Bearer KEY`. None: that of $OPENLM_API_KEY, or none."
    )
    slots: int = flag(64, "Texts written at the same time by each model; fewer where its cache would not fit.", least=1)
    max_queue: int = flag(256, "Texts that may wait for a slot; a request beyond it gets a 429.", least=0)
    max_seconds: float = flag(600.0, "Time from a request to its last token, at most.", above=0)
    max_body_mb: float = flag(4.0, "Size of a request's body in MB, at most.", above=0)
    grace_seconds: float = flag(60.0, "Time that running requests get to finish after SIGTERM or Ctrl-C.", above=0)
    log_prompts: bool = flag(False, "Write prompts and texts to the log, too, which holds neither otherwise.")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("--checkpoint is missing: give a run folder or an epoch_K.pt.")
        if self.adapter and len(self.checkpoint) > 1:
            raise ConfigError(f"--adapter belongs to one --checkpoint, here are {len(self.checkpoint)}: give one.")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("--api-key (or $OPENLM_API_KEY) is empty: give a key, or neither for a server without.")
        if self.port > 65535:
            raise ConfigError(f"--port {self.port}: need 0 to 65535.")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)
