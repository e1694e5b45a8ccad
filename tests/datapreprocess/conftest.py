"""A small exact tokenizer and raw files, made once."""

import gzip
import importlib.util
from pathlib import Path

import orjson
import pytest
import tokenizers
import zstandard

ROOT = Path(__file__).resolve().parents[2]


def load_script(relative):
    """A command of datapreprocess/ as a module: its folder is no package."""
    spec = importlib.util.spec_from_file_location(Path(relative).stem, ROOT / relative)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script():
    """`script(path)` loads a command as a module."""
    return load_script


@pytest.fixture(scope="session")
def make_2048():
    return load_script("datapreprocess/make_2048.py").main


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    """Byte-level BPE trained on this repository's own sources."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator((p.read_text() for p in sorted((ROOT / "open_lm" / "data").glob("*.py"))), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path


@pytest.fixture(scope="session")
def texts():
    """Documents of all kinds: code, other scripts, one character, only spaces."""
    code = [line for p in sorted((ROOT / "open_lm" / "data").glob("*.py")) for line in p.read_text().split("\n\n")]
    return [*filter(None, code[:150]), "x", " \n ", "naïve 日本語 👍🏽", "\x00\x1f", "<|endoftext|> inside"]


@pytest.fixture
def raw(tmp_path):
    """`raw(name, rows)` writes a raw file packed by its ending."""

    def write(name, rows, **also):
        lines = b"".join(orjson.dumps({"text": row, **also} if isinstance(row, str) else row) + b"\n" for row in rows)
        packed = {".zst": zstandard.compress, ".gz": gzip.compress}.get(Path(name).suffix, lambda content: content)
        path = tmp_path / "raw" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(packed(lines))
        return str(path)

    return write
