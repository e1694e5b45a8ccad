"""A run from Python: text to shards, training, text from the model.

    python examples/train_from_python.py FOLDER

The three programs of the package are functions that take the words of their command line.
"""

import json
import sys
from pathlib import Path

from open_lm import generate, load_model
from open_lm.commands import prepare, tokenizer
from open_lm.data.tokenizer import load_tokenizer
from open_lm.generation.config import GenerateConfig
from open_lm.main import main as train


def write_text(folder: Path) -> str:
    """A jsonl file with the sources of the standard library that begin with `a`, a document a line."""
    sources = sorted(Path(json.__file__).parents[1].glob("a*.py"))
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in sources))
    return str(path)


def main(folder: Path) -> list[str]:
    """Train a model of 0.2 million parameters for 30 steps and let it continue two prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder)
    tokenizer.main(["--input-files", text, "--output-dir", str(folder / "tokenizer"), "--vocab-size", "512"])
    prepare.main(
        ["--input-files", text, "--output-dir", str(folder / "shards"), "--seqlen", "128", "--num-workers", "1"]
        + ["--tokenizer", str(folder / "tokenizer")]
    )
    model_file = folder / "model.json"
    model_file.write_text('{"hidden_dim": 64, "n_layers": 2, "n_heads": 2, "seq_len": 128, "vocab_size": 512}')
    result = train(
        ["--model", str(model_file), "--dataset-manifest", str(folder / "shards" / "manifest.jsonl")]
        + ["--train-steps", "30", "--global-batch-size", "4", "--warmup", "5", "--lr", "1e-2", "--device", "cpu"]
        + ["--precision", "fp32", "--workers", "0", "--logs", str(folder / "logs"), "--name", "example"]
    )
    model, words = load_model(result.folder), load_tokenizer(str(folder / "tokenizer"))
    prompts = [words.encode(prompt) for prompt in ("def ", "import ")]
    return [words.decode(ids) for ids in generate(model, prompts, GenerateConfig(max_gen_len=20, temperature=0))]


if __name__ == "__main__":
    print("\n---\n".join(main(Path(sys.argv[1]))))
