"""Walks through the code (`make walks`) stay as short as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_STOPS = {"checkpoint name": 10, "manifest": 9, "document": 32, "run length": 2}
"""Half of what each walk had at the first plan of the house (20, 18, 64, 5)."""


def test_no_walk_makes_more_stops_than_half_of_those_it_once_made():
    environment = {name: value for name, value in os.environ.items() if name != "OPENLM_FAULTS"}
    command = [sys.executable, str(ROOT / "scripts" / "walks.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    stops = {name: walk["stops"] for name, walk in json.loads(done.stdout).items()}
    longer = {name: n for name, n in stops.items() if n > MOST_STOPS[name]}
    assert stops.keys() == MOST_STOPS.keys()
    assert not longer, f"{longer} stops, at most {MOST_STOPS}: `python scripts/walks.py --list` shows where"
