"""Wheel and sdist: what they hold and ask for, and that an installed wheel works in an empty folder."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser

import pytest
from runs import ROOT

import open_lm

ISOLATED = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def call(*words, **settings):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=600, env=ISOLATED, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    program = f"import sys; from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    call(sys.executable, "-c", program, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the sdist alone."""
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(file.read(name).decode())


def names_in(lines):
    return {re.split(r"[\s<>=\[;]", line.strip())[0].lower() for line in lines if re.match(r"[A-Za-z]", line)}


@pytest.mark.slow
def test_the_wheel_holds_every_file_that_the_package_reads(wheel):
    tracked = call("git", "ls-files", "open_lm", cwd=ROOT).split() if (ROOT / ".git").exists() else []
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    missing = [path for path in tracked if path not in held and path != "open_lm/model_configs"]
    assert not missing
    assert "open_lm/py.typed" in held


@pytest.mark.slow
def test_the_sdist_holds_what_the_suite_needs(sdist):
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "requirements-dev.txt", "Makefile", "setup.py"}
    assert needed <= held
    assert {"tests/conftest.py", "scripts/test.sh", "datapreprocess/make_2048.py", "docs/training.md"} <= held
    assert not any("__pycache__" in name for name in held)


@pytest.mark.slow
def test_the_metadata_say_what_the_package_is(metadata):
    assert metadata["Name"] == "open_lm" and metadata["Version"] == open_lm.__version__
    assert metadata["License-Expression"] == "MIT" and metadata["Requires-Python"] == ">=3.10"
    assert "# OpenLM" in metadata.get_payload() and metadata.get_all("Project-URL")
    extras = {
        "eval",
        "wandb",
        "ray",
        "parquet",
        "gpu",
        "float8",
        "s3",
        "gcs",
        "azure",
        "serve",
        "ladder",
        "test",
        "docs",
        "all",
    }
    assert set(metadata.get_all("Provides-Extra")) == extras


@pytest.mark.slow
def test_an_installed_wheel_goes_from_text_to_words_in_an_empty_folder(wheel, tmp_path):
    env, place = tmp_path / "env", tmp_path / "empty"
    call(sys.executable, "-m", "venv", "--without-pip", env)
    (site,) = env.glob("lib/python*/site-packages")
    (site / "heavy.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the like are not installed again
    call(sys.executable, "-m", "pip", "--python", env / "bin" / "python", "install", "-q", "--no-deps", wheel)
    place.mkdir()
    home = call(env / "bin" / "python", "-c", "import open_lm; print(open_lm.__file__)", cwd=place)
    assert home.startswith(str(site))
    settings = {**ISOLATED, "PATH": f"{env / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "smoke.sh"], cwd=place, env=settings, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"openlm {open_lm.__version__}" in done.stdout
    assert "python_choices/0-shot" in done.stdout and "\ndef " in done.stdout
    assert (place / "logs" / "smoke" / "checkpoints" / "epoch_1.pt").exists()


def test_the_constraints_pin_every_requirement():
    pinned = names_in((ROOT / "constraints.txt").read_text().splitlines())
    needed = names_in((ROOT / "requirements.txt").read_text().splitlines())
    for extra in ("serve", "ladder"):
        needed |= names_in((ROOT / f"requirements-{extra}.txt").read_text().splitlines())
    assert needed <= pinned


def test_the_package_and_its_extras_ask_for_ranges():
    """Exact versions are in constraints.txt: an extra that pins would replace those of its user."""
    shown = "import setuptools; setuptools.setup = lambda **asked: print(asked); __file__ = 'setup.py'; "
    asked = ast.literal_eval(call(sys.executable, "-c", f"{shown}exec(open(__file__).read())", cwd=ROOT))
    lines = [*asked["install_requires"], *(line for extra in asked["extras_require"].values() for line in extra)]
    assert len(lines) > 40 and not [line for line in lines if "==" in line.split(";")[0]]


def test_the_pins_of_all_files_are_the_same():
    pins = {}
    for path in [ROOT / "constraints.txt", *ROOT.glob("requirements*.txt")]:
        for line in path.read_text().splitlines():
            if match := re.match(r"([A-Za-z0-9_.-]+)(?:\[.*?\])?==(\S+?)(;.*)?$", line.split("#")[0].strip()):
                key = (match[1].lower().replace("_", "-"), (match[3] or "").strip())
                assert pins.setdefault(key, match[2]) == match[2], f"{path.name}: {line}"
    assert len(pins) > 20


def test_what_openlms_first_commands_need_comes_with_the_requirements():
    assert {"wandb", "boto3"} <= names_in((ROOT / "requirements.txt").read_text().splitlines())
