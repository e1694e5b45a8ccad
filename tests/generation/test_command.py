"""scripts/generate.py as people call it: any checkpoint, several prompts, errors that name the flag."""

import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from open_lm.errors import CheckpointError, ConfigError
from open_lm.model import create_model
from open_lm.model.config import ModelConfig

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "generate.py"
LETTERS = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz "]
CONFIG = ModelConfig(hidden_dim=16, n_layers=2, n_heads=2, seq_len=24, vocab_size=len(LETTERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that names its architecture, one that does not, and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = create_model(CONFIG)
    about = {"epoch": 1, "name": "x", "step": 1, "state_dict": model.state_dict()}
    torch.save({**about, "config": {"model": CONFIG.to_dict(), "flags": {}}}, folder / "epoch_1.pt")
    torch.save(about, folder / "old.pt")
    (folder / "arch.json").write_text(
        json.dumps({"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 24, "vocab_size": len(LETTERS)})
    )
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def command(folder):
    """`command(*flags)` calls main with a checkpoint and a tokenizer."""
    main = runpy.run_path(str(SCRIPT))["main"]

    def call(*argv, checkpoint="epoch_1.pt"):
        return main(["--checkpoint", str(folder / checkpoint), "--tokenizer", str(folder / "tokenizer.json"), *argv])

    return call


GREEDY = ("--temperature", "0", "--max-gen-len", "8")


def test_every_prompt_is_continued_and_printed(command, capsys):
    texts = command("--input-text", "the ", "a", "", *GREEDY)
    assert capsys.readouterr().out == "".join(f"{p}{t}\n\n" for p, t in zip(["the ", "a", ""], texts, strict=True))
    assert any(texts)


def test_a_file_without_its_architecture_needs_it_and_then_writes_the_same(command, folder):
    with pytest.raises(CheckpointError, match="give --model"):
        command("--input-text", "the ", *GREEDY, checkpoint="old.pt")
    named = command("--input-text", "the ", *GREEDY, "--model", str(folder / "arch.json"), checkpoint="old.pt")
    assert named == command("--input-text", "the ", *GREEDY)


def test_flags_against_the_stored_architecture_are_refused(command):
    with pytest.raises(CheckpointError, match=r"positional_embedding_type 'rotary' .asked 'head_rotary'"):
        command("--input-text", "a", "--positional-embedding-type", "head_rotary")


def test_streamed_text_is_the_same_text(command, capsys):
    plain = command("--input-text", "the ", "a", *GREEDY)
    printed = capsys.readouterr().out
    assert command("--input-text", "the ", "a", *GREEDY, "--stream") == plain
    assert capsys.readouterr().out == printed


def test_interactive_reads_prompts_line_by_line(command, monkeypatch):
    plain = [command("--input-text", p, *GREEDY)[0] for p in ("the ", "a")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \na\n"))
    assert command("--interactive", *GREEDY) == plain


def test_a_stop_string_ends_the_text(command):
    (free,) = command("--input-text", "the ", *GREEDY)
    (stopped,) = command("--input-text", "the ", *GREEDY, "--stop", free[3:5])
    assert stopped == free[: free.index(free[3:5])]


def test_output_holds_a_line_per_text(command, tmp_path):
    texts = command("--input-text", "the ", "a", *GREEDY, "--output", str(tmp_path / "texts.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": p, "text": t} for p, t in zip(["the ", "a"], texts, strict=True)]


def test_beams_are_refused_where_text_is_shown_early(command):
    with pytest.raises(ConfigError, match="--num-beams"):
        command("--input-text", "a", "--num-beams", "2", "--stream")


@pytest.mark.parametrize("argv", [[], ["--input-text", "a", "--interactive"]])
def test_prompts_come_from_one_place(command, argv):
    with pytest.raises(ConfigError, match="--input-text"):
        command(*argv)


def test_it_runs_from_any_folder_and_ends_errors_in_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--checkpoint", "no.pt", "--input-text", "a", "--tokenizer", "no.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == ("error: --tokenizer no.json: no such file. Give a tokenizer.json, a folder or a hub id.\n")


def test_bos_stands_before_a_prompt_where_the_tokenizer_puts_it(folder, command, monkeypatch):
    from tokenizers import processors

    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.generation import decode

    path = folder / "with_bos.json"
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    both = [("<|endoftext|>", 0)]
    backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A <|endoftext|>", special_tokens=both)
    backend.save(str(path))
    tokenizer = load_tokenizer(str(path))
    plain = tokenizer.encode("the ")
    assert tokenizer.encode_prompt("the ") == [0, *plain]
    assert load_tokenizer(str(folder / "tokenizer.json")).encode_prompt("the ") == plain
    seen, real = [], decode.generate
    monkeypatch.setattr(decode, "generate", lambda model, ids, *a, **k: seen.append(ids) or real(model, ids, *a, **k))
    command("--input-text", "the ", *GREEDY, "--tokenizer", str(path))
    assert seen == [[[0, *plain]]]
