"""Installation by scripts/environment.sh; pip, venv and nvidia-smi are stand-ins that record their calls."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    *"sys.version_info"*) exit "${TOO_OLD:-0}" ;;
    *"import torch"*) [ -e "$HOME/torch" ] ;;
    *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *--dry-run*) echo "{\"install\": [{\"metadata\": {\"version\": \"$OFFER\"}}]}" ;;
    *"import json"*) sed 's/.*version\": \"//; s/\".*//' ;;
    *hashlib*) cksum < "${@: -1}" ;;
    *"pip install"*) words="$*"; echo "${words#-m }" >> "$HOME/calls"
         [ -z "${FAILS:-}" ] || [[ "$*" != *"$FAILS"* ]] ;;
    --version) echo "Python 3.12.0" ;;
esac
"""


@pytest.fixture
def prepare(tmp_path):
    """A function that prepares the environment of an empty clone and returns (process, calls of pip install)."""
    (tmp_path / "clone" / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "clone" / "scripts")
    (tmp_path / "clone" / "requirements.txt").write_text("torch\n")

    def stand_in(name, content):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    def call(*, offer="2.13.0+cpu", gpu=False, system="Linux", **variables):
        for name in ("python3", "python3.13", "python3.12", "python3.11", "python3.10", "python"):
            stand_in(name, PYTHON)
        stand_in("nvidia-smi", "#!/bin/sh\necho 'GPU 0: H200'\n" if gpu else "#!/bin/sh\nexit 9\n")
        stand_in("uname", f"#!/bin/sh\necho {system}\n")
        (tmp_path / "calls").write_text("")
        settings = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "OFFER": offer, **variables}
        line = 'source clone/scripts/environment.sh; ensure_environment requirements.txt; echo "$PYTHON"'
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=30
        )
        return done, (tmp_path / "calls").read_text().splitlines()

    return call


def requirements(tmp_path):
    return f"pip install -r {tmp_path}/clone/requirements.txt"


def test_without_a_gpu_the_cpu_build_on_offer_comes_first(prepare, tmp_path):
    done, calls = prepare()
    assert done.returncode == 0, done.stderr
    assert calls == ["pip install torch==2.13.0", requirements(tmp_path)]
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/clone/.venv/bin/python"


def test_where_only_the_cuda_build_is_on_offer_the_cpu_index_is_asked(prepare, tmp_path):
    _, calls = prepare(offer="2.13.0")
    index = "--index-url https://download.pytorch.org/whl/cpu"
    assert calls == [f"pip install torch==2.13.0 {index}", requirements(tmp_path)]


def test_a_cpu_index_that_cannot_be_reached_is_said_and_the_default_build_taken(prepare, tmp_path):
    done, calls = prepare(offer="2.13.0", FAILS="index-url")
    assert done.returncode == 0 and "cannot be reached" in done.stdout
    assert calls[-1] == requirements(tmp_path)


@pytest.mark.parametrize("machine", [{"gpu": True}, {"system": "Darwin"}])
def test_with_a_gpu_or_on_a_mac_the_default_build_is_right(prepare, tmp_path, machine):
    _, calls = prepare(offer="2.13.0", **machine)
    assert calls == [requirements(tmp_path)]


def test_nothing_is_installed_twice_until_the_requirements_change(prepare, tmp_path):
    prepare()
    (tmp_path / "torch").touch()
    done, calls = prepare()
    assert (done.returncode, calls, len(done.stdout.splitlines())) == (0, [], 1)
    (tmp_path / "clone" / "requirements.txt").write_text("torch\nnumpy\n")
    assert prepare()[1] == [requirements(tmp_path)]


def test_an_install_that_fails_says_so_and_is_tried_again(prepare, tmp_path):
    done, _ = prepare(FAILS="requirements.txt")
    assert done.returncode == 1 and "pip install -r requirements.txt went wrong" in done.stderr
    assert requirements(tmp_path) in prepare()[1]


def test_a_machine_without_a_new_enough_python_is_told_what_to_do(prepare):
    done, calls = prepare(TOO_OLD="1")
    assert done.returncode == 1 and "no Python 3.10 or newer" in done.stderr and not calls
