"""Does the whole system learn?  Character-level Shakespeare through our own shards and `open_lm.main`.

    python benchmarks/shakespeare.py [--text ../shared/data/text/tinyshakespeare.txt] [--out /tmp/shakespeare]

nanoGPT publishes a validation loss of 1.88 for a model of this size and budget (4 layers, 4 heads, 128 wide, context
64, batch 12, 2000 steps, CPU); the goal here is 1.55 or lower with the same tokens. Further flags go to open_lm.main:
`--optimizer adamw --lr 1e-3 --lr-scheduler cosine --lr-cooldown-end 1e-4` is the recipe before Muon (1.63).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from datapreprocess.make_2048 import main as make_shards
from open_lm.main import main as train

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = {
    "hidden_dim": 128, "n_layers": 4, "n_heads": 4, "seq_len": 64,
    "post_embed_norm": False, "weight_tying": False, "model_norm": "gain_only_layer_norm",
}  # fmt: skip
RECIPE = [
    "--global-batch-size", "12", "--optimizer", "muon", "--lr", "5e-3", "--warmup", "100", "--lr-scheduler", "linear",
    "--lr-cooldown-end", "0", "--beta2", "0.99", "--wd", "0.1", "--grad-clip-norm", "1", "--precision", "fp32",
    "--device", "cpu", "--multiple-data-passes", "--workers", "0",
]  # fmt: skip


def character_tokenizer(text: str, path: Path) -> int:
    """Write a tokenizer whose tokens are the characters of `text` and the end of text; returns its vocabulary size."""
    symbols = ["<|endoftext|>", *sorted(set(text))]
    tokenizer = Tokenizer(models.WordLevel({symbol: k for k, symbol in enumerate(symbols)}, unk_token=symbols[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([symbols[0]])
    tokenizer.save(str(path))
    return len(symbols)


def prepare(text: str, folder: Path) -> int:
    """Shards of the first 90 % (train) and the last 10 % (validation) of `text`; returns the vocabulary size."""
    folder.mkdir(parents=True)
    vocab_size = character_tokenizer(text, folder / "tokenizer.json")
    cut = int(0.9 * len(text))
    for name, part in (("train", text[:cut]), ("validation", text[cut:])):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": part}) + "\n")
        arguments = ["--input-files", folder / f"{name}.jsonl", "--output-dir", folder / name]
        arguments += ["--tokenizer", folder / "tokenizer.json", "--seqlen", 64]
        make_shards([str(argument) for argument in arguments])
    return vocab_size


def main() -> None:
    """Prepare, train 2000 steps, print the validation loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared/data/text/tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, default=Path("/tmp/shakespeare"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args, more = parser.parse_known_args()
    vocab_size = prepare(args.text.read_text(), args.out)
    (args.out / "model.json").write_text(json.dumps({**ARCHITECTURE, "vocab_size": vocab_size}))
    validation = ["--val-data", str(args.out / "validation/*.tar"), "--val-every-steps", str(args.steps // 4)]
    shards = ["--dataset-manifest", str(args.out / "train/manifest.jsonl"), *validation]
    length = ["--train-tokens", str(args.steps * 12 * 64), "--seed", str(args.seed)]
    names = ["--model", str(args.out / "model.json"), "--logs", str(args.out), "--name", "run"]
    result = train([*shards, *length, *names, *RECIPE, *more])
    print(f"validation loss {result.validation[0].loss:.4f} after {result.step} steps (goal: 1.55; nanoGPT: 1.88)")


if __name__ == "__main__":
    main()
