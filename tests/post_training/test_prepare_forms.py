"""`openlm prepare --chat` and `--reference-log-probs` make what `prepare-chat` and `reference-log-probs` make."""

import hashlib
import json
import sys

import pytest
from tiny_models import make_model, save_checkpoint

from open_lm.__main__ import call
from open_lm.commands.prepare import main as prepare
from open_lm.errors import ConfigError, DataError
from open_lm.post_training.reference_log_probs import main as compute_reference

ROWS = [{"prompt": f"ask {k}", "chosen": "a good answer", "rejected": f"bad {k}"} for k in range(4)]


@pytest.fixture
def flags(tmp_path, tokenizer_of, monkeypatch):
    """The flags of both spellings, but for --output-dir."""
    monkeypatch.setattr(sys, "argv", ["openlm"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["--input-files", f"{tmp_path}/rows.jsonl", "--tokenizer", str(tokenizer_of("neox")), "--seqlen", "40"]


def shards(folder):
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def test_both_spellings_make_the_same_data(tmp_path, flags):
    call(["prepare-chat", *flags, "--form", "pairs", "--output-dir", f"{tmp_path}/a"])
    call(["prepare", *flags, "--chat", "--form", "pairs", "--output-dir", f"{tmp_path}/b"])
    assert shards(tmp_path / "a") == shards(tmp_path / "b") != {}


def test_reference_log_probs_take_the_file_after_the_flag_or_as_out(tmp_path, flags):
    call(["prepare", "--chat", *flags, "--form", "pairs", "--output-dir", f"{tmp_path}/pairs"])
    save_checkpoint(make_model("llama", vocab_size=400), tmp_path / "base.pt")
    told = ["--checkpoint", f"{tmp_path}/base.pt", "--dataset-manifest", f"{tmp_path}/pairs/manifest.jsonl"]
    call(["prepare", "--reference-log-probs", f"{tmp_path}/a.npz", *told])
    call(["prepare", *told, "--reference-log-probs", "--out", f"{tmp_path}/b.npz"])
    compute_reference([*told, "--out", f"{tmp_path}/c.npz"])
    call(["prepare", "--reference_log_probs", f"{tmp_path}/d.npz", *told])  # as OpenLM spells flags
    call(["prepare", *told, f"--reference-log-probs={tmp_path}/e.npz"])
    assert len({(tmp_path / f"{name}.npz").read_bytes() for name in "abcde"}) == 1
    save_checkpoint(make_model("llama", vocab_size=400, seq_len=50), tmp_path / "base.pt")
    with pytest.raises(DataError, match=r"82 ids.*make pairs with --seqlen 50"):
        compute_reference([*told, "--out", f"{tmp_path}/f.npz"])


def test_two_kinds_of_data_at_once_are_refused(flags):
    with pytest.raises(ConfigError, match="--chat and --reference-log-probs: they are different data"):
        prepare(["--chat", "--reference-log-probs", *flags])


@pytest.mark.parametrize(("other", "its_flag"), [("--chat", "--form"), ("--reference-log-probs", "--dataset-manifest")])
def test_help_names_the_form_and_lists_its_flags(flags, capsys, other, its_flag):
    with pytest.raises(SystemExit):
        call(["prepare", "--help"])
    assert other in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call(["prepare", other, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: openlm prepare {other} ") and its_flag in shown


def test_a_message_names_the_command_as_it_was_typed(flags):
    with pytest.raises(ConfigError, match=r"unknown '--foo'.*See openlm prepare --chat --help"):
        call(["prepare", "--chat", "--foo", *flags])
