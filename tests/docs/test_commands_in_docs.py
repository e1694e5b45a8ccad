"""Commands in README and docs: each program and flag exists, and those of own_text.md run from an empty folder."""

import json
import os
import re
import subprocess
import sys
from functools import cache

import pytest
from runs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = r"<!-- not run: ([^>]+) -->\n"
BLOCK = re.compile(rf"(?:{NOT_RUN})?```bash\n(.*?)```", re.S)
OLDER = {
    "datapreprocess/make_2048.py": "prepare", "datapreprocess/make_assistant_data.py": "prepare-chat",
    "datapreprocess/ray/tokenize_shuffle.py": "prepare-ray", "datapreprocess/hf_dataset.py": "download dataset",
    "datapreprocess/wiki_download.py": "download wikipedia", "datapreprocess/export_npy.py": "export-npy",
    "eval/download_eval_data.py": "download tasks", "eval/eval_openlm_ckpt.py": "evaluate",
    "scripts/generate.py": "generate", "scripts/report.py": "report", "scripts/plot_runs.py": "plot",
    "scripts/plot_scores.py": "plot-scores", "scripts/compare_checkpoints.py": "compare-checkpoints",
    "scripts/compare_losses.py": "compare-losses", "scripts/compare_traces.py": "compare-traces",
    "scripts/convert_llama.py": "convert-llama", "scripts/make_corpus.py": "corpus",
    "scripts/train_tokenizer.py": "tokenizer", "open_lm.main": "train", "open_lm.data.inspect": "inspect",
    "open_lm.hf.export": "export", "open_lm.hf.import_": "import", "open_lm.utils.make_wds_manifest": "manifest",
    "open_lm.utils.to_openlm": "to-openlm",
}  # fmt: skip
COLLECT = """
import contextlib, io, json, sys
from open_lm.__main__ import available, call
helps = {}
names = [[name] for names in available().values() for name in names]
for words in [*names, *(["download", kind] for kind in ("tasks", "dataset", "wikipedia"))]:
    sys.argv, shown = ["openlm"], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
        call([*words, "--help"])
    helps[" ".join(words)] = shown.getvalue()
print(json.dumps(helps))
"""


@cache
def helps():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COLLECT], capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


def commands(page):
    """`(command, words)` of each program of ours in the page's bash blocks; comments are left out."""
    found = []
    for _, block in BLOCK.findall(page.read_text()):
        block = re.sub(r"<< JSON.*?\nJSON\n", "\n", block.replace("\\\n", " "), flags=re.S)
        for line in block.splitlines():
            words = re.sub(r"(^|\s)#.*|[\[\]]", " ", line).split()
            name, rest = program(words)
            if name:
                found.append((name, rest))
    return found


def program(words):
    for k, word in enumerate(words):
        if (word == "openlm" and not words[k - 1].startswith("--")) or (word == "open_lm" and words[k - 1] == "-m"):
            n = 2 if words[k + 1 : k + 2] == ["download"] else 1
            return " ".join(words[k + 1 : k + 1 + n]), words[k + 1 + n :]
        if word in OLDER:
            return OLDER[word], words[k + 1 :]
    return None, []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_flag_exists(page):
    for name, words in commands(page):
        if name.startswith("ladder"):  # its commands have flags of their own, which docs/ladder.md shows
            continue
        assert name in helps(), f"{page.name}: openlm {name}"
        known = set(re.findall(r"--[A-Za-z0-9][\w-]*", helps()[name]))
        for flag in (word.partition("=")[0] for word in words if word.startswith("--") and word != "--"):
            assert flag in known or flag.replace("_", "-") in known, f"{page.name}: openlm {name} {flag}"


def test_the_programs_are_found_in_a_line():
    assert program(["python", "scripts/generate.py", "--checkpoint", "x"]) == ("generate", ["--checkpoint", "x"])
    assert program(["torchrun", "--nproc-per-node", "8", "-m", "open_lm.main", "--lr", "1"]) == ("train", ["--lr", "1"])
    assert program(["openlm", "download", "tasks", "--names", "x"]) == ("download tasks", ["--names", "x"])
    assert program(["make", "docs"]) == (None, [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_own_text_runs_from_an_empty_folder(tmp_path):
    blocks = BLOCK.findall((ROOT / "docs" / "own_text.md").read_text())
    script = "\n".join(block for reason, block in blocks if not reason)
    script = script.replace("--train-steps 400", "--train-steps 8").replace("--warmup 40", "--warmup 2")
    script = script.replace("--max-megabytes 2", "--max-megabytes 0.7")
    prelude = f'set -euo pipefail\nopenlm() {{ "{sys.executable}" -m open_lm "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-c", prelude + script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "report.html").exists() and (tmp_path / "logs/mine/checkpoints/epoch_4.pt").exists()
    assert "python_choices/0-shot" in done.stdout
