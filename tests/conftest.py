"""Settings every test shares: one thread, so that tiny models do not fight over two cores; a cache of their own."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory):
    """A cache folder for the tests: nothing is found or left in the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPEN_LM_CACHE", str(tmp_path_factory.mktemp("open_lm-cache")))
        yield
