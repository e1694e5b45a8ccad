"""Imports go down the floors of architecture.md, never up and never in circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "open_lm"

FLOORS = [
    {"errors"},
    {"flags", "text", "registry", "signals", "watchdog", "agreement"},
    {"storage", "distributed", "precision", "kernels", "command"},
    {"model", "data", "tracking"},
    {"train", "checkpoint"},
    {"evaluate", "generate", "hf", "loading"},
    {"post_training"},
    {
        "params",
        "run",
        "evaluations",
        "run_folder",
        "recorder",
        "build",
        "build_evaluation",
        "lengths",
        "report",
        "dry_run",
    },
    {"main", "utils", "compat"},
    {"attention", "norms", "file_utils"},
    {"ladder"},
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
ALLOWED_WITHIN_A_FLOOR = {
    ("utils", "compat"),
    ("evaluate", "loading"), ("evaluate", "generate"), ("generate", "loading"), ("hf", "loading"), ("hf", "generate"),
    ("run", "recorder"), ("run", "evaluations"), ("evaluations", "recorder"), ("evaluations", "params"),
    ("run", "run_folder"), ("run", "params"), ("run_folder", "params"),
    ("build", "params"), ("build", "run_folder"), ("build", "lengths"), ("lengths", "params"),
    ("dry_run", "build"), ("dry_run", "params"), ("dry_run", "lengths"),
    ("build_evaluation", "build"), ("build_evaluation", "params"), ("build_evaluation", "lengths"),
}  # fmt: skip


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """The `open_lm.*` modules a file names, in import statements and in registry strings ("open_lm.x:Y")."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "open_lm" else {node.module}
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("open_lm."):
            module, colon, _ = node.value.partition(":")
            found |= {module} if colon and " " not in module else set()
    return {name for name in found if name.startswith("open_lm.")}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_every_part_has_a_floor():
    assert {part_of(path) for path in FILES} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(path):
    here = part_of(path)
    for module in imported_modules(path):
        there = module.split(".")[1]
        below = FLOOR_OF[there] < FLOOR_OF[here]
        assert here == there or below or (here, there) in ALLOWED_WITHIN_A_FLOOR, (
            f"{path.name} on {here} imports {module}"
        )


def test_the_arrows_within_a_floor_make_no_circle():
    order: list[str] = []
    arrows = {
        part: {b for a, b in ALLOWED_WITHIN_A_FLOOR if a == part} for pair in ALLOWED_WITHIN_A_FLOOR for part in pair
    }
    while arrows:
        free = [part for part, targets in arrows.items() if targets <= set(order)]
        assert free, f"circle among {sorted(arrows)}"
        order += free
        arrows = {part: targets for part, targets in arrows.items() if part not in free}


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
