"""`openlm`: one command for all programs; help at once, plain errors, and the older paths still there."""

import os
import subprocess
import sys

import pytest
from runs import ROOT

from open_lm.__main__ import COMMANDS, available, call
from open_lm.errors import ConfigError

NAMES = [name for names in available().values() for name in names]
HELP_OF_ALL = """
import contextlib, io, sys
from open_lm.__main__ import available, call
for name in [name for names in available().values() for name in names]:
    shown = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
        call([name, "--help"])
    assert f"openlm {name}" in shown.getvalue(), (name, shown.getvalue()[:200])
heavy = {"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
from open_lm.ladder.__main__ import COMMANDS
inner = [["ladder", name] for name in COMMANDS] + [["download", kind] for kind in ("tasks", "dataset", "wikipedia")]
for words in inner:
    shown = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
        call([*words, "--help"])
    assert f"openlm {' '.join(words)}" in shown.getvalue(), (words, shown.getvalue()[:200])
heavy = {"torch", "transformers", "pandas", "scipy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
PATHS = [
    *("scripts/generate.py", "scripts/report.py", "scripts/plot_runs.py", "scripts/plot_scores.py"),
    *("scripts/compare_checkpoints.py", "scripts/compare_losses.py", "scripts/compare_traces.py"),
    *("scripts/convert_llama.py", "scripts/make_corpus.py", "scripts/train_tokenizer.py"),
    *("eval/eval_openlm_ckpt.py", "eval/download_eval_data.py"),
    *("datapreprocess/make_2048.py", "datapreprocess/make_assistant_data.py", "datapreprocess/hf_dataset.py"),
    *("datapreprocess/export_npy.py", "datapreprocess/wiki_download.py", "datapreprocess/ray/tokenize_shuffle.py"),
]


def shell(*words, cwd=ROOT, **env):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, cwd=cwd, env=environment
    )


def test_the_help_of_every_command_needs_no_heavy_library():
    done = shell("-c", HELP_OF_ALL)
    assert done.returncode == 0, done.stderr


def test_the_list_names_every_command(capsys):
    call([])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in NAMES)
    assert {"train", "prepare", "evaluate", "generate", "export", "import", "inspect", "report", "plot"} <= set(NAMES)
    assert {"consolidate", "describe", "download"} <= set(NAMES)


def test_no_command_is_listed_twice():
    names = [name for stage in COMMANDS.values() for name in stage]
    assert len(names) == len(set(names))


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(ConfigError, match="openlm trian: no such command; train"):
        call(["trian"])


def test_an_error_is_one_line_and_names_the_command():
    done = shell("-m", "open_lm", "prepare", "--input-filse", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown '--input-filse': did you mean --input-files?")
    assert "See openlm prepare --help." in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["init", "fit", "run", "lr-sweep"])
def test_the_help_of_a_ladders_command_names_it(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["openlm"])
    with pytest.raises(SystemExit):
        call(["ladder", name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: openlm ladder {name} [-h]")


@pytest.mark.parametrize("kind", ["tasks", "dataset", "wikipedia"])
def test_every_kind_of_download_has_help(kind, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["openlm"])
    with pytest.raises(SystemExit):
        call(["download", kind, "--help"])
    assert f"openlm download {kind}" in capsys.readouterr().out


@pytest.mark.parametrize("path", PATHS)
def test_the_older_paths_lead_to_the_same_programs(path, tmp_path):
    done = shell(str(ROOT / path), "--help", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0 and os.path.basename(path) in done.stdout
