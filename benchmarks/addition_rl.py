"""Two-digit addition by reinforcement learning: a small model after fine-tuning, and after GRPO, RLOO or PPO.

python benchmarks/addition_rl.py --seeds 0 1 2 [--task grpo] [--iterations 200] [--recomputed]

The demonstrations forget the carry in --forgotten of the sums that have one, so that a fine-tuned model adds but mostly
without carrying; the reward, 1 for a right sum, is to teach it what they do not show. `--recomputed` computes the old
log-probabilities again before every step, the fault of EasyLM: the ratio is always 1, and nothing is ever clipped.
benchmarks/README.md has the figures. A run takes about 7 minutes of one core; `--folder` keeps it, and the same command
goes on with it.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokenizers
import torch

from open_lm.checkpoint.load_model import load_model
from open_lm.commands.prepare_chat import main as prepare_chat
from open_lm.data.permutations import key
from open_lm.generation.decode import generate
from open_lm.main import main

MODEL = {"hidden_dim": 96, "n_layers": 2, "n_heads": 4, "seq_len": 12, "vocab_size": 14, "model_norm": "rms_norm"}
EOT = 12
COPIES = 4


def write_tokenizer(folder):
    """Digits, plus and equals, one token each."""
    words = {c: k for k, c in enumerate("0123456789+=")} | {"<|endoftext|>": EOT, "<|padding|>": 13}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|padding|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    backend.decoder = tokenizers.decoders.Fuse()
    path = folder / "tokenizer.json"
    backend.save(str(path))
    return str(path)


def row_of(a, b, said, padded):
    """A sum and its answer; `padded` with zeros, so that every number has its digits in the same places."""
    return {"question": f"{a:0{padded * 2}}+{b:0{padded * 2}}=", "answer": f"{said:0{padded * 3}}"}


def prepare(folder, tokenizer, forgotten, padded):
    """Demonstrations and prompts of all sums of two numbers below 100."""
    sums = [(a, b) for a in range(100) for b in range(100)]
    shown = [row_of(a, b, shown_sum(a, b, copy, forgotten), padded) for copy in range(COPIES) for a, b in sums]
    asked = [row_of(a, b, a + b, padded) for a, b in sums]
    for form, rows in (("conversations", shown), ("prompts", asked)):
        (folder / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare_chat(
            ["--input-files", f"{folder}/{form}.jsonl", "--output-dir", str(folder / form), "--form", form,
             "--tokenizer", tokenizer, "--chat-template", "plain", "--seqlen", "12", "--no-packing"]
        )  # fmt: skip


def shown_sum(a, b, copy, forgotten):
    """A sum as it is shown: some forget the carry."""
    forgets = a % 10 + b % 10 > 9 and int(key("forgets", copy, a, b)) / 2**64 < forgotten
    return a + b - 10 * forgets


def greedy(path, padded, n=1000):
    """The share of sums that the model gets right, greedily."""
    model = load_model(path)
    words = {c: k for k, c in enumerate("0123456789+=")}
    sums = [(int(key("eval", k)) % 100, int(key("eval too", k)) % 100) for k in range(n)]
    rows = [row_of(a, b, a + b, padded) for a, b in sums]
    prompts = [[words[c] for c in row["question"]] for row in rows]
    written = generate(model, prompts, temperature=0, max_gen_len=5, stop_ids=[EOT])
    return sum("".join(map(str, w)) == row["answer"] for w, row in zip(written, rows, strict=True)) / n


def fine_tuned(folder, seed, options, common):
    """The run folder of the fine-tuned model of a seed, which a kept --folder may hold already."""
    name = f"sft{seed}"
    if (folder / "logs" / name / "checkpoints" / "epoch_1.commit.json").exists():
        return str(folder / "logs" / name)
    return main(
        ["--task", "sft", "--dataset-manifest", f"{folder}/conversations/manifest.jsonl", "--train-steps",
         str(options.sft_steps), "--global-batch-size", "256", "--lr", "3e-3", "--warmup", "10",
         "--grad-clip-norm", "1", "--multiple-data-passes", "--name", name, *common]
    ).folder  # fmt: skip


def run(folder, seed, options):
    """Fine-tune, then learn from rewards; returns both shares, that of clipped tokens, and seconds."""
    (folder / "model.json").write_text(json.dumps({**MODEL, "qk_norm": options.qk_norm}))
    common = ["--model", str(folder / "model.json"), "--device", "cpu", "--precision", "fp32", "--workers", "0",
              "--logs-dir", str(folder / "logs"), "--seed", str(seed), "--wd", "0"]  # fmt: skip
    start = seed if options.sft_seed is None else options.sft_seed
    sft, steps = fine_tuned(folder, start, options, common), options.epochs * options.minibatches
    began = time.time()
    rl = main(
        ["--task", options.task, "--prompts", f"{folder}/prompts/prompts.jsonl", "--pretrained", sft,
         "--reward", "open_lm.post_training.verifiers:exact", "--rollout-prompts", str(options.prompts),
         "--group-size", str(options.group), "--rollout-tokens", "5", "--rl-epochs", str(options.epochs),
         "--rl-minibatches", str(options.minibatches), "--train-steps", str(steps * options.iterations),
         "--clip-low", str(options.clip), "--clip-high", str(options.clip),
         "--lr", str(options.lr), *decay_of(options), "--warmup", "10", "--grad-clip-norm", "1",
         "--log-every-n-steps", str(10 * steps), "--name", name_of(options, seed), "--resume", "latest",
         *(["--stop-at-step", str(steps * options.stop_at)] if options.stop_at else []), *common]
    )  # fmt: skip
    rows = [json.loads(line) for line in Path(rl.folder, "metrics.jsonl").read_text().splitlines()]
    shares = [row["train/clip_share"] for row in rows if "train/clip_share" in row]
    return (
        greedy(sft, options.padded),
        greedy(rl.folder, options.padded),
        sum(shares) / len(shares),
        time.time() - began,
    )


def decay_of(options):
    """Flags of the learning rate's fall to 0: half a cosine, or (1 - t) to a power."""
    if options.lr_power is None:
        return ["--lr-scheduler", "cosine"]
    power = ["--lr-cooldown-power", str(options.lr_power)]
    return ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1", *power]


