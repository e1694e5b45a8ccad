"""Questions for scripts/post_training.sh: conversations, preference pairs and prompts whose answers can be checked.

python scripts/make_questions.py --output-dir questions

"Which is largest: 4 7 2 5?" is answered in two ways, by a number and by a sentence; pairs prefer the number. Some sets
of four digits are held out: nothing is trained on any order of them.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

NUMBER = r"^\d+$"
"""Pattern of the preferred answers, as open_lm.post_training.verifiers:tests checks it."""
ASKED_OF_A_SET = 10
"""Orders of a held-out set that are asked for."""
Digits = tuple[int, ...]


def questions(seed: int = 0) -> list[Digits]:
    """Every four different digits in every order, shuffled."""
    every = list(itertools.permutations(range(10), 4))
    return [every[k] for k in np.random.default_rng(seed).permutation(len(every))]


def asked(digits: Digits) -> str:
    """The text of a question."""
    return f"Which is largest: {' '.join(map(str, digits))}?\n"


def sentence(digits: Digits) -> str:
    """The answer in the other style."""
    return f"The largest one is {max(digits)}."


def prompt(digits: Digits) -> dict:
    """A question with what its answer is checked against."""
    return {"question": asked(digits), "answer": str(max(digits)), "tests": [{"matches": NUMBER}]}


def conversation(digits: Digits, in_words: bool) -> dict:
    """A question answered by a number or by a sentence."""
    return {"question": asked(digits), "answer": sentence(digits) if in_words else str(max(digits))}


def pair(digits: Digits) -> dict:
    """Both answers, the number preferred."""
    return {"prompt": asked(digits), "chosen": str(max(digits)), "rejected": sentence(digits)}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--held-out", type=int, default=20, help="sets of four digits that nothing is trained on")
    parser.add_argument("--pairs", type=int, default=1000, help="preference pairs")
    options = parser.parse_args()
    every = questions()
    sets = list(dict.fromkeys(map(frozenset, every)))[: options.held_out]
    kept = [digits for digits in every if frozenset(digits) not in sets]
    orders = [[digits for digits in every if frozenset(digits) == one][:ASKED_OF_A_SET] for one in sets]
    held_out = list(itertools.chain(*orders))
    files = {
        "conversations": [conversation(digits, k % 2 == 1) for k, digits in enumerate(kept)],
        "held_out_conversations": [conversation(digits, k % 2 == 1) for k, digits in enumerate(held_out)],
        "pairs": [pair(digits) for digits in kept[: options.pairs]],
        "prompts": [prompt(digits) for digits in kept],
        "held_out": [prompt(digits) for digits in held_out],
    }
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    main()
