"""The day with a GPU, rehearsed on the CPU: every command of scripts/gpu_day.sh works and the page has its figures."""

import os
import re
import subprocess
import sys

import pytest
from runs import ROOT

SECTIONS = (
    "Tests",
    "Loss and attention kernels",
    "Step beside transformers",
    "Time, utilisation and memory, small model",
    "Time, utilisation and memory, large model",
    "Meshes of all devices",
    "A run, its utilisation and saves",
    "Generation",
)


@pytest.mark.slow
def test_every_command_of_the_day_with_a_gpu_works_in_its_dry_form(tmp_path):
    page = tmp_path / "figures.md"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_day.sh"), "--dry", str(page)], capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    text = page.read_text()
    assert done.returncode == 0, text[-5000:] + done.stderr[-2000:]
    assert tuple(re.findall(r"^## (.*)$", text, re.M)) == SECTIONS
    assert text.count("\nexit 0 after") == len(SECTIONS)
    assert len(re.findall(r"^\| (?:dp|fsdp)=\S+ \| \S+ \| [\d.]+ \|", text, re.M)) >= 8  # lines of steps


def test_the_parts_of_the_day_take_forty_minutes_at_most():
    script = (ROOT / "scripts/gpu_day.sh").read_text()
    limits = [int(n) for n in re.findall(r'^ *(?:run|step) "[^"]+" (\d+) ', script, re.M)]
    assert len(limits) == len(SECTIONS) and sum(limits) <= 2400


def test_the_hidden_share_of_communication_is_what_other_kernels_cover():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from mesh_step import hidden_share

    assert hidden_share([(0, 10)], [(2, 4), (3, 5), (9, 20)]) == (10, 0.4)
    assert hidden_share([(4, 6), (0, 2), (5, 8)], []) == (6, 0.0)
    assert hidden_share([], [(1, 2)]) == (0, 0)
