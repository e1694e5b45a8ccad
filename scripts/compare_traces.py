"""`openlm compare-traces` under its path in a clone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm.command import run
from open_lm.commands.compare_traces import main

if __name__ == "__main__":
    run(main)
