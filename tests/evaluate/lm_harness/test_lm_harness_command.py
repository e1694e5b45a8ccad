"""The harness's own command with our model in it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from icl_setup import ROOT, SAMPLES, tiny_model, write_checkpoint, write_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
]


HOOK = ROOT / "eval" / "lm_eval" / "openlm.yaml"
OURS = [sys.executable, "-m", "open_lm.evaluate.lm_harness"]
THEIRS = [str(Path(sys.executable).parent / "lm_eval")]


@pytest.mark.parametrize(("command", "further"), [(OURS, ""), (THEIRS, f",{HOOK}")], ids=["ours", "theirs"])
def test_its_command_line_knows_openlm(tmp_path, command, further):
    task = {
        "task": "choices_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(SAMPLES / "python_choices.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
    }
    (tmp_path / "t.yaml").write_text(json.dumps(task))
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    checkpoint = write_checkpoint(tmp_path / "epoch_1.pt", tiny_model(), tokenizer)
    flags = ["--model_args", f"checkpoint={checkpoint}", "--tasks", f"choices_here{further}", "--limit", "4"]
    flags += ["--include_path", str(tmp_path)]
    where = ROOT if command is OURS else tmp_path
    done = subprocess.run(
        [*command, "run", "--model", "openlm", *flags], cwd=where, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|choices_here|" in done.stdout
