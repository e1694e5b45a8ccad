"""No flag is read by nothing: every field of every group is used outside its declaration."""

import dataclasses
import re
from pathlib import Path

import pytest

from open_lm.params import GROUPS

SOURCES = {path: path.read_text() for path in Path(__file__).resolve().parents[2].glob("open_lm/**/*.py")}
FLAGS = [f.name for group in GROUPS.values() for f in dataclasses.fields(group) if "help" in f.metadata]


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_read(name):
    used = re.compile(rf"(\.{name}\b|\"{name}\")")
    assert any(used.search(source) for source in SOURCES.values()), f"--{name.replace('_', '-')} is read by nothing"


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_explained(name):
    from open_lm.params import build_parser

    (action,) = [a for a in build_parser()._actions if a.dest == name]
    assert action.help and len(action.help) > 10
