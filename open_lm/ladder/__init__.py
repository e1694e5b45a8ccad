"""Ladders of models: plan sizes, train them, and fit the law that predicts the next one."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_lm.ladder.batches import DeviceMeshSpec
    from open_lm.ladder.config import LadderConfig, read_ladder
    from open_lm.ladder.ladder import ModelLadder
    from open_lm.ladder.plots import plot_lr_schedule
    from open_lm.ladder.run_configurator import RunCheckpointInfo, RunConfigurator, WSDSChinchillaRunConfigurator
    from open_lm.ladder.sizes import ModelConfigurator

__all__ = [
    "DeviceMeshSpec",
    "LadderConfig",
    "ModelConfigurator",
    "ModelLadder",
    "RunCheckpointInfo",
    "RunConfigurator",
    "WSDSChinchillaRunConfigurator",
    "plot_lr_schedule",
    "read_ladder",
]
MODULES = {
    "DeviceMeshSpec": "batches",
    "LadderConfig": "config",
    "ModelConfigurator": "sizes",
    "ModelLadder": "ladder",
    "RunCheckpointInfo": "run_configurator",
    "RunConfigurator": "run_configurator",
    "WSDSChinchillaRunConfigurator": "run_configurator",
    "plot_lr_schedule": "plots",
    "read_ladder": "config",
}
"""The module of each name; importing the folder alone (for `openlm ladder --help`) loads none of them."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'open_lm.ladder' has no attribute {name!r}")
    return getattr(importlib.import_module(f"open_lm.ladder.{MODULES[name]}"), name)
