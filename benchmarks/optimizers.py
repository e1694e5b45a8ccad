"""Which optimizer and learning rate reach the lowest validation loss in the quickstart's steps?

    python benchmarks/optimizers.py --out /tmp/optimizers --settings adamw:3e-3 muon:6e-3 --seeds 0 1 2
    cd benchmarks && python optimizers.py --out /tmp/optimizers --csv optimizers.csv --plot optimizers.png
    python benchmarks/optimizers.py --out /tmp/optimizers --cost 20

Text, shards, model and the 400 steps of 8 samples are those of scripts/quickstart.sh on a CPU; the learning rate decays
over the second half (`--quickstart DIR`: the folder that the script made; else all is prepared in OUT/quickstart). One
process trains the settings in turn, seed by seed. A run that was stopped goes on, one that is done is not repeated;
table, CSV and plot are of all runs in OUT, so several processes may share it. Flags after `--` go to open_lm.main.

`--cost`: the CPU time of the optimizers' steps alone, in turns; every data-parallel rank takes the whole step.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from datapreprocess.make_2048 import main as make_shards
from open_lm.command import run as run_command
from open_lm.commands.corpus import main as make_corpus
from open_lm.commands.tokenizer import main as train_tokenizer
from open_lm.main import main as train
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.train.config import OptimizerConfig
from open_lm.train.optim import build_optimizers

SEQ_LEN, BATCH, VOCAB = 512, 8, 4096
ARCHITECTURE = {
    "hidden_dim": 256, "n_layers": 4, "n_heads": 4, "seq_len": SEQ_LEN, "vocab_size": VOCAB, "post_embed_norm": False,
    "weight_tying": False, "model_norm": "gain_only_layer_norm", "qk_norm": True,
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Corpus, tokenizer and shards as scripts/quickstart.sh makes them, where they are not there yet."""
    tokenizer = folder / "tokenizer/tokenizer.json"
    if not (folder / "raw/corpus.json").exists():
        make_corpus(["--output-dir", str(folder / "raw")])
    if not tokenizer.exists():
        inputs = ["--input-files", str(folder / "raw/train-*.jsonl.zst"), "--vocab-size", str(VOCAB)]
        train_tokenizer([*inputs, "--output-dir", str(tokenizer.parent)])
    for split in ("train", "held-out"):
        if not (folder / "shards" / split / "ledger.json").exists():
            inputs = ["--input-files", str(folder / f"raw/{split}*.jsonl.zst"), "--tokenizer", str(tokenizer)]
            make_shards([*inputs, "--output-dir", str(folder / "shards" / split), "--seqlen", str(SEQ_LEN)])


