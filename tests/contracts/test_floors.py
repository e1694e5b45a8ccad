"""Imports go down the floors of CONTRIBUTING.md, between rooms and inside them; files and functions stay short."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "open_lm"


def load_house():
    spec = importlib.util.spec_from_file_location("house", ROOT / "scripts" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOUSE = load_house()
FILES, MODULES = HOUSE.FILES, HOUSE.MODULES
FLOORS = HOUSE.read_floors((ROOT / "CONTRIBUTING.md").read_text())


def problems(path: Path) -> list[str]:
    """Imports of a file that do not go down; a registry may name plug-ins of its own room."""
    here, found = HOUSE.module_of(path), []
    plain = HOUSE.imported(path)
    for there in sorted(HOUSE.imported(path, registered=True)):
        shared = HOUSE.shared_folder(here, there)
        if shared is None or (shared[0] != "open_lm" and there not in plain):
            continue
        folder, mine, other = shared
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


OTHERS_NAMES = {"attention", "file_utils", "norms"}
"""Modules at the top that only keep names for people's code."""


def test_the_top_of_the_package_stays_small():
    top = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} - OTHERS_NAMES
    assert len(top) <= 12, sorted(top)
