"""scripts/post_training.sh: its commands and flags exist, its order is right, and its questions are what it says.

The programs are a stand-in here that records what it is asked for; docs/post-training.md has the figures of a real run.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import stat
import subprocess
import sys

import pytest
from runs import ROOT

from open_lm.__main__ import call
from open_lm.post_training import verifiers

STAND_IN = """#!{python}
import json, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def recipe(tmp_path):
    """A function that runs the script on `tmp_path`/quickstart and gives the commands it asked for."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN.format(python=sys.executable, calls=str(calls)))
    python.chmod(python.stat().st_mode | stat.S_IEXEC)

    def run():
        calls.write_text("")
        words = ["bash", str(ROOT / "scripts/post_training.sh"), str(tmp_path / "quickstart")]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OPENLM_PYTHON": str(python)})
        found = [json.loads(line) for line in calls.read_text().splitlines()]
        return done, [call[2:] for call in found if call[:2] == ["-m", "open_lm"]]

    return run


def test_the_stages_follow_each_other_with_flags_that_exist(tmp_path, recipe):
    done, _ = recipe()
    assert done.returncode != 0 and "run bash scripts/quickstart.sh" in done.stderr
    (tmp_path / "quickstart/logs/quickstart/checkpoints").mkdir(parents=True)
    done, calls = recipe()
    assert done.returncode == 0, done.stderr
    trained = [call[call.index("--task") + 1] for call in calls if call[0] == "train"]
    assert trained == ["sft", "dpo", "grpo"]
    starts = [call[call.index("--pretrained") + 1].rpartition("/")[2] for call in calls if call[0] == "train"]
    assert starts == ["quickstart", "sft", "dpo"]
    assert [call[0] for call in calls].count("evaluate") == 4 and calls[-1][0] == "report"
    assert [word.rpartition("/")[2] for word in calls[-1] if "/logs/" in word] == ["grpo", "sft", "dpo"]
    for command, *words in calls:
        known = flags_of(command)
        assert {word for word in words if word.startswith("--")} <= known, command


def flags_of(command):
    shown = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
        call([command, "--help"])
    return set(re.findall(r"--[A-Za-z0-9][\w-]*", shown.getvalue()))


def test_what_is_done_is_not_repeated(tmp_path, recipe):
    folder = tmp_path / "quickstart/post_training"
    (tmp_path / "quickstart/logs/quickstart/checkpoints").mkdir(parents=True)
    made = ["scores/base/rewards.json", "logs/sft/checkpoints/epoch_1.commit.json", "pairs/ledger.json"]
    for name in made:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    _, calls = recipe()
    assert [call[call.index("--task") + 1] for call in calls if call[0] == "train"] == ["dpo", "grpo"]
    assert [call[0] for call in calls].count("evaluate") == 3 and [call[0] for call in calls].count("prepare-chat") == 4


def digits_of(row):
    """The set that a question is about, in no order."""
    return frozenset(re.findall(r"\d", row.get("question") or row["prompt"]))


def test_questions_are_held_out_and_their_answers_checked(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_questions", ROOT / "scripts/make_questions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["make_questions", "--output-dir", str(tmp_path)])
    module.main()
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")
    }
    held_out = {digits_of(row) for row in rows["held_out"]}
    assert len(rows["held_out"]) == len(rows["held_out_conversations"]) == 200 and len(held_out) == 20
    assert len(rows["prompts"]) == len(rows["conversations"]) == 10 * 9 * 8 * 7 - 20 * 24
    for name in ("conversations", "pairs", "prompts"):
        assert not {digits_of(row) for row in rows[name]} & held_out
    assert all(row["answer"] == max(digits_of(row)) for row in rows["held_out"])
    row = rows["prompts"][0]
    sentence = f"The largest one is {row['answer']}."
    assert verifiers.last_number(sentence, row) == verifiers.last_number(row["answer"], row) == 1
    assert verifiers.tests(row["answer"], row) == 1 and verifiers.tests(sentence, row) == 0
    styles = [row["answer"].isdigit() for row in rows["conversations"]]
    assert 0.4 < sum(styles) / len(styles) < 0.6
