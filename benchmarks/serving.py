"""Throughput of `openlm serve` with many clients at once, beside a plain server around transformers' `generate`.

    python benchmarks/serving.py --clients 1 64 --seconds 60

Both serve the same weights (a Llama in transformers' terms, random weights) in fp32 on the CPU. Clients ask, each one
request after the other, for greedy continuations of prompts of their own; every answer is compared with the one that
the server gave before. The servers are measured in turns. Memory is that of the server's process.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import torch

from open_lm.hf.classes import save, to_transformers
from open_lm.model import create_model
from open_lm.model.config import ModelFlags, resolve_architecture

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"w{n}" for n in range(50_000)]


def made(folder, name):
    """A checkpoint, its export for transformers, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({"<|endoftext|>": 0} | {w: i + 1 for i, w in enumerate(WORDS)}, "<|endoftext|>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = replace(resolve_architecture(ModelFlags(model=name)), model_norm="rms_norm")
    model = create_model(config).eval()
    with torch.no_grad():
        model.output.weight[0] = 0  # seldom the end of a text
    facts = {"epoch": 1, "name": name, "step": 1, "config": {"model": config.to_dict(), "flags": {}}}
    torch.save({**facts, "state_dict": model.state_dict()}, folder / "model.pt")
    save(to_transformers(model.config, model.state_dict()), folder / "hf")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder / "hf")
    return [f"w{n} w{7 * n} w{13 * n} w{31 * n}" for n in range(1, 129)]


def server(command, threads):
    """A server process and its url, once it answers."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    for line in process.stderr:
        if " on http://" in line:
            threading.Thread(target=sys.stderr.writelines, args=[process.stderr], daemon=True).start()
            return process, line.split(" on ")[-1].split()[0]
    raise SystemExit(f"{command}: ended with {process.wait()}")


def memory_mb(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def seconds_of_cpu(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def measured(url, process, prompts, n_clients, seconds, n_new, known):
    """Tokens a second of wall time and of the server's CPU time, latencies, and faults."""
    latencies, faults, n_tokens = [], Counter(), 0
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=n_clients)

    async def one(client, number):
        nonlocal n_tokens
        while time.monotonic() < end:
            prompt = prompts[number % len(prompts)]
            number += n_clients
            begin = time.monotonic()
            try:
                answer = await client.post(
                    "/v1/completions", json={"prompt": prompt, "max_tokens": n_new, "temperature": 0}
                )
            except httpx.HTTPError as error:
                faults[f"{type(error).__name__} after {time.monotonic() - begin:.1f} s: {error}"] += 1
                continue
            latencies.append(time.monotonic() - begin)
            if answer.status_code != 200:
                faults[f"status {answer.status_code}"] += 1
                continue
            text = answer.json()["choices"][0]["text"]
            faults["another text"] += known.setdefault(prompt, text) != text
            n_tokens += answer.json()["usage"]["completion_tokens"]

    begin, cpu = time.monotonic(), seconds_of_cpu(process)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*[one(client, number) for number in range(n_clients)])
    wall, cpu = time.monotonic() - begin, seconds_of_cpu(process) - cpu
    return n_tokens / wall, n_tokens / cpu, latencies, +faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_lm_11m")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only-ours", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prompts = made(folder, args.model)
        common = ["--port", "0"]
        commands = {
            "openlm serve": ["-m", "open_lm.serve", "--checkpoint", folder / "model.pt", "--tokenizer", folder / "hf",
                             "--device", "cpu", *common],
            "plain server": ["benchmarks/serving_plain.py", folder / "hf"],
        }  # fmt: skip
        if args.only_ours:
            del commands["plain server"]
        servers = {name: server(command, args.threads) for name, command in commands.items()}
        known = {name: {} for name in servers}
        rates = {}
        try:
            for turn in range(args.turns):
                for n_clients in args.clients:
                    for name, (process, url) in servers.items():
                        before = memory_mb(process)
                        wall, cpu, latencies, faults = asyncio.run(
                            measured(url, process, prompts, n_clients, args.seconds, args.new, known[name])
                        )
                        rates.setdefault((name, n_clients), []).append(wall)
                        latencies.sort()
                        print(
                            f"turn {turn + 1}, {n_clients:3} clients, {name}: {wall:8.1f} tokens/s, {cpu:8.1f} per CPU "
                            f"second; {len(latencies)} requests, median {statistics.median(latencies):.2f} s, "
                            f"95 % {latencies[int(0.95 * len(latencies))]:.2f} s; memory {before:.0f} to "
                            f"{memory_mb(process):.0f} MB; faults {dict(faults) or 'none'}",
                            flush=True,
                        )
        finally:
            for process, _ in servers.values():
                process.terminate()
        if len(servers) == 2:
            ours, other = known["openlm serve"], known["plain server"]
            same = [ours[prompt].split() == other[prompt].split() for prompt in ours.keys() & other.keys()]
            print(f"texts equal in both servers: {sum(same)} of {len(same)}")
        for (name, n_clients), found in rates.items():
            print(f"{name}, {n_clients} clients: median {statistics.median(found):.1f} tokens/s")


if __name__ == "__main__":
    main()