def name_of(options, seed):
    """The name of a run of these settings: one that was stopped goes on where its --folder is kept."""
    settings = {name: value for name, value in vars(options).items() if name != "stop_at"}
    told = [f"{name}{value:g}" for name, value in settings.items() if isinstance(value, int | float)]
    return "-".join([f"rl{seed}", options.task, *told])


def plant_recomputation():
    """EasyLM's fault: the ratio is of the new probabilities to themselves."""
    from open_lm.post_training.policy import PolicyGradient

    honest = PolicyGradient._surrogate
    PolicyGradient._surrogate = lambda self, d, a, t: honest(self, d - d.detach(), a, t)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--task", default="grpo", choices=["grpo", "rloo", "ppo"])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--stop-at", type=int, help="leave after this iteration of them; the same command goes on")
    parser.add_argument("--sft-steps", type=int, default=600)
    parser.add_argument("--forgotten", type=float, default=0.6, help="share of carries that demonstrations forget")
    parser.add_argument("--padded", action="store_true", help="write numbers with leading zeros")
    parser.add_argument("--qk-norm", action="store_true", help="norms on queries and keys")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of an iteration")
    parser.add_argument("--group", type=int, default=8, help="answers to each")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--lr-power", type=float, help="the rate falls as (1 - t) to this power, not as a cosine")
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--sft-seed", type=int, help="start all seeds from the fine-tuned model of this one")
    parser.add_argument("--folder", help="keep data and runs here, and take fine-tuned models from here")
    parser.add_argument("--recomputed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.recomputed:
        plant_recomputation()
    with contextlib.ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "prompts").exists():
            prepare(folder, write_tokenizer(folder), options.forgotten, options.padded)
        for seed in options.seeds:
            before, after, clipped, seconds = run(folder, seed, options)
            row = {
                "task": options.task,
                "recomputed": options.recomputed,
                "seed": seed,
                "sft_seed": options.sft_seed,
                "sft_greedy": before,
            }
            row |= {"rl_greedy": after, "clip_share": clipped, "rl_seconds": round(seconds)}
            print(json.dumps(row), flush=True)
