"""`init`: a ladder file to start from, with the paths and sizes that were given."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.ladder.config import from_dict
from open_lm.ladder.plan import plan_size


@dataclass(frozen=True)
class InitFlags:
    """Ladder file"""

    ladder: str = flag("ladder.json", "File to write; it must not exist.")
    name: str = flag("ladder", "Name of the ladder.")
    dir: str | None = flag(
        None, "Folder or url of the run folders. None: a folder called as the ladder, beside the file."
    )
    sizes: tuple[str, ...] = flag(
        ("60M", "100M", "190M", "370M"),
        "Sizes: presets of OLMo-core (60M … 13B), registered models, or WIDTHxLAYERS such as 128x4.",
    )
    manifests: tuple[str, ...] = flag((), "Manifests of the training data.")
    weights: tuple[float, ...] = flag((), "Share of each manifest; none: by size.")
    val_data: tuple[str, ...] = flag((), "Validation sets.")
    tokenizer: str | None = flag(None, "Tokenizer of the data.")
    icl_tasks: str | None = flag(None, "YAML of tasks to score every checkpoint on.")
    sequence_length: int = flag(2048, "Tokens of a sequence.", least=1)
    vocab_size: int = flag(50_432, "Rows of the embedding.", least=1)
    max_devices: int = flag(1, "Devices that a size may use.", least=1)
    device_type: str = flag("any", "Kind of device, such as cpu, H100 or B200.")
    chinchilla_multiple: float = flag(4.0, "End of the last period, in multiples of 20 tokens a parameter.", above=0)
    seed: int = flag(0, "Seed of weights and data order.", least=0)


def init(argv: Sequence[str]) -> str:
    """Write a ladder file and return its path."""
    parser = Parser(prog="openlm ladder init", description=__doc__)
    add_group(parser, InitFlags)
    flags = read_group(parser.parse_args(list(argv)), InitFlags)
    if not flags.manifests:
        raise ConfigError("--manifests: name the training data, manifest.jsonl files as `openlm prepare` writes them.")
    if os.path.exists(flags.ladder):
        raise ConfigError(f"--ladder {flags.ladder} exists: edit it, or give another name.")
    values = contents(flags)
    config = from_dict(values, storage.parent(flags.ladder))
    plans = [plan_size(config, name) for name in config.sizes]
    storage.write_text(flags.ladder, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    print(f"written: {flags.ladder}")
    for plan in plans:
        print(f"  {plan.name}: {plan.n_params:,} parameters ({config.counting}), {plan.numbers.total_tokens:,} tokens")
    print(f"next: openlm ladder dry-run --ladder {flags.ladder}")
    return flags.ladder


def contents(flags: InitFlags) -> dict[str, Any]:
    """The keys of the ladder file; paths become relative to it."""
    folder = os.path.dirname(os.path.abspath(flags.ladder))
    data: dict[str, Any] = {"manifests": [_relative(path, folder) for path in flags.manifests]}
    data |= {"weights": list(flags.weights)} if flags.weights else {}
    values: dict[str, Any] = {
        "name": flags.name,
        "dir": flags.name if flags.dir is None else _relative(flags.dir, folder),
        "project": None,
        "sizes": _sizes(flags.sizes, folder),
        "max_devices": flags.max_devices,
        "device_type": flags.device_type,
        "sequence_length": flags.sequence_length,
        "vocab_size": flags.vocab_size,
        "tokenizer": flags.tokenizer
        and (_relative(flags.tokenizer, folder) if os.path.exists(flags.tokenizer) else flags.tokenizer),
        "seed": flags.seed,
        "counting": "non-embedding",
        "data": data,
        "val_data": [_relative(path, folder) for path in flags.val_data],
        "icl_tasks": flags.icl_tasks and _relative(flags.icl_tasks, folder),
        "run": {"configurator": "wsds-chinchilla", "chinchilla_multiple": flags.chinchilla_multiple},
        "flags": {},
    }
    return values


def _sizes(given: Sequence[str], folder: str) -> dict[str, dict[str, Any]]:
    """Each size by its name, that of a file without .json.

    Raises:
        ConfigError: two have one name.
    """
    sizes: dict[str, dict[str, Any]] = {}
    for size in given:
        name = os.path.basename(size).removesuffix(".json") if size.endswith(".json") else size
        if name in sizes:
            raise ConfigError(f"--sizes {size}: a second size called {name}. Rename the file, or leave one out.")
        sizes[name] = _size(size, folder)
    return sizes


def _size(size: str, folder: str) -> dict[str, Any]:
    width, times, layers = size.partition("x")
    if times and width.isdigit() and layers.isdigit():
        return {"hidden_dim": int(width), "n_layers": int(layers)}
    return {"model": _relative(size, folder)} if size.endswith(".json") else {}


def _relative(path: str, folder: str) -> str:
    return path if storage.is_remote(path) else os.path.relpath(os.path.abspath(path), folder)
