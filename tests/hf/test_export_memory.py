"""A large export holds its weights once: what a 7B model needs follows from a small one with as many shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys, threading, time
import torch
torch.set_num_threads(1)
from transformers import PreTrainedModel
from open_lm.hf.export import ExportConfig, export
from tiny_models import make_model, save_checkpoint

def own_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], own_bytes())
        time.sleep(0.002)

folder, check = sys.argv[1:]
plain = PreTrainedModel.save_pretrained
PreTrainedModel.save_pretrained = lambda self, folder, max_shard_size: plain(self, folder, max_shard_size="40MB")
tiny = save_checkpoint(make_model("llama_pairs_gqa"), f"{folder}/tiny.pt")
export(ExportConfig(checkpoint=tiny, out=f"{folder}/tiny"))
done, before = threading.Event(), own_bytes()
peak = [before]
thread = threading.Thread(target=watch)
thread.start()
export(ExportConfig(checkpoint=f"{folder}/big.pt", out=f"{folder}/out", check=check))
done.set()
thread.join()
print(json.dumps(peak[0] - before))
"""
WRITE = """
import sys
import torch
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from tiny_models import save_checkpoint
shape = {"hidden_dim": 512, "n_layers": 12, "n_heads": 8, "seq_len": 64, "vocab_size": 16000}
config = ModelConfig(**shape, model_norm="rms_norm", positional_embedding_type="llama_rotary")
model = create_model(config)
save_checkpoint(model, sys.argv[1])
print(sum(p.numel() * 4 for p in model.parameters()))
"""


def run(program, *arguments):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_weights_are_held_once_and_a_shard_more(tmp_path):
    size = run(WRITE, tmp_path / "big.pt")
    for check in ("weights", "none"):
        held = run(PROGRAM, tmp_path, check)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
        assert 0.9 * size < held < 1.5 * size, (held, size)
        for name in ("out", "tiny"):
            subprocess.run(["rm", "-r", str(tmp_path / name)], check=True)
