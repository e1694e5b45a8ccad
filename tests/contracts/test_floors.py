"""Imports go down the floors of CONTRIBUTING.md, between rooms and inside them; files and functions stay short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "open_lm"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def read_floors(text: str) -> dict[str, dict[str, int]]:
    """`{folder: {name: floor}}` from the block of CONTRIBUTING.md: `folder/: lowest < … < highest`, names by spaces."""
    (block,) = re.findall(r"```floors\n(.*?)```", text, re.S)
    floors: dict[str, dict[str, int]] = {}
    for line in block.replace("\n  ", " ").strip().splitlines():
        folder, _, order = line.partition(": ")
        names = [(name, floor) for floor, names in enumerate(order.split(" < ")) for name in names.split()]
        assert len(dict(names)) == len(names), f"{folder} names a room twice"
        floors[folder.strip("/").replace("/", ".")] = dict(names)
    return floors


FLOORS = read_floors((ROOT / "CONTRIBUTING.md").read_text())


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imported(path: Path, *, registered: bool) -> set[str]:
    """The modules of open_lm that a file imports; with `registered` also those it names in registry strings
    ("open_lm.x:Y"), which load on use: a registry may name plug-ins of its own room."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif registered and isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value.partition(":")[0]} if ":" in node.value else set()
    return found & MODULES


def floor_pair(here: str, there: str) -> tuple[str, str, str] | None:
    """The folder that two modules share and their names in it; None where one is the other's own folder."""
    a, b = here.split("."), there.split(".")
    k = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return None if k is None else (".".join(a[:k]), a[k], b[k])


def problems(path: Path) -> list[str]:
    here, found = module_of(path), []
    for there in sorted(imported(path, registered=True)):
        pair = floor_pair(here, there)
        is_plugin = pair and pair[0] != "open_lm" and there not in imported(path, registered=False)
        if pair is None or is_plugin:
            continue
        folder, mine, other = pair
        if FLOORS[folder][other] >= FLOORS[folder][mine]:
            found.append(f"{here} imports {there}: {mine} is not above {other} in {folder}/")
    return found


def test_every_module_has_a_floor():
    for module in MODULES:
        parts = module.split(".")
        for k in range(1, len(parts)):
            folder = ".".join(parts[:k])
            assert parts[k] in FLOORS.get(folder, {}), f"CONTRIBUTING.md has no floor for {parts[k]} in {folder}/"


def test_no_floor_is_of_a_module_that_is_gone():
    known = {f"{folder}.{name}" for folder, names in FLOORS.items() for name in names}
    assert all(any(m == name or m.startswith(f"{name}.") for m in MODULES) for name in known)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(path):
    assert problems(path) == []


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    planted = PACKAGE / "train" / "step.py"
    monkeypatch.setattr(Path, "read_text", lambda self: "from open_lm.train import loop\nimport open_lm.run.run")
    assert len(problems(planted)) == 2


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_stays_readable(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 350, f"{path} has {len(lines)} lines: make it two files"
    tree = ast.parse(path.read_text())
    if lines:
        assert ast.get_docstring(tree), f"{path} does not say which question it answers"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}: {node.name} does not fit a screen"


def test_no_shell_is_ever_started_through_a_string():
    scripts = [
        *FILES,
        *(ROOT / "datapreprocess").rglob("*.py"),
        *(ROOT / "scripts").rglob("*.py"),
        *(ROOT / "eval").rglob("*.py"),
    ]
    for path in scripts:
        source = path.read_text()
        assert "shell=True" not in source and "os.system(" not in source, path
