"""Evaluation flags of the trainer: validation sets and downstream tasks, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.flags import flag


@dataclass(frozen=True)
class ValidationConfig:
    """Validation"""

    val_names: tuple[str, ...] = flag((), "Name of each set in metrics; none: its --val-data.")
    val_frequency: int = flag(1, "Checkpoint intervals between two validations; 0: none while training.", least=0)
    val_every_steps: int | None = flag(
        None, "Optimizer steps between two validations; overrides --val-frequency.", least=1
    )
    global_val_batch_size: int | None = flag(
        None, "Sequences per validation batch over all ranks; None: --global-batch-size.", least=1
    )
    val_batch_size: int | None = flag(
        None, "Sequences per validation batch on each rank; sets --global-val-batch-size.", least=1
    )
    val_seq_ci: bool = flag(False, "Bootstrap interval (95 %) of the mean over sequences of their mean losses.")
    val_tok_ci: bool = flag(False, "Bootstrap interval (95 %) of the mean over tokens of their losses.")
    val_max_pop_ci: int | None = flag(
        None,
        "Values in each resample, at most; fewer than all make the interval wider. None: as many as there are.",
        least=1,
    )
    val_iter_ci: int = flag(10_000, "Resamples that an interval is drawn from.", least=1)
    val_checkpoints: tuple[str, ...] = flag(
        (),
        "Evaluate these, one after the other, without training: weights files, globs, or run folders (all their "
        "checkpoints, in order of steps). A line of results.jsonl each.",
    )
    eval_at_steps: tuple[str, ...] = flag(
        (),
        "Also validate, and score --icl-tasks, after these steps (100,1000 or 100 1000; 0 is before the first).",
        metavar="STEPS",
    )
    icl_tasks: str | None = flag(
        None, "YAML of tasks (as eval/yamls/light.yaml) to score the model on while it trains: icl/TASK/METRIC."
    )
    icl_frequency: int = flag(
        1, "Checkpoint intervals between two scorings of --icl-tasks; 0: none while training, only at the end.", least=0
    )
    icl_every_steps: int | None = flag(
        None, "Optimizer steps between two scorings of --icl-tasks; overrides --icl-frequency.", least=1
    )
