"""All flags of `open_lm.main` put together, and the checks that concern more than one group."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from open_lm import flags
from open_lm.checkpoint.config import CheckpointConfig
from open_lm.data.config import DataConfig
from open_lm.errors import ConfigError
from open_lm.evaluate.config import ValidationConfig
from open_lm.flags import Parser, late_names
from open_lm.model.config import ModelFlags
from open_lm.post_training.config import AdapterConfig, PreferenceConfig, RLConfig, TaskConfig
from open_lm.post_training.task_flags import check_task_flags
from open_lm.tracking.config import TrackingConfig
from open_lm.train.config import DistillationConfig, OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig

COMMAND_VARIABLE = "OPENLM_COMMAND"
"""Environment variable in which ranks find the command that a person typed."""


@dataclass(frozen=True)
class RunConfig:
    """Everything a run was asked to do: one field per group of flags."""

    data: DataConfig
    validation: ValidationConfig
    model: ModelFlags
    task: TaskConfig
    adapters: AdapterConfig
    preferences: PreferenceConfig
    rl: RLConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    distillation: DistillationConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig

    @property
    def trains(self) -> bool:
        """Whether the run trains; with --val-data alone it evaluates."""
        data = self.data
        return bool(data.train_data or data.dataset_manifest or data.dataset_type == "synthetic" or self.rl.prompts)

    def as_flags(self) -> dict[str, Any]:
        """Every flag by name, as plain values."""
        return {name: value for f in fields(self) for name, value in flags.as_flags(getattr(self, f.name)).items()}


GROUPS: dict[str, type] = {
    "data": DataConfig,
    "validation": ValidationConfig,
    "model": ModelFlags,
    "task": TaskConfig,
    "adapters": AdapterConfig,
    "preferences": PreferenceConfig,
    "rl": RLConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "distillation": DistillationConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "tracking": TrackingConfig,
}


FACTS = ("seq_len", "vocab_size", "per_gpu_batch_size", "per_gpu_val_batch_size", "world_size", "rank", "local_rank",
         "distributed")  # fmt: skip
"""Keys of params.txt beside the flags, for OpenLM's scripts; --config skips them."""


def build_parser() -> Parser:
    """The parser of `open_lm.main`."""
    parser = Parser(
        prog="open_lm.main",
        description="Train a language model on shards, or evaluate a checkpoint (--val-data alone).",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of flags; the command line wins over it.")
    for group in GROUPS.values():
        flags.add_group(parser, group)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The parsed flags; those of a `--config` file are defaults under those of the command line.

    Raises:
        ConfigError: an unknown flag (the nearest known one is named), a value of the wrong type, a bad config file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    config_only = Parser(add_help=False)
    config_only.add_argument("--config")
    path = config_only.parse_known_args(argv)[0].config
    if path:
        values = {key: value for key, value in flags.read_config_file(path).items() if key not in FACTS}
        flags.set_defaults_from(parser, values, f"--config {path}")
    return parser.parse_args(argv)


def read_config(args: Namespace) -> RunConfig:
    """The flags as one checked configuration.

    Raises:
        ConfigError: a value is out of range, or two flags contradict each other.
    """
    config = RunConfig(**{name: flags.read_group(args, group) for name, group in GROUPS.items()})
    check(config)
    return config


def check(config: RunConfig) -> None:
    """Refuse flags of different groups that cannot be honoured together."""
    check_evaluation(config)
    check_task_flags(config)
    if config.parallel.ddp_static_graph and config.train.accum_freq > 1:
        raise ConfigError(
            "--ddp-static-graph and --accum-freq above 1: torch's DDP cannot combine them. Leave one out."
        )
    if config.tracking.trace_steps and config.parallel.torchcompile:
        raise ConfigError("--trace-steps looks into modules that --torchcompile takes apart: leave one out.")
    asks_length = config.train.train_tokens or config.train.train_steps or config.train.train_num_samples
    if config.trains and not asks_length and (config.data.dataset_resampled or config.data.dataset_type == "synthetic"):
        raise ConfigError(
            "the data source is infinite: say how long to train with --train-tokens or --train-num-samples."
        )


def check_evaluation(config: RunConfig) -> None:
    """Refuse what cannot be evaluated, or asks for nothing."""
    flags, given = config.validation, config.checkpoint
    if not config.trains and not (config.data.val_data or flags.icl_tasks):
        raise ConfigError(
            "nothing to do: give --train-data or --dataset-manifest to train, or --val-data or --icl-tasks to evaluate."
        )
    if flags.val_checkpoints and (config.trains or given.resume or given.start):
        raise ConfigError("--val-checkpoints only evaluates: leave out training data, --resume and --pretrained.")
    if not config.trains and not (given.resume or given.start or flags.val_checkpoints):
        raise ConfigError(
            "--val-data alone evaluates a checkpoint: name it with --resume, --pretrained or --average, "
            "several with --val-checkpoints."
        )
    names, sets = flags.val_names, config.data.val_data
    if names and len(names) != len(sets):
        raise ConfigError(f"--val-names gives {len(names)} names for {len(sets)} --val-data: give one each, or none.")


def command_line(argv: Sequence[str] | None) -> str:
    """The command as a person would type it, for logs; ranks that `openlm train` started get it from there."""
    typed = sys.argv[1:] if argv is None else argv
    program = ["openlm", "train"] if sys.argv[0] == "openlm train" else ["python", "-m", "open_lm.main"]
    return os.environ.get(COMMAND_VARIABLE) or shlex.join([*program, *typed])


__getattr__ = late_names(__name__, "open_lm.compat.model", ("add_model_args",))
