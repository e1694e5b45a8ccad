"""`openlm prepare --chat` and `--reference-log-probs` make what `prepare-chat` and `reference-log-probs` make."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hub_server import serve
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


def test_a_data_set_of_the_hub_by_name_gives_what_its_file_gives(tmp_path, make_chat, tokenizer_of):
    """A split of UltraFeedback's form, in parquet, from a Hub on this machine."""
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import Table, parquet

    said = lambda text: [{"content": "Ça va? 🦊", "role": "user"}, {"content": text, "role": "assistant"}]  # noqa: E731
    rows = [{"prompt": "Ça va? 🦊", "chosen": said(f"oui {k}"), "rejected": said("non")} for k in range(6)]
    rows = [{**row, "score_chosen": 2.0 + k, "score_rejected": 1.0} for k, row in enumerate(rows)]
    folder = tmp_path / "hub/datasets/lab/prefs/data"
    folder.mkdir(parents=True)
    parquet.write_table(Table.from_pylist(rows), folder / "train_prefs-00000-of-00001.parquet")
    parquet.write_table(Table.from_pylist(rows[:1]), folder / "test_prefs-00000-of-00001.parquet")
    expected, local = make_chat(rows, "--form", "pairs", name="local")
    with serve(tmp_path / "hub") as (_, endpoint):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env = {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        command = ["prepare-chat", "--form", "pairs", "--dataset", "lab/prefs", "--split", "train_prefs"]
        command += ["--seqlen", "120", "--tokenizer", str(tokenizer_of("neox")), "--output-dir", f"{tmp_path}/named"]
        done = subprocess.run(
            [sys.executable, "-m", "open_lm", *command], capture_output=True, text=True, timeout=120, env=env
        )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "named/ledger.json").read_text())
    assert found["pairs"] == expected["pairs"] and found["tokens"] == expected["tokens"]
    assert (tmp_path / "named/00000000.tar").read_bytes() == (local / "00000000.tar").read_bytes()
