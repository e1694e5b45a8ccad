"""Places that an export cannot be written to are named, and nothing stays there; the card's head is readable."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import make_model, save_checkpoint

from open_lm.errors import ConfigError, StorageError
from open_lm.hf.export import ExportConfig, export
from open_lm.hf.model_card import model_card

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"out": "s3://bucket/model"}, "on this machine's disk"),
        ({"out": "hf://owner/name"}, "on this machine's disk"),
        ({"out": "model.gguf"}, "Add --to gguf"),
    ],
)
def test_a_place_that_is_no_folder_is_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        ExportConfig(checkpoint="e.pt", **flags)


@pytest.mark.parametrize("to", [pytest.param("hf", marks=pytest.mark.slow), "gguf"])
def test_a_full_disk_is_named_and_nothing_stays(tmp_path, to):
    """A limit on the size of files stands for the disk: both end in an error of the system amid the weights."""
    checkpoint = save_checkpoint(make_model("llama"), tmp_path / "e.pt")
    out = tmp_path / ("out" if to == "hf" else "out.gguf")
    code = (
        "import resource, signal, sys\n"
        "from open_lm.command import run\n"
        "from open_lm.hf.export import ExportConfig, export\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "run(lambda: export(ExportConfig(checkpoint=sys.argv[1], out=sys.argv[2], to=sys.argv[3])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(out), to], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 74, done.stderr
    assert f"error: --out {out}: cannot write there" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["e.pt"]


def test_a_path_below_a_file_is_named(tmp_path):
    checkpoint = save_checkpoint(make_model("llama"), tmp_path / "e.pt")
    with pytest.raises(StorageError, match=r"--out .*e\.pt/out: cannot write there"):
        export(ExportConfig(checkpoint=checkpoint, out=f"{checkpoint}/out"))


def test_a_licence_of_any_letters_leaves_the_cards_head_readable(tmp_path):
    terms = "our own: see #4, “as is”"
    model = make_model("llama")
    card = model_card("m", {}, model, "LlamaForCausalLM", None, terms)
    assert yaml.safe_load(card.split("---")[1])["license"] == terms
