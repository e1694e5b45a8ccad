"""Tables of a ladder's metrics: a data frame of its checkpoints and of other run folders, and its files."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from typing import Any

from open_lm import storage
from open_lm.checkpoint.commit import committed
from open_lm.errors import ConfigError, OpenLMError
from open_lm.ladder import records
from open_lm.ladder.run_configurator import POST_DECAY
from open_lm.ladder.science import pandas
from open_lm.ladder.sizes import count_params
from open_lm.model.config import ModelConfig
from open_lm.model.describe import model_size

FIRST = ("name", "step", "tokens", "size", "num_params", "flops", "loss", "description", "counting", "train_flops")
RUN_FOLDER = "run folder"
"""Description of a row that no ladder promised."""
SMOOTHED_SHARE = 0.01
"""Share of an ordinary run over which its training loss is averaged; its schedule is not known here."""
FORMATS = (".csv", ".json", ".pkl")


def frame_of(rows: Sequence[dict[str, Any]]) -> Any:
    """The rows as a data frame, the columns of the ladder first, sorted by size and tokens."""
    frame = pandas().DataFrame(list(rows))
    if not len(frame):
        return pandas().DataFrame(columns=list(FIRST))
    columns = [name for name in FIRST if name in frame] + sorted(name for name in frame if name not in FIRST)
    return frame[columns].sort_values(["num_params", "name", "tokens"], kind="stable").reset_index(drop=True)


def is_metrics(frame: Any) -> bool:
    """Whether a table is one that `metrics` wrote."""
    return set(FIRST) <= set(frame)


def finished(frame: Any, all_checkpoints: bool = False) -> Any:
    """The rows of metrics that a law is fitted to: the ends of decays, for a model inside one is not finished.

    Of other run folders it is their last step. No power law says what a model knows before its first step.
    """
    last = frame.groupby(["name", "num_params"])["tokens"].transform("max") == frame["tokens"]
    ends = frame["description"].str.endswith(POST_DECAY) | ((frame["description"] == RUN_FOLDER) & last)
    trained = frame["tokens"] > 0
    kept = frame[trained & (ends | all_checkpoints)]
    if len(kept) < len(frame):
        logging.warning(
            "%d of %d rows of the metrics are left out: %d of step 0, %d inside a run (--all-checkpoints takes these).",
            len(frame) - len(kept), len(frame), (~trained).sum(), len(frame) - len(kept) - (~trained).sum(),
        )  # fmt: skip
    if "valid/loss" not in kept or kept["valid/loss"].isna().all():
        logging.warning(
            "the ladder has no val_data: its law is fitted to the training loss, the mean at a decay's end."
        )
    return kept.set_index(kept["size"].astype(str) + " " + kept["description"].str.removesuffix(f" {POST_DECAY}"))


def discovered(roots: Sequence[str], prefix: str, counting: str, known: Collection[str]) -> list[dict[str, Any]]:
    """Rows of the run folders in `roots` whose names begin with `prefix`, but for those with a path in `known`."""
    rows: list[dict[str, Any]] = []
    for root in roots:
        for folder in records.run_folders(root):
            absolute = folder if storage.is_remote(folder) else os.path.abspath(folder)
            if absolute not in known and os.path.basename(folder).startswith(prefix):
                rows += run_rows(folder, counting)
    return rows


def run_rows(folder: str, counting: str) -> list[dict[str, Any]]:
    """A row for each step of an ordinary run folder that was validated or scored, else for its last step."""
    logged = records.metrics_by_tokens(folder)
    architecture = _architecture(folder)
    if architecture is None or not logged:
        return []
    n_params, size = count_params(architecture, counting), model_size(architecture)
    measured = [place for place, row in logged.items() if any(k.startswith(("valid/", "icl/")) for k in row)]
    rows = []
    for place in sorted(measured or [max(logged)]):
        tokens, trained = round(place), records.smoothed_loss(logged, place, SMOOTHED_SHARE * place)
        rows.append(
            {
                "name": os.path.basename(folder),
                "step": logged[place]["step"],
                "description": RUN_FOLDER,
                "tokens": tokens,
                "size": os.path.basename(folder),
                "num_params": n_params,
                "counting": counting,
                "flops": 6 * n_params * tokens,
                "train_flops": size.flops_per_token * tokens,
                "loss": logged[place].get("valid/loss", trained),
                "train/loss_smoothed": trained,
                **logged[place],
            }
        )
    return rows


def _architecture(folder: str) -> ModelConfig | None:
    """The architecture in the newest checkpoint of a run folder."""
    for commit in committed(storage.join(folder, records.CHECKPOINTS)):
        try:
            return ModelConfig.from_dict(commit.facts["config"]["model"])
        except (KeyError, OpenLMError):
            continue
    return None


def write_table(frame: Any, path: str) -> None:
    """Write a data frame where and as the ending of `path` says.

    Raises:
        ConfigError: another ending.
    """
    ending = os.path.splitext(path)[1]
    if ending not in FORMATS:
        raise ConfigError(f"--output {path}: need a name that ends in {', '.join(FORMATS)}.")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if ending == ".csv":
        storage.write_text(path, frame.to_csv(index=False))
    elif ending == ".json":
        storage.write_text(path, frame.to_json(orient="records", indent=1))
    else:
        frame.to_pickle(path)
