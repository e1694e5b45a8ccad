"""Exported folders serve their users, without this project: Trainer, gradient checkpointing, PEFT, save and reload."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, make_model, save_checkpoint

from open_lm.generation import generate
from open_lm.hf.export import ExportConfig, export

PROGRAM = Path(__file__).with_name("trained_outside.py")
IDS = torch.randint(2, 53, (2, 12), generator=torch.Generator().manual_seed(5))
QUICK = ("own_geglu",)
CURRENT = os.environ.get("OPENLM_TRANSFORMERS_PYTHON", sys.executable)


NIGHTLY = pytest.mark.skipif(not os.environ.get("OPENLM_NIGHTLY"), reason="runs in scripts/nightly_exports.sh")


def cases():
    """Every kind of model as it is; in the nightly run with the other tying of its embeddings too."""
    for name, changes in CONFIGS.items():
        yield pytest.param(name, {}, marks=() if name in QUICK else pytest.mark.slow, id=name)
        if name != "mamba":
            tied = not changes.get("weight_tying", False)
            marks = (pytest.mark.slow, NIGHTLY)
            yield pytest.param(name, {"weight_tying": tied}, marks=marks, id=f"{name}-{'tied' if tied else 'untied'}")


def used(tmp_path, name, changes):
    """The export of a tiny model as a process without open_lm reads it, and OpenLM's own logits."""
    model = make_model(name, **changes)
    export(ExportConfig(checkpoint=save_checkpoint(model, tmp_path / "e.pt"), out=str(tmp_path / "out")))
    with torch.inference_mode():
        torch.save({"ids": IDS, "logits": model(IDS)[0]}, tmp_path / "reference.pt")
    done = subprocess.run(
        [CURRENT, "-I", str(PROGRAM), str(tmp_path / "out"), str(tmp_path / "reference.pt")], cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), model


@pytest.mark.parametrize(("name", "changes"), cases())
def test_a_folder_serves_its_users(tmp_path, name, changes):
    pytest.importorskip("accelerate")
    found, model = used(tmp_path, name, changes)
    assert found["off"] < 1e-4 and found["saved_off"] < 1e-4 and found["meta"] == []
    assert found["generated"] == generate(model, IDS[:, :5].tolist(), temperature=0, max_gen_len=8)
    assert found["hidden"] == model.config.n_layers + 1 and found["tuple"]
    if name != "mamba":  # before version 5 transformers' own class gave all logits
        assert (found["kept"], found["kept_by_index"]) == (2, 2)
    assert found["checkpointing_off"] < 1e-6
    if (
        name != "mamba" or int(found["version"].split(".")[0]) >= 5
    ):  # before, Mamba's own class gave each micro-batch's own mean
        whole, *parts = found["losses"]
        for losses in parts:
            assert losses == pytest.approx(whole, rel=1e-3)
        assert found["weights_off"] < 1e-6
    assert found.get("lora_learns", True) and found.get("lora_merges", True)
