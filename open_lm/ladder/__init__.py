"""Ladders of models: plan sizes, train them, and fit the law that predicts the next one."""

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
