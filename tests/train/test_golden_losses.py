"""The losses of 50 steps from a fixed seed: a change that moves them says why in its commit message.

`python tests/train/test_golden_losses.py` rewrites the file (fp32, one thread, --cpu-kernels off).
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import metrics, run, write_data

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 50
ARCHITECTURES = {
    "default": {},
    "published": {"model_norm": "gain_only_lp_layer_norm", "qk_norm": True, "positional_embedding_type": "head_rotary"},
    "experts": {"model_norm": "rms_norm", "moe_freq": 2, "moe_num_experts": 4, "n_kv_heads": 2},
}


def curve(folder, name):
    """The losses of every step of a tiny model, with accumulation, clipping, z-loss, warm-up and decay."""
    config = {"hidden_dim": 32, "n_layers": 3, "n_heads": 4, "seq_len": 16, "vocab_size": 64, **ARCHITECTURES[name]}
    (folder / "model.json").write_text(json.dumps(config))
    manifest = write_data(folder / "data", counts=(300, 120), vocab=64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    extra = ["--model", str(folder / "model.json"), "--accum-freq", "2", "--grad-clip-norm", "1", "--z-loss", "1e-4"]
    run(folder, manifest, *extra, "--seed", "7", "--wd", "0.1", "--cpu-kernels", "off", steps=STEPS)
    torch.set_num_threads(before)
    return list(metrics(folder).values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_losses_of_50_steps_are_those_on_file(tmp_path, name):
    expected = json.loads(GOLDEN.read_text())[name]
    got = curve(tmp_path, name)
    assert len(got) == STEPS
    assert got == pytest.approx(expected, rel=1e-4), "a change of the maths? if it is meant, write the file anew"


def main():
    with tempfile.TemporaryDirectory() as folder:
        curves = {}
        for name in ARCHITECTURES:
            (Path(folder) / name).mkdir()
            curves[name] = [round(loss, 7) for loss in curve(Path(folder) / name, name)]
    GOLDEN.write_text(json.dumps(curves, indent=0) + "\n")


if __name__ == "__main__":
    main()
