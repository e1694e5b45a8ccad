"""CPU back ends: memory that is kept, kernels for models that are large enough."""

import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT

from open_lm.kernels import native
from open_lm.train.backends import prepare_backends
from open_lm.train.config import ParallelConfig

FAULTS = """
import resource, sys, torch
from open_lm.train.backends import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
for _ in range(10):  # until the heap has grown to its size
    torch.empty(1 << 24).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(1 << 24).fill_(1)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how, **env):
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment = {**plain, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_is_kept_is_not_fetched_again():
    kept, few = faults("keep")
    _, many = faults("leave")
    assert kept
    assert few < many / 10


def test_who_sets_the_allocator_keeps_his_settings():
    assert faults("keep", MALLOC_ARENA_MAX="4")[0] is False


@pytest.mark.parametrize(
    ("device", "vocab", "choice", "expected"),
    [("cpu", 1 << 16, "auto", True), ("cpu", 16, "auto", False), ("cpu", 1 << 16, "off", False),
     ("cuda", 1 << 16, "auto", False)],
)  # fmt: skip
def test_kernels_are_used_on_cpus_for_models_that_are_not_tiny(monkeypatch, device, vocab, choice, expected):
    if not native.use_cpu_kernels():
        pytest.skip("the C++ kernels do not run here: no compiler or no AVX-512")
    monkeypatch.setattr("open_lm.train.backends.keep_freed_memory", lambda: False)  # it would stay for other tests
    prepare_backends(ParallelConfig(cpu_kernels=choice), torch.device(device), 64, vocab)
    assert native.in_use() is expected
    native.use_cpu_kernels(False)
