"""No flag is read by nothing: every field of every group is used outside its declaration."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from open_lm.params import GROUPS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path: path.read_text() for path in ROOT.glob("open_lm/**/*.py")}
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


def test_the_page_of_flags_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("flags_page", ROOT / "scripts" / "flags_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "flags.md").read_text() == module.page(), "run `make flags`"