def run_one(args: argparse.Namespace, quickstart: Path, setting: str, seed: int, more: list[str]) -> None:
    """Train one setting with one seed; its curve and CPU time go to OUT/<setting>-<seed>/result.json."""
    optimizer, lr = setting.split(":")
    folder = args.out / f"{optimizer}-{lr}-{seed}"
    if (folder / "result.json").exists():
        return
    shards, steps = quickstart / "shards", args.steps
    data = ["--dataset-manifest", shards / "train/manifest.jsonl", "--multiple-data-passes", "--workers", 0]
    data += ["--val-data", shards / "held-out/00000000.tar", "--val-num-samples", 128 * SEQ_LEN]
    data += ["--val-every-steps", steps // 4]
    length = ["--global-batch-size", BATCH, "--train-tokens", steps * BATCH * SEQ_LEN, "--num-checkpoints", 2]
    length += ["--save-every-steps", steps // 8, "--delete-previous-checkpoint"]
    recipe = ["--optimizer", optimizer, "--lr", lr, "--warmup", steps // 16, "--wd", 0.1, "--grad-clip-norm", 1]
    recipe += ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", 1, "--device", "cpu"]
    recipe += ["--precision", args.precision, "--seed", seed]
    names = ["--model", args.out / "model.json", "--logs", args.out, "--name", folder.name, "--resume", "latest"]
    folder.mkdir(exist_ok=True)
    began = time.process_time()
    try:
        train([str(word) for word in [*data, *length, *recipe, *names, *more]])
    finally:  # a run that is stopped goes on from its last checkpoint
        with open(folder / "cpu_seconds.txt", "a") as file:
            file.write(f"{time.process_time() - began}\n")
    cpu_seconds = sum(map(float, (folder / "cpu_seconds.txt").read_text().split()))
    lines = (folder / "checkpoints/results.jsonl").read_text().splitlines()
    curve = [(row["step"], row["loss"]) for line in lines for row in json.loads(line)]
    result = {"optimizer": optimizer, "lr": lr, "seed": seed, "cpu_seconds": cpu_seconds, "curve": curve}
    (folder / "result.json").write_text(json.dumps(result))
    print(f"{folder.name}: {curve[-1][1]:.4f}, {cpu_seconds:.0f} CPU s", flush=True)


def by_setting(out: Path) -> dict[str, list[dict]]:
    """The results in `out` by setting, the lowest mean loss first."""
    found = defaultdict(list)
    for path in sorted(out.glob("*/result.json")):
        result = json.loads(path.read_text())
        found[f"{result['optimizer']} {result['lr']}"].append(result)
    return dict(sorted(found.items(), key=lambda item: statistics.mean(r["curve"][-1][1] for r in item[1])))


def show(found: dict[str, list[dict]]) -> None:
    """The table: last validation losses over seeds, CPU time of a step (its share of the validation included)."""
    print("| optimizer, learning rate | seeds | validation loss | lowest–highest | CPU s/step |\n|---|---|---|---|---|")
    for name, results in found.items():
        losses = [result["curve"][-1][1] for result in results]
        cpu = statistics.median(result["cpu_seconds"] / result["curve"][-1][0] for result in results)
        spread = f"{min(losses):.3f}–{max(losses):.3f}"
        print(f"| {name} | {len(losses)} | {statistics.mean(losses):.3f} | {spread} | {cpu:.3f} |")


def write_csv(found: dict[str, list[dict]], path: Path) -> None:
    """One row for each validation of each run."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["optimizer", "lr", "seed", "cpu_seconds_per_step", "step", "validation_loss"])
        for result in (result for results in found.values() for result in results):
            cpu = f"{result['cpu_seconds'] / result['curve'][-1][0]:.4f}"
            for step, loss in result["curve"]:
                rows.writerow([result["optimizer"], result["lr"], result["seed"], cpu, step, f"{loss:.4f}"])


def plot(found: dict[str, list[dict]], path: Path) -> None:
    """The validation loss of each optimizer at its best learning rate: the mean over seeds, and each seed."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 3.6), layout="constrained")).subplots()
    for color, optimizer in zip(
        ("C0", "C1", "C2", "C3"), dict.fromkeys(name.split()[0] for name in found), strict=False
    ):
        name = next(name for name in found if name.split()[0] == optimizer)
        steps = [step for step, _ in found[name][0]["curve"]]
        losses = [[loss for _, loss in result["curve"]] for result in found[name]]
        for curve in losses:
            axes.plot(steps, curve, color=color, alpha=0.35, linewidth=1)
        means = [statistics.mean(column) for column in zip(*losses, strict=True)]
        axes.plot(
            steps,
            means,
            color=color,
            label=f"{name}: {means[-1]:.3f} ({len(losses)} {'seed' if len(losses) == 1 else 'seeds'})",
        )
    axes.set(xlabel="step", ylabel="validation loss")
    axes.legend()
    figure.savefig(path, dpi=110)


def show_costs(n_rounds: int) -> None:
    """Median CPU seconds of a step of each optimizer, in turns, with one thread."""
    torch.set_num_threads(1)
    seconds = defaultdict(list)
    model = create_model(ModelConfig(**ARCHITECTURE))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    built = {name: build_optimizers(model, OptimizerConfig(optimizer=name), 1e-4) for name in ("adamw", "muon")}
    for _ in range(n_rounds + 1):
        for name, optimizers in built.items():
            began = time.process_time()
            for optimizer in optimizers:
                optimizer.step()
            seconds[name].append(time.process_time() - began)
    for name, found in seconds.items():
        print(f"{name}: {statistics.median(found[1:]):.4f} CPU s a step ({min(found[1:]):.4f}–{max(found[1:]):.4f})")


def main(argv: list[str] | None = None) -> None:
    """Train what is asked for and not there yet; print and write what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--quickstart", type=Path, help="folder that scripts/quickstart.sh made")
    parser.add_argument("--settings", nargs="*", default=[], help="optimizer:learning-rate, several")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--precision", default="amp_bf16", help="fp32 where the CPU has no fast bf16")
    parser.add_argument("--csv", type=Path, help="where to write the curves")
    parser.add_argument("--plot", type=Path, help="where to write the picture of them")
    parser.add_argument("--cost", type=int, metavar="ROUNDS", help="measure the optimizers' steps")
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.out.mkdir(parents=True, exist_ok=True)
    if args.settings:
        quickstart = args.quickstart or args.out / "quickstart"
        prepare(quickstart)
        (args.out / "model.json").write_text(json.dumps(ARCHITECTURE))
        for seed in args.seeds:
            for setting in args.settings:
                run_one(args, quickstart, setting, seed, words[cut + 1 :])
    found = by_setting(args.out)
    show(found)
    if args.csv:
        write_csv(found, args.csv)
    if args.plot:
        plot(found, args.plot)
    if args.cost:
        show_costs(args.cost)


if __name__ == "__main__":
    run_command(main)
