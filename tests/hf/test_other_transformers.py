"""The tests of transformers' classes and folders hold with transformers 4.57 too, in an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = "4.57.6"
FILES = ("test_published_folders.py",)


@pytest.fixture(scope="module")
def other_python(tmp_path_factory):
    """An interpreter with that version: OPENLM_TRANSFORMERS_PYTHON, or one of an environment made here."""
    if named := os.environ.get("OPENLM_TRANSFORMERS_PYTHON"):
        return named
    folder = tmp_path_factory.mktemp("environment") / "transformers"
    script = ROOT / "scripts" / "transformers_environment.sh"
    made = subprocess.run(
        ["bash", str(script), VERSION, str(folder)], env={**os.environ, "PYTHON": sys.executable}, capture_output=True,
        text=True,
    )  # fmt: skip
    if made.returncode != 0:
        pytest.skip(f"transformers {VERSION} cannot be installed here: {made.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin" / "python")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_they_pass(other_python, file):
    done = subprocess.run(
        [other_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/hf/{file}"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
