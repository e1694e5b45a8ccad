"""The C++ kernels for CPUs: compiled once per machine into a cache folder, loaded where they run, missed by nobody.

They need g++ and a CPU with AVX-512. Without, plain torch computes the same, and one line in the log says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from open_lm.kernels import operators  # noqa: F401  (the library implements what it declares)

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-fopenmp", "-shared", "-w")
BUILD_SECONDS = 600
_loaded = False
_in_use = False


def use_cpu_kernels(wanted: bool = True) -> bool:
    """Let the operators of this package compute with the C++ kernels in this process, or no longer.

    Returns whether they now do. The first call on a machine compiles them, for about 10 seconds of one core.
    """
    global _loaded, _in_use
    if wanted and not _loaded:
        try:
            torch.ops.load_library(str(_built()))
            _try_out()
            _loaded = True
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            logging.info("C++ kernels for the CPU are left out, torch's own are used: %s", _first_lines(error))
    _in_use = wanted and _loaded
    return _in_use


def in_use() -> bool:
    """Whether the C++ kernels may be called."""
    return _in_use


def _built() -> Path:
    """The compiled library, made if it is not in the cache.

    Raises:
        OSError: this machine cannot run or build it, or the cache cannot be written.
        SubprocessError: the compiler failed.
    """
    if platform.system() != "Linux" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise OSError(f"they need Linux and AVX-512, this is {torch.backends.cpu.get_cpu_capability()}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    folder = cache_folder()
    library = folder / f"cpu-{_fingerprint(compiler)}.so"
    if library.exists():
        return library
    if compiler is None:
        raise OSError("no g++ found")
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        if not library.exists():  # another process may have made it meanwhile
            logging.info("compiling the C++ kernels for this CPU into %s, once", folder)
            _compile(compiler, library)
    return library


def cache_folder() -> Path:
    """The folder of compiled kernels: `open_lm/` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open_lm"


def _fingerprint(compiler: str | None) -> str:
    """A digest of all that the library depends on: the sources, torch, the compiler and this CPU."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    digest.update(repr((torch.__version__, compiler, FLAGS, cpu)).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the lock of one that dies is free again."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        out = os.path.join(folder, library.name)
        command = [compiler, *FLAGS, abi, *includes, str(SOURCES / "library.cpp"), *libraries, "-o", out]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        os.replace(out, library)


def _first_lines(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    return " ".join(said.strip().splitlines()[:2])


def _try_out() -> None:
    """Use what was loaded once.

    Raises:
        RuntimeError: torch has no matrix products in this type for this CPU, or the result is wrong.
    """
    x = torch.linspace(-2, 2, 40 * 16).sin().reshape(1, 2, 40, 8)
    exact = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        mixed, _ = torch.ops.open_lm.attention_forward(*[x.transpose(1, 2).to(dtype)] * 3)
        if not torch.allclose(mixed.float(), exact, rtol=2e-2, atol=2e-2):
            raise RuntimeError(f"what they compute in {dtype} is wrong")
