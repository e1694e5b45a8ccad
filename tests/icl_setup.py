"""A tiny tokenizer and model for the tests of downstream evaluation, and task files written on the fly."""

import json
from pathlib import Path

import torch

from open_lm.data.tokenizer import Tokenizer, load_tokenizer
from open_lm.evaluate.tasks.entry import read_task
from open_lm.evaluate.tasks.suite import data_path
from open_lm.evaluate.tasks.task import EvalTask
from open_lm.model import create_model
from open_lm.model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "open_lm" / "evaluate" / "suites" / "samples"


def write_tokenizer(path: Path) -> str:
    """A byte-level BPE of 400 tokens, trained on the sample tasks; returns its path."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator((p.read_text() for p in sorted(SAMPLES.glob("*.jsonl"))), trainer)
    backend.save(str(path))
    return str(path)


def tiny_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer(folder / "tokenizer.json"))


def tiny_config(**changes) -> ModelConfig:
    settings = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 128, "vocab_size": 400}
    return ModelConfig(**{**settings, "model_norm": "rms_norm", "positional_embedding_type": "llama_rotary", **changes})


def tiny_model(seed: int = 0, **changes) -> torch.nn.Module:
    """A random model whose logits differ enough that it has opinions."""
    torch.manual_seed(seed)
    model = create_model(tiny_config(**changes)).eval()
    with torch.no_grad():
        model.output.weight.mul_(5)
    return model


def write_checkpoint(path: Path, model: torch.nn.Module, tokenizer: str | None = None) -> str:
    config = {"model": model.config.to_dict(), "flags": {}, "tokenizer": tokenizer}
    head = {"epoch": 1, "name": path.stem, "step": 7, "tokens": 7000}
    torch.save({**head, "state_dict": model.state_dict(), "config": config}, path)
    return str(path)


def task_of(path: Path | str, kind: str, **settings) -> EvalTask:
    entry = {"label": "task", "dataset_uri": str(path), "icl_task_type": kind, "num_fewshot": [0]}
    return read_task({**entry, **settings}, "test.yaml")


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(name: str) -> str:
    return data_path(str(SAMPLES / f"{name}.jsonl"), "")
