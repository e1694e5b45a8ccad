"""Commands in README and docs: each program and flag exists, and each block runs or says why it is not run here.

Blocks run as they stand, in order, in a folder that holds what the pages suppose (text, a tokenizer, runs); only
sizes are made small, by the table `SMALL`. `<!-- not run: why -->` before a block keeps it out.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest
import zstandard
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
from open_lm.ladder.__main__ import COMMANDS
names = [[name] for names in available().values() for name in names] + [["ladder", name] for name in COMMANDS]
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
        if name == "ladder":
            name, words = f"ladder {words[0]}", words[1:]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_run_a_marked_block_instead_exist(page):
    for reason in re.findall(NOT_RUN, page.read_text()):
        for named in re.findall(r"tests/[\w/]+(?:\.py)?", reason):
            assert (ROOT / named).exists(), f"{page.name}: {reason}"


SMALL = {
    "--nproc-per-node 8": "--nproc-per-node 2", "open_lm_160m": "model.json", "EleutherAI/gpt-neox-20b": "tokenizer",
    "3200000000 --num-checkpoints 10": "5120 --num-checkpoints 10", "--global-batch-size 256": "--global-batch-size 4",
    "--warmup 2000": "--warmup 2", "amp_bf16": "fp32", "eval/yamls/light.yaml": "quickstart",
    "'shards/c4/*.tar' 'shards/code/{0..3}.tar'": "'held-out/*.tar' 'held-out/0*.tar'",
    "'shards/base/*.tar' 'shards/chat/*.tar'": "'held-out/*.tar' 'held-out/0*.tar'",
    "logs/base logs/tuned": "logs/my_run/checkpoints/epoch_1.pt logs/my_run", "scores/run_a scores/run_b": "scores",
    "--max-gen-len 60": "--max-gen-len 8", "my-first-160m --input": "my-first-160m --max-gen-len 8 --input",
    "main … --icl": "main $FLAGS --name icl --icl", "train … --name": "train $FLAGS --name",
    "--widths 32 64 128 --steps 80": "--widths 16 32 --steps 2 --rates 1e-3 1e-2",
    "coordinate-check": "coordinate-check --widths 16 32 --depths 2",
    "make_2048.py --input-files": "make_2048.py --overwrite --seqlen 64 --input-files",
    "logs/NAME --step 1200": "logs/my_run --step 2",
    "shards --tokenizer tokenizer.json": "shards --tokenizer tokenizer.json --overwrite --seqlen 64",
    "--tokenizer T": "--tokenizer tokenizer", "--seqlen 2048": "--seqlen 64", "int RUN": "int logs/my_run",
    "--train-steps 1000": "--train-steps 2 $FEW", "--train-steps 500": "--train-steps 2 $FEW",
    "--train-steps 800": "--train-steps 4 $FEW --rollout-tokens 4",
    "--rollout-prompts 32 --group-size 16": "--rollout-prompts 2 --group-size 2",
    "--manifests shards/train/manifest": "--manifests shards/manifest", "shards/held-out/manifest": "held-out/manifest",
    "--train-steps 400": "--train-steps 8", "--warmup 40": "--warmup 2", "--max-megabytes 2": "--max-megabytes 0.7",
}  # fmt: skip
"""Parts of a page's commands, and what is run instead."""
PREPARED = """
openlm tokenizer --input-files 'raw/train-*.jsonl.zst' --output-dir tokenizer --vocab-size 512
ln -s tokenizer/tokenizer.json tokenizer.json
openlm prepare --input-files raw/held-out.jsonl.zst --output-dir held-out --tokenizer tokenizer --seqlen 64
cat > model.json << JSON
{"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 64, "vocab_size": 512, "model_norm": "rms_norm"}
JSON
"""
FLAGS = """
export FLAGS="--model model.json --dataset-manifest shards/manifest.jsonl --train-steps 4 --num-checkpoints 2 \\
    --global-batch-size 4 --precision fp32 --warmup 1 --log-every-n-steps 1"
"""
MY_RUN = "openlm train $FLAGS --name my_run\n"
QUESTIONS = """
export FEW="--precision fp32 --warmup 1 --global-batch-size 2 --multiple-data-passes --workers 0"
python scripts/make_questions.py --output-dir questions
head -n 40 questions/conversations.jsonl > chat.jsonl
head -n 20 questions/prompts.jsonl > sums.jsonl
head -n 2 questions/held_out.jsonl > held_out.jsonl
openlm prepare-chat --form prompts --input-files held_out.jsonl --output-dir held_out --tokenizer tokenizer
python -c "
import pyarrow.json, pyarrow.parquet
pyarrow.parquet.write_table(pyarrow.json.read_json('questions/pairs.jsonl')[:20], 'prefs.parquet')"
cp logs/my_run/checkpoints/epoch_2.pt base.pt
"""
BEFORE = {"post-training.md": QUESTIONS}
"""Files that the commands of a page suppose."""


def blocks_to_run(page):
    return [block for reason, block in BLOCK.findall(page.read_text()) if not reason]


PAGES_RUN = [page for page in PAGES if page.name not in ("README.md", "own_text.md") and blocks_to_run(page)]


def in_bash(script, folder):
    """Run what a page says, in `folder`, with this interpreter and tree."""
    for said, run in SMALL.items():
        script = script.replace(said, run)
    one = f'"{sys.executable}"'
    prelude = (
        f'set -euo pipefail\nopenlm() {{ {one} -m open_lm "$@"; }}\npython() {{ {one} "$@"; }}\n'
        f'torchrun() {{ {one} -m torch.distributed.run --standalone "$@"; }}\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-c", prelude + script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    for name in ("scripts", "eval", "datapreprocess"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "raw").mkdir()
    texts = [path.read_text() for path in sorted((ROOT / "open_lm" / "data").glob("*.py"))]
    for name, chosen in (("train-00", texts[4:]), ("held-out", texts[:4])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        (folder / "raw" / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (prepare,) = [block for block in blocks_to_run(ROOT / "README.md") if block.startswith("openlm prepare")]
    in_bash(PREPARED + prepare.replace(" --tokenizer", " --seqlen 64 --tokenizer") + FLAGS + MY_RUN, folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_stands_in_a_block_that_is_run_or_marked(page):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.S | re.M)
    other = "\n".join(block for language, block in blocks if language != "bash")
    found = re.findall(r"^(?:openlm [a-z]|(?:python|bash|torchrun|pip install|lm_eval) \S).*$", other, re.M)
    assert [line for line in found if "->" not in line] == []


@pytest.mark.slow
def test_the_readmes_commands_run(prepared):
    said = in_bash("\n".join(blocks_to_run(ROOT / "README.md")[1:]), prepared)
    assert (prepared / "logs/my-first-160m/checkpoints/epoch_10.pt").exists()
    assert "python_choices/0-shot" in said and "In 1969," in said


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_RUN, ids=lambda page: page.name)
def test_a_pages_commands_run(page, prepared, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder, symlinks=True, ignore=shutil.ignore_patterns("my-first-160m"))
    in_bash(FLAGS + BEFORE.get(page.name, "") + "\n".join(blocks_to_run(page)), folder)


@pytest.mark.slow
def test_own_text_runs_from_an_empty_folder(tmp_path):
    said = in_bash("\n".join(blocks_to_run(ROOT / "docs" / "own_text.md")), tmp_path)
    assert (tmp_path / "report.html").exists() and (tmp_path / "logs/mine/checkpoints/epoch_4.pt").exists()
    assert "python_choices/0-shot" in said
