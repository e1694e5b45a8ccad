"""Training-step benchmark beside peers, each in its own process, in turns; ratios with spread.

    python benchmarks/train_step.py [--model open_lm_11m] [--rounds 7] [--precision amp_bf16] [--json FILE]
        [--contestants NAME…] [--peers-python /tmp/peers/bin/python] [--nanogpt DIR] [--loss-steps 50]

Every contestant takes the same batches through forward, backward, clipping and AdamW, on a GPU where torch sees one.
Ratios are to the first one. Peers that this Python does not have run with --peers-python; those that neither has are
left out and named. Memory is the peak of the whole process, or torch's own on a GPU. With --loss-steps each trains that
long on four sequences, and its last loss is shown: compare those of one project, others begin with other weights.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

DEFAULT = ("transformers", "transformers compiled", "open_lm", "open_lm --torchcompile", "open_lm --cpu-kernels off")


def work(args):
    """A contestant's side: build, then one step for each line read; answers are JSON lines."""
    out = sys.stdout
    sys.stdout = sys.stderr  # peers print
    import torch
    import train_step_peers as peers

    torch.manual_seed(0)
    step = peers.build(args.contestants[0], args.model, args.precision, args.nanogpt)
    config, _ = peers.shape_of(args.model)
    dice = torch.Generator().manual_seed(1)
    samples = [torch.randint(0, config.vocab_size, (1, config.seq_len + 1), generator=dice) for _ in range(4)]
    print(
        json.dumps({"device": str(peers.DEVICE), "threads": torch.get_num_threads(), "torch": torch.__version__}),
        file=out,
        flush=True,
    )
    for n, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        loss = step(samples[n % len(samples)])
        seconds = time.perf_counter() - began
        on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peak = torch.cuda.max_memory_allocated() / 2**20 if peers.DEVICE.type == "cuda" else on_host
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_mb": peak}), file=out, flush=True)


class Contestant:
    """One contestant's process, seen from outside."""

    def __init__(self, name, python, args):
        own = ["--worker", "--contestants", name, "--model", args.model, "--precision", args.precision]
        own += ["--nanogpt", args.nanogpt] if args.nanogpt else []
        self.process = subprocess.Popen(
            [python, __file__, *own], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.about = json.loads(self.process.stdout.readline() or "null")

    def step(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.failure())
        return json.loads(line)

    def failure(self):
        """The last line of what the process said on its way out."""
        return (self.process.communicate()[1].strip().splitlines() or ["no word"])[-1]


def start(args):
    """The contestants that can be started, those that cannot being named."""
    running = {}
    for name in args.contestants:
        pythons = [sys.executable, *([args.peers_python] if args.peers_python else [])]
        for python in pythons if not name.startswith("open_lm") else pythons[:1]:
            contestant = Contestant(name, python, args)
            if contestant.about:
                running[name] = contestant
                break
        else:
            print(f"{name}: left out ({contestant.failure()})")
    return running


def measure(running, rounds, loss_steps):
    """`{name: {seconds: [one a round], loss, peak_mb}}`; the first three steps of each compile and page in."""
    for contestant in running.values():
        for _ in range(3):
            last = contestant.step()
    seconds = {name: [] for name in running}
    for _ in range(rounds):
        for name, contestant in running.items():
            seconds[name].append(contestant.step()["seconds"])
    result = {}
    for name, contestant in running.items():
        for _ in range(max(1, loss_steps - 3 - rounds)):
            last = contestant.step()
        result[name] = {"seconds": seconds[name], "loss": last["loss"], "peak_mb": last["peak_mb"]}
    return result


def main():
    """Print one line a contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_lm_11m")
    parser.add_argument("--precision", default="amp_bf16", choices=("amp_bf16", "fp32"))
    parser.add_argument("--contestants", nargs="+", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loss-steps", type=int, default=0)
    parser.add_argument("--peers-python", help="a Python that has litgpt and torchtitan: see benchmarks/README.md")
    parser.add_argument("--nanogpt", help="a folder with nanoGPT's model.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    running = start(args)
    result = measure(running, args.rounds, args.loss_steps)
    about = next(iter(running.values())).about
    where = f"{about['device']}, {about['threads']} threads, torch {about['torch']}"
    print(f"{args.model}, {args.precision}, {where}; x: times the first")
    first = next(iter(result.values()))["seconds"]
    for name, own in result.items():
        ratios = sorted(theirs / mine for theirs, mine in zip(first, own["seconds"], strict=True))
        own |= {"ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}
        low, high = own["spread"]
        print(
            f"{name:40s} {statistics.median(own['seconds']):7.3f} s  x{own['ratio']:.2f} ({low:.2f} to {high:.2f})  "
            f"{own['peak_mb']:5.0f} MB  loss {own['loss']:.4f}"
        )
    if args.json:
        facts = {"model": args.model, "precision": args.precision, **about}
        args.json.write_text(json.dumps({**facts, "result": result}, indent=1))


if __name__ == "__main__":
    main()
