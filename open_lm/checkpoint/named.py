"""Which architecture --model means: a registered one, a JSON file, or the one that a folder or the Hub states."""

from __future__ import annotations

from open_lm.checkpoint.contents import stored_config
from open_lm.checkpoint.hub import is_hub
from open_lm.checkpoint.sources import is_transformers_folder
from open_lm.model.config import ModelConfig, ModelFlags, resolve


def architecture_named(flags: ModelFlags) -> ModelConfig:
    """The architecture that the flags name; hf://owner/name and folders of transformers state all of it themselves.

    Raises:
        ConfigError: no such model, or a key out of range.
        CheckpointError: the repository or folder says nothing of an architecture, or one that we cannot express.
        StorageError: it cannot be downloaded.
    """
    name = flags.model
    if name is None or not (is_hub(name) or is_transformers_folder(name)):
        return resolve(flags)
    return ModelConfig.from_dict(stored_config(name)["model"], f"--model {name}")
