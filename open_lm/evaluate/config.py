"""On what and how often a model is evaluated while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.flags import flag


@dataclass(frozen=True)
class ValidationConfig:
    """Validation"""

    val_names: tuple[str, ...] = flag((), "Name of each set in metrics; none: its --val-data.")
    val_frequency: int = flag(1, "Checkpoint intervals between two validations; 0: none while training.", least=0)
    val_every_steps: int | None = flag(
        None, "Optimizer steps between two validations; sets --val-frequency aside.", least=1
    )
    global_val_batch_size: int | None = flag(
        None, "Sequences per validation batch over all ranks; None: --global-batch-size.", least=1
    )
    val_batch_size: int | None = flag(
        None, "Sequences per validation batch on each rank; sets --global-val-batch-size.", least=1
    )
    icl_tasks: str | None = flag(
        None, "YAML of tasks (as eval/yamls/light.yaml) to score the model on while it trains: icl/TASK/METRIC."
    )
    icl_frequency: int = flag(
        1, "Checkpoint intervals between two scorings of --icl-tasks; 0: none while training, only at the end.", least=0
    )
    icl_every_steps: int | None = flag(
        None, "Optimizer steps between two scorings of --icl-tasks; sets --icl-frequency aside.", least=1
    )
