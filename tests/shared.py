"""Fixtures outside the repository, and the mark for tests that need them."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "fixtures").is_dir(), reason=f"no shared fixtures at {SHARED}")
