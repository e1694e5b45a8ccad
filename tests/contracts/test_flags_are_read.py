"""No flag is read by nothing: each field of each group is used, on an object of that group, outside its declaration."""

import ast
import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm.params import GROUPS, build_parser
from open_lm.train.config import IGNORED

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [(group, f.name) for group in GROUPS.values() for f in dataclasses.fields(group) if "help" in f.metadata]
ALSO = {"ModelFlags": ("ModelConfig", "HFConfig", "MambaConfig")}
"""Groups whose fields become fields of other classes under the same names."""
WARNED = ("moe_weight_parallelism", "moe_expert_model_parallelism", "remote_sync_protocol")
"""Of the old system, without meaning here: declaring groups say so when they are given."""
PLANTED = '    name: str = flag("", "Planted: read by nothing, though another group has a flag of this name.")\n'


@pytest.fixture(scope="module")
def read_fields(tmp_path_factory):
    """`{(class, field)}` that mypy sees read outside declarations and `__post_init__`, with a dead flag planted."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "open_lm", tree / "open_lm", ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    config = tree / "open_lm" / "train" / "config.py"
    config.write_text(config.read_text().replace('    """Optimizer"""\n\n', f'    """Optimizer"""\n\n{PLANTED}'))
    assert PLANTED in config.read_text()
    plugin = Path(__file__).with_name("record_attributes.py")
    settings = ("python_version = 3.11", "ignore_missing_imports = true", "check_untyped_defs = true")
    (tree / "mypy.ini").write_text("\n".join(["[mypy]", *settings, f"plugins = {plugin}"]))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "/dev/null", "open_lm"]
    printed = subprocess.run(command, cwd=tree, capture_output=True, text=True).stdout
    found = re.findall(r"^ATTRIBUTE \S+\.(\w+)\.(\w+) (\S+):(\d+)$", printed, re.M)
    assert len(found) > 1000, printed[-2000:]
    declared = {path: declaring_lines(tree / path) for path in {path for _, _, path, _ in found}}
    return {(owner, name) for owner, name, path, line in found if int(line) not in declared[path]}


def declaring_lines(path):
    """The lines of class bodies outside methods, and of every `__post_init__`."""
    lines = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                is_method = isinstance(part, ast.FunctionDef) and part.name != "__post_init__"
                lines |= set() if is_method else set(range(part.lineno, part.end_lineno + 1))
    return lines


@pytest.mark.slow
def test_every_flag_is_read_and_a_dead_one_is_seen(read_fields):
    dead = [
        f"{group.__name__}.{name}"
        for group, name in FLAGS
        if not any((owner, name) in read_fields for owner in (group.__name__, *ALSO.get(group.__name__, ())))
    ]
    assert [name for name in dead if name.partition(".")[2] not in (*IGNORED, *WARNED)] == []
    assert ("OptimizerConfig", "name") not in read_fields
    assert ("TrackingConfig", "name") in read_fields


@pytest.mark.parametrize("name", [name for _, name in FLAGS])
def test_every_flag_is_explained(name):
    (action,) = [a for a in build_parser()._actions if a.dest == name]
    assert action.help and len(action.help) > 10


def test_the_page_of_flags_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("flags_page", ROOT / "scripts" / "flags_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "flags.md").read_text() == module.page(), "run `make flags`"
