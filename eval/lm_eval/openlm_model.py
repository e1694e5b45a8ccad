"""Registers `--model openlm` with lm_eval's own command: openlm.yaml beside this file names the class below."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from open_lm.evaluate.lm_harness.adapter import OpenLMHarness

__all__ = ["OpenLMHarness"]
