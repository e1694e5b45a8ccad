"""Tracking flags: the run's name, folder, log and metric sinks."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import Registry, flag, parse_steps

SINKS = Registry(
    "sink",
    {
        "jsonl": "open_lm.tracking.jsonl:JsonlSink",
        "csv": "open_lm.tracking.csv:CsvSink",
        "tensorboard": "open_lm.tracking.tensorboard:TensorboardSink",
        "wandb": "open_lm.tracking.wandb:WandbSink",
    },
)
ALWAYS = ("jsonl", "csv")
OPTIONAL_SINKS = tuple(name for name in SINKS if name not in ALWAYS)


@dataclass(frozen=True)
class TrackingConfig:
    """Run folder, logs and metrics"""

    name: str | None = flag(None, "Name of the run: one path component. None: made from the time and the settings.")
    logs: str = flag(
        "./logs/",
        "Folder that holds a folder for each run. Before Python 3.12 torchrun takes --logs for its own flag: "
        "write --logs-dir there.",
        aliases=("--logs-dir",),
    )
    log_local: bool = flag(False, "Every rank writes a log of its own (out-RANK.log).")
    log_every_n_steps: int = flag(100, "Optimizer steps between two reports.")
    log_logit_mean: bool = flag(False, "Also report train/logit_mean, the mean logit.")
    report_to: str = flag(
        "", "Where metrics go besides metrics.jsonl and .csv: wandb, tensorboard, both with a comma, or all."
    )
    wandb_project_name: str = flag("open-lm", "Project on Weights & Biases.")
    wandb_notes: str = flag("", "Notes of the run on Weights & Biases.")
    peak_tflops: float | None = flag(
        None, "TFLOP/s of one device at best, for train/mfu. None: from a table; no train/mfu for devices not in it."
    )
    profile_steps: tuple[str, ...] = flag(
        (), "Write a chrome trace of these steps (10-12) on every rank, to profile/ in the run folder.", metavar="STEPS"
    )
    trace_steps: tuple[str, ...] = flag(
        (),
        "Store the inputs and outputs of every module in these steps (1,5-7), to traces/ in the run folder; "
        "`openlm compare-traces` finds where two runs part.",
        metavar="STEPS",
    )
    copy_codebase: bool = flag(False, "Copy the code that runs to code/ in the run folder.")
    dry_run: bool = flag(False, "Print what the run would do (flags, size, steps, tokens, learning rates) and stop.")
    debug: bool = flag(False, "Log in detail.")

    def __post_init__(self) -> None:
        unknown = set(self.sinks) - set(SINKS)
        if unknown:
            raise ConfigError(
                f"--report-to {self.report_to}: unknown {', '.join(unknown)}; "
                f"choose of {', '.join(OPTIONAL_SINKS)}, all."
            )
        parse_steps(self.profile_steps, "--profile-steps")
        parse_steps(self.trace_steps, "--trace-steps")
        if self.log_every_n_steps < 1:
            raise ConfigError(f"--log-every-n-steps {self.log_every_n_steps} must be at least 1.")
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name or "\0" in self.name):
            raise ConfigError(f"--name {self.name!r} must be one path component; set the folder with --logs.")

    @property
    def sinks(self) -> tuple[str, ...]:
        """The sinks to open: metrics.jsonl and metrics.csv always, then those of --report-to."""
        asked = OPTIONAL_SINKS if self.report_to == "all" else self.report_to.split(",")
        return (*ALWAYS, *(name.strip() for name in asked if name.strip()))
