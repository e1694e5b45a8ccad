"""Counts of the house (`make house`): modules, floors, arrows between rooms, the longest chain of imports, long files.

`--floors` prints the lowest floor each room and file could stand on, in the form of CONTRIBUTING.md's block.
"""

import argparse
import ast
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "open_lm"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")

Floors = dict[str, dict[str, int]]


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imported(path: Path, *, registered: bool = False) -> set[str]:
    """The modules of open_lm that a file imports; with `registered` also those it names in registry strings
    ("open_lm.x:Y"), which load on use."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif registered and isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            found.add(node.value.partition(":")[0])
    return found & MODULES


def shared_folder(here: str, there: str) -> tuple[str, str, str] | None:
    """The folder that two modules share and their names in it; None where one is the other's own folder."""
    a, b = here.split("."), there.split(".")
    k = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return None if k is None else (".".join(a[:k]), a[k], b[k])


def read_floors(text: str) -> Floors:
    """`{folder: {name: floor}}` from the block of CONTRIBUTING.md: `folder/: lowest < … < highest`, names by spaces."""
    (block,) = re.findall(r"```floors\n(.*?)```", text, re.S)
    floors: Floors = {}
    for line in block.replace("\n  ", " ").strip().splitlines():
        folder, _, order = line.partition(": ")
        names = [(name, floor) for floor, names in enumerate(order.split(" < ")) for name in names.split()]
        assert len(dict(names)) == len(names), f"{folder} names a room twice"
        floors[folder.strip("/").replace("/", ".")] = dict(names)
    return floors


def arrows() -> dict[str, set[tuple[str, str]]]:
    """`{folder: {(name, name it imports)}}`, for the package and for every folder in it."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in FILES:
        for there in imported(path):
            pair = shared_folder(module_of(path), there)
            if pair is not None:
                found.setdefault(pair[0], set()).add(pair[1:])
    return found


def lowest_floors() -> Floors:
    """Each name's lowest possible floor, counted from 1."""
    floors: Floors = {}
    for module in MODULES:
        parts = module.split(".")
        for k in range(1, len(parts)):
            floors.setdefault(".".join(parts[:k]), {})[parts[k]] = 1
    for folder, pairs in arrows().items():
        names = floors[folder]
        for _ in names:
            for name, target in pairs:
                names[name] = max(names[name], names[target] + 1)
        assert max(names.values()) <= len(names), f"a circle in {folder}"
    return floors


def longest_chain() -> list[str]:
    """The longest chain of modules in which each imports the next."""
    graph = {module_of(path): imported(path) for path in FILES}
    best: dict[str, list[str]] = {}

    def chain(module: str) -> list[str]:
        if module not in best:
            best[module] = []  # a package that imports its own module back adds nothing
            below = (chain(other) for other in graph[module] if other != module)
            best[module] = [module, *max(below, key=len, default=[])]
        return best[module]

    return max((chain(module) for module in MODULES), key=len)


def shown(floors: Floors) -> str:
    """Floors as CONTRIBUTING.md writes them."""
    lines = []
    for folder in sorted(floors, key=lambda folder: (folder != "open_lm", folder)):
        names = floors[folder]
        by_floor: Iterable[str] = (
            " ".join(sorted(name for name in names if names[name] == floor)) for floor in sorted(set(names.values()))
        )
        line = f"{folder.replace('.', '/')}/: {' < '.join(by_floor)}"
        lines += ["\n  ".join(textwrap.wrap(line, 112, break_long_words=False, break_on_hyphens=False))]
    return "\n".join(lines)


def main() -> None:
    """Print the counts, or the floors."""
    parser = argparse.ArgumentParser(prog="house.py", description="Counts of the house")
    parser.add_argument("--floors", action="store_true", help="Print the lowest possible floors instead.")
    if parser.parse_args().floors:
        print(shown(lowest_floors()))
        return
    floors, all_arrows = lowest_floors(), arrows()
    sizes = {path: len(path.read_text().splitlines()) for path in FILES}
    chain = longest_chain()
    print(f"modules {len(FILES)}, of them at the top {sum(path.parent == PACKAGE for path in FILES)}")
    print(f"rooms {len(floors['open_lm'])}, floors {max(floors['open_lm'].values())}")
    print(f"arrows between rooms {len(all_arrows['open_lm'])}, inside them {sum(map(len, all_arrows.values()))} in all")
    print(f"longest chain of imports {len(chain)}: {' > '.join(name.removeprefix('open_lm.') for name in chain)}")
    print(f"lines a file: median {sorted(sizes.values())[len(sizes) // 2]}, longest {max(sizes.values())}")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
