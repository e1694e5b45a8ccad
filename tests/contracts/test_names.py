"""Two things never share a name: every class, and every type given a name, is the only one in open_lm that has it."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "open_lm"
OTHERS_NAMES = ("hf", "compat", "utils")
"""Rooms whose names are not ours to choose: hf/ is copied beside exported weights, runs without the package and
has the model's names; the others keep the names that people's code imports from OpenLM."""


def named_types(source: str) -> list[str]:
    """The classes of a file, inner ones too, and the types that it gives a name (`Loss = Callable[…]`); a leading
    underscore is no part of a name."""
    tree = ast.parse(source)
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id.lstrip("_")[:1].isupper() and not target.id.isupper():
            found.append(target.id)
    return [name.lstrip("_") for name in found]


def shared_names(sources: dict[str, str]) -> dict[str, list[str]]:
    """Names that stand for several types, with the files of each."""
    files = defaultdict(list)
    for path, source in sources.items():
        for name in named_types(source):
            files[name].append(path)
    return {name: found for name, found in files.items() if len(found) > 1}


def test_no_two_types_share_a_name():
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(files) > 250
    assert shared_names({path: text for path, text in files.items() if path.split("/")[0] not in OTHERS_NAMES}) == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("class Rows: ...", "class Rows: ..."),
        ("class Rows: ...", "class _Rows: ..."),
        ("class Rows: ...", "def build():\n    class Rows: ..."),
        ("Rows = dict[str, int]", "class Rows: ..."),
        ("Rows: TypeAlias = int", "Rows = str"),
    ],
)
def test_a_shared_name_is_seen(one, other):
    assert shared_names({"a.py": one, "b.py": other}) == {"Rows": ["a.py", "b.py"]}
    assert shared_names({"a.py": one, "b.py": "class Columns: ...\nROWS = 3"}) == {}
