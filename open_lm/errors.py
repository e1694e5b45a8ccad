"""Error types: every error OpenLM raises on purpose is one of these."""

from typing import TypeVar


class OpenLMError(Exception):
    """Base of all errors raised at OpenLM's borders: flags, files, shards, checkpoints, the network.

    A message has three parts: the flag or path, what was found there, and what to do.
    `exit_code` is what a command returns to the shell when the error ends it.
    """

    exit_code = 1
    on_all_ranks = False
    """Whether every rank raises it, so that they can wait for each other before they leave."""


class ConfigError(OpenLMError, ValueError):
    """A flag, a config file or a combination of them cannot be honoured."""

    exit_code = 2


class DataError(OpenLMError):
    """A text file, shard or manifest does not hold what it should."""

    exit_code = 65


class CheckpointError(OpenLMError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 66


class StorageError(OpenLMError):
    """A file could not be read or written: missing, forbidden, no space left, or the network gave up."""

    exit_code = 74


class FolderLocked(OpenLMError):
    """Another run works in this run's folder."""

    exit_code = 73


class DeviceError(OpenLMError):
    """This rank has no device to compute on, or has lost the other ranks."""

    exit_code = 71


class TrainingDiverged(OpenLMError):
    """The loss or the gradients are no longer finite; the last good checkpoint is kept."""

    exit_code = 77
    on_all_ranks = True


class Preempted(OpenLMError):
    """The run was told to stop, and did so after saving; start it again with `--resume latest`."""

    exit_code = 85
    on_all_ranks = True


Raised = TypeVar("Raised", bound=OpenLMError)


def everywhere(error: Raised) -> Raised:
    """`error`, which every rank raises at this point."""
    error.on_all_ranks = True
    return error
