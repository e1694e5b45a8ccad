"""A short soak (rows 3, 41); `make soak` is the long one."""

import pytest
from faults.soak import soak


@pytest.mark.slow
def test_twelve_kills_lose_nothing(tmp_path):
    seen = soak(tmp_path, 12, seed=12, say=lambda *_, **__: None)
    assert seen["kills"] >= 12 and seen["lost"] == 0
