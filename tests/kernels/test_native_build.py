"""Compiling the kernels: once for all processes, and no harm where it cannot be done."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOAD = "import logging; logging.basicConfig(level=20); from open_lm.kernels.native import use_cpu_kernels as u; "
USE = LOAD + "print(u())"


def start(cache, code=USE, **env):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def outcome(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.fixture(scope="module")
def compiled():
    """A compiled library, from the cache of this machine."""
    from open_lm.kernels import native

    if not native.use_cpu_kernels():
        pytest.skip("the C++ kernels do not run here: no compiler or no AVX-512")
    native.use_cpu_kernels(False)
    return native._built()


def shim(folder, body):
    """A program that stands where the compiler is looked for."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_processes_that_start_together_compile_once(tmp_path, compiled):
    body = f'echo call >>{tmp_path}/calls; sleep 2; for last; do :; done; cp {compiled} "$last"'
    compiler = shim(tmp_path, body)
    processes = [start(tmp_path / "cache", CXX=compiler) for _ in range(2)]
    assert [outcome(p)[0] for p in processes] == ["True", "True"]
    assert (tmp_path / "calls").read_text().split() == ["call"]


def test_without_a_compiler_one_line_says_so(tmp_path):
    out, err = outcome(start(tmp_path, CXX="no-such-compiler"))
    assert out == "False"
    assert err.count("left out") == 1
    assert "Traceback" not in err


@pytest.mark.usefixtures("compiled")
def test_a_compiler_that_fails_is_quoted(tmp_path):
    out, err = outcome(start(tmp_path, CXX=shim(tmp_path, "echo cannot find vector >&2; exit 1")))
    assert out == "False"
    assert "cannot find vector" in err


@pytest.mark.usefixtures("compiled")
def test_a_library_that_does_not_load_is_left_out(tmp_path):
    compiler = shim(tmp_path, 'for last; do :; done; echo rubbish >"$last"')
    out, err = outcome(start(tmp_path, CXX=compiler))
    assert out == "False"
    assert err.count("left out") == 1


@pytest.mark.usefixtures("compiled")
def test_a_cache_that_cannot_be_written_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("")
    out, err = outcome(start(tmp_path / "file"))
    assert out == "False"
    assert "left out" in err
