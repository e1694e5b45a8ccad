"""The frame of quickstart.sh around its programs: prints, records, skips what is done, says where it stopped.

The programs themselves are stand-ins here: a `python` and a `torchrun` that only make the files they are asked for.
"""

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
    *"sys.version_info"*) exit 0 ;;
    *cpuinfo*) echo "$MACHINE" ;;
esac
[ -z "${FAILS:-}" ] || [[ "$*" != *"$FAILS"* ]] || exit 65
made=""; run=""; logs=""; intervals=""
while [ $# -gt 0 ]; do
    case $1 in
        */make_corpus.py | *make_corpus.py) kind=corpus.json ;;
        *train_tokenizer.py) kind=tokenizer.json ;;
        *make_2048.py) kind=ledger.json ;;
        *eval_openlm_ckpt.py) kind=results.json ;;
        *generate.py | *report.py) kind="" ;;
        --output-dir) made=$2/$kind ;;
        --output) made=$2${kind:+/$kind} ;;
        --logs) logs=$2 ;;
        --name) run=$2 ;;
        --num-checkpoints) intervals=$2 ;;
    esac
    shift
done
[ -z "$logs" ] || made=$logs/$run/checkpoints/epoch_$intervals.commit.json
[ -z "$made" ] || { mkdir -p "$(dirname "$made")" && echo made > "$made"; }
"""


@pytest.fixture
def quickstart(tmp_path):
    """A function that runs the script in `tmp_path` with stand-ins; further words are environment variables."""
    for name in ("python", "torchrun"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    def call(*words, **variables):
        settings = {
            "OPENLM_PYTHON": str(tmp_path / "bin/python"),
            "CALLS": str(tmp_path / "calls"),
            "MACHINE": "0 4 fp32",
        }
        (tmp_path / "calls").write_text("")
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / "quickstart.sh"), *words],
            env={**os.environ, **settings, **variables}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return call


def calls(tmp_path):
    """The programs that were run, without the looks at the interpreter and the machine."""
    lines = (tmp_path / "calls").read_text().splitlines()
    return [line for line in lines if " -c " not in line and not line.startswith(("bf16", "print"))]


def programs(tmp_path):
    return [re.findall(r"[\w/]+\.py|open_lm\.main", line)[0] for line in calls(tmp_path)]


EXPECTED = [
    "scripts/make_corpus.py", "scripts/train_tokenizer.py", "datapreprocess/make_2048.py",
    "datapreprocess/make_2048.py", "open_lm.main", "open_lm.main", "eval/eval_openlm_ckpt.py",
    "scripts/generate.py", "scripts/report.py",
]  # fmt: skip


def test_the_programs_run_in_order_and_each_is_printed_as_it_can_be_copied(quickstart, tmp_path):
    done = quickstart("out folder")
    assert done.returncode == 0, done.stderr
    assert programs(tmp_path) == EXPECTED
    printed = (tmp_path / "out folder" / "commands.txt").read_text()
    commands = [shlex.split(block.partition("\n")[2].replace("\\\n", " ")) for block in printed.strip().split("\n\n")]
    ran = [line.split(" ", 1)[1] for line in calls(tmp_path)]
    typed = [" ".join(words[3:] if words[0] == "env" else words[1:]) for words in commands]
    assert typed == ran
    for block in printed.strip().split("\n\n"):
        assert block.partition("\n")[2] in done.stdout


def test_a_second_run_repeats_nothing_but_the_report(quickstart, tmp_path):
    quickstart("out")
    before = (tmp_path / "out" / "commands.txt").read_text()
    done = quickstart("out")
    assert done.returncode == 0 and programs(tmp_path) == ["scripts/report.py"]
    assert done.stdout.count("done before") == 8
    assert (tmp_path / "out" / "commands.txt").read_text() == before


def test_a_step_that_fails_stops_the_run_and_the_next_start_goes_on_there(quickstart, tmp_path):
    done = quickstart("out", FAILS="--num-checkpoints 2")
    assert done.returncode == 65 and programs(tmp_path) == EXPECTED[:6]
    assert re.search(r"stopped in: 5\. .*bash scripts/quickstart.sh .*out", done.stderr)
    assert quickstart("out").returncode == 0 and programs(tmp_path) == EXPECTED[5:]


def test_the_second_half_resumes_the_first_and_ends_twice_as_far(quickstart, tmp_path):
    quickstart("out")
    halves = [shlex.split(line) for line in calls(tmp_path) if "open_lm.main" in line]
    tokens = [int(words[words.index("--train-tokens") + 1]) for words in halves]
    assert tokens[1] == 2 * tokens[0] and all("latest" in words for words in halves)
    assert [words[words.index("--nproc-per-node") + 1] for words in halves] == ["2", "2"]


def test_gpus_are_used_all_and_in_the_precision_the_machine_has(quickstart, tmp_path):
    quickstart("out", MACHINE="4 32 amp_bf16")
    (first, _) = [shlex.split(line) for line in calls(tmp_path) if "open_lm.main" in line]
    assert first[first.index("--nproc-per-node") + 1] == "4"
    assert first[first.index("--precision") + 1] == "amp_bf16"
    assert int(first[first.index("--global-batch-size") + 1]) % 4 == 0


def test_a_flag_instead_of_a_folder_gets_the_usage(quickstart, tmp_path):
    done = quickstart("--help")
    assert done.returncode == 2 and "usage: bash scripts/quickstart.sh [DIR]" in done.stdout
    assert not calls(tmp_path)


def test_an_interpreter_that_is_none_is_named(quickstart):
    done = quickstart("out", OPENLM_PYTHON="/no/such/python")
    assert done.returncode == 1 and "OPENLM_PYTHON=/no/such/python is not Python 3.10" in done.stderr
