"""Ladder files of tests: tiny sizes on tiny data."""

import json

from runs import SEQ_LEN, VOCAB, write_data

SIZES = {"a": {"hidden_dim": 8, "n_layers": 1, "n_heads": 2}, "b": {"hidden_dim": 16, "n_layers": 1, "n_heads": 2}}


def write_ladder(tmp_path, **changes):
    """A ladder of two sizes of a few dozen steps each; returns the path of its file."""
    if not (tmp_path / "data").exists():
        write_data(tmp_path / "data", (400,))
        write_data(tmp_path / "held-out", (16,), seed=1)
    values = {
        "name": "tiny", "dir": "out", "sizes": SIZES, "max_devices": 1, "device_type": "cpu",
        "sequence_length": SEQ_LEN, "vocab_size": VOCAB, "seed": 3, "rank_microbatch_tokens": 4096,
        "data": {"manifests": ["data/manifest.jsonl"]}, "val_data": ["held-out/manifest.jsonl"],
        "run": {"chinchilla_multiple": 1, "batch_multiplier": 2.0, "lr_multiplier": 0.05},
        "flags": {"precision": "fp32", "multiple_data_passes": True, "workers": 0},
        **changes,
    }  # fmt: skip
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "LEAVE OUT"}))
    return str(path)
