"""Questions for scripts/post_training.sh: conversations, preference pairs and prompts whose answers can be checked.

python scripts/make_questions.py --output-dir questions

"Which is larger, 41 or 17?" is answered in two ways, by a number and by a sentence; pairs prefer the number. Of all
pairs of numbers some are held out: nothing is trained on them.
"""

import argparse
import json
from pathlib import Path

import numpy as np

NUMBER = r"^\d+$"
"""Pattern of the preferred answers, as open_lm.post_training.verifiers:tests checks it."""


def questions(seed: int = 0) -> list[tuple[int, int]]:
    """Every two different numbers of 1 to 99, in both orders, shuffled."""
    both = [(a, b) for a in range(1, 100) for b in range(1, 100) if a != b]
    return [both[k] for k in np.random.default_rng(seed).permutation(len(both))]


def asked(a: int, b: int) -> str:
    """The text of a question."""
    return f"Which is larger, {a} or {b}?\n"


def prompt(a: int, b: int) -> dict:
    """A question with what its answer is checked against."""
    return {"question": asked(a, b), "answer": str(max(a, b)), "tests": [{"matches": NUMBER}]}


def conversation(a: int, b: int) -> dict:
    """A question answered by a number, or as often by a sentence."""
    as_sentence = (a + b) % 2
    return {"question": asked(a, b), "answer": f"The larger one is {max(a, b)}." if as_sentence else str(max(a, b))}


def pair(a: int, b: int) -> dict:
    """Both answers, the number preferred."""
    return {"prompt": asked(a, b), "chosen": str(max(a, b)), "rejected": f"The larger one is {max(a, b)}."}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--held-out", type=int, default=400, help="questions that nothing is trained on")
    parser.add_argument("--pairs", type=int, default=1000, help="preference pairs")
    options = parser.parse_args()
    every = questions()
    held_out = set(list(dict.fromkeys(map(frozenset, every)))[: options.held_out // 2])  # in both orders
    kept = [both for both in every if frozenset(both) not in held_out]
    files = {
        "conversations": [conversation(*both) for both in kept],
        "pairs": [pair(*both) for both in kept[: options.pairs]],
        "prompts": [prompt(*both) for both in kept],
        "held_out": [prompt(*both) for both in every if frozenset(both) in held_out],
    }
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    main()
