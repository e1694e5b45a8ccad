"""Sampling rates of sources: told apart by markers in paths, with frequencies from a YAML file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError

UNKNOWN = "UNKNOWN"


def read_sampling(path: str, flag_name: str) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Markers and frequency of each source of a yaml file, as OpenLM's Ray tool reads it.

    `sources: [{source: NAME, markers: [part of a path, …]}, …]`, `sampling_frequencies: {NAME: number}`. UNKNOWN has no
    markers.

    Raises:
        ConfigError: the file has another form, or a frequency that is none.
    """
    import yaml

    try:
        loaded = yaml.safe_load(storage.read_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag_name} {path}: not yaml ({error}).") from None
    form = "sources: [{source: NAME, markers: [part of a path]}] and sampling_frequencies: {NAME: number}"
    try:
        markers = {str(row["source"]): [str(mark) for mark in row.get("markers") or []] for row in loaded["sources"]}
        frequencies = {str(name): float(value) for name, value in loaded["sampling_frequencies"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(f"{flag_name} {path}: need {form}.") from None
    for name, value in frequencies.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{flag_name} {path}: the frequency of {name} is {value}; give 0 or more.")
    return markers, frequencies


def source_of(url: str, markers: dict[str, list[str]]) -> str:
    """The first source one of whose markers is part of the path; UNKNOWN when none is."""
    return next((name for name, marks in markers.items() if any(mark in url for mark in marks)), UNKNOWN)


def assign(urls: Sequence[str], path: str, flag_name: str) -> dict[str, Any]:
    """The fields `sampling` and `source_of` of a job over `urls`.

    Raises:
        ConfigError: a source that a url belongs to has no frequency.
    """
    markers, frequencies = read_sampling(path, flag_name)
    names = [source_of(url, markers) for url in urls]
    for name, url in zip(names, urls, strict=True):
        if name not in frequencies:
            raise ConfigError(
                f"{flag_name} {path}: no sampling_frequencies for {name}, to which {storage.shown(url)} belongs."
            )
    used = [name for name in dict.fromkeys([*markers, UNKNOWN]) if name in names]
    return {
        "sampling": tuple((name, frequencies[name]) for name in used),
        "source_of": tuple(used.index(name) for name in names),
    }
