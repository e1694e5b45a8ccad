"""Settings of every test: one thread, since tiny models fight over two cores; a cache of its own; no time limits of
hypothesis, for machines are shared; a test that hangs fails (`timeout` in pyproject.toml) and says where."""

import os
import signal
import subprocess

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory):
    """A cache folder for the tests: nothing is found or left in the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPEN_LM_CACHE", str(tmp_path_factory.mktemp("open_lm-cache")))
        yield


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_set_timer(item, settings):
    """A test that hangs tells the stacks of its process, and of all that it started, before it fails."""
    is_set = yield
    fail = signal.getsignal(signal.SIGALRM)

    def tell(number, frame):
        subprocess.run(["py-spy", "dump", "--nonblocking", "--subprocesses", "--pid", str(os.getpid())], check=False)
        fail(number, frame)

    signal.signal(signal.SIGALRM, tell)
    return is_set
