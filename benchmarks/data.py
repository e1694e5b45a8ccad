"""Data benchmark: text to shards and shards to batches, beside the peers, interleaved so that ratios hold.

    python benchmarks/data.py [--input-files raw/*.jsonl.zst --tokenizer tokenizer.json] [--rounds 3] [--json data.json]
        [--peers-python VENV/bin/python]

Without --input-files it makes its own corpus from the installed Python sources. Peers that are not installed are
left out and named. CPU seconds count all processes of a contender; wall seconds depend on who else uses the machine.
"""

import argparse
import contextlib
import glob
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import data_peers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def corpus(folder: Path, megabytes: int) -> list[str]:
    """Python sources of the interpreter and its packages as two .jsonl.zst files."""
    import orjson
    import zstandard

    lines, size = [], 0
    for path in sorted(glob.glob(f"{os.path.dirname(os.__file__)}/**/*.py", recursive=True)):
        with contextlib.suppress(UnicodeDecodeError, OSError):
            text = Path(path).read_text()
            lines.append(orjson.dumps({"id": path, "text": text}))
            size += len(text)
        if size > megabytes * 1e6:
            break
    for k in range(2):
        (folder / f"{k}.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines[k::2]) + b"\n"))
    return [str(folder / f"{k}.jsonl.zst") for k in range(2)]


def measured(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of one command with its children, and the peak memory of the largest of these processes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    wall = time.perf_counter() - started
    return {"wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}


BARE = """
import sys; sys.path.insert(0, {root!r})
from open_lm.preprocess.encoding import make_encoder
from open_lm.preprocess.input import document_text
from open_lm.preprocess.jsonl import read_lines
from open_lm.data.tokenizer import load_tokenizer
encoder, batch = make_encoder({encoder!r}, load_tokenizer({tokenizer!r})), []
for url in {files!r}:
    for line in read_lines(url, max_line_bytes=1 << 28):
        batch.append(document_text(line, "text"))
        if len(batch) == 256:
            encoder.encode([text for text in batch if isinstance(text, str)]); batch = []
encoder.encode([text for text in batch if isinstance(text, str)])
"""


TWO_BARE = """
import subprocess, sys
running = [subprocess.Popen([sys.executable, "-c", code]) for code in {codes!r}]
sys.exit(sum(process.wait() for process in running))
"""


def preprocessing(files: list[str], tokenizer: str, folder: Path, peers_python: str) -> dict[str, list[str]]:
    """Name -> command; each reads the same files to tokens, only make_2048 writes shards too."""
    script = [
        sys.executable,
        str(ROOT / "datapreprocess" / "make_2048.py"),
        "--input-files",
        *files,
        "--tokenizer",
        tokenizer,
    ]
    out = ["--output-dir", str(folder / "out"), "--overwrite"]
    encoders = ["tokenizers", *(["fastokens"] if importlib.util.find_spec("fastokens") else [])]
    commands = {f"make_2048, {name}": [*script, *out, "--encoder", name] for name in encoders}
    commands |= {
        f"make_2048, {n} workers": [*script, *out, "--encoder", encoders[-1], "--num-workers", str(n)] for n in (1, 2)
    }
    commands |= data_peers.dolma(files, tokenizer, folder, peers_python, len(os.sched_getaffinity(0)))
    for name in encoders:
        codes = [
            BARE.format(root=str(ROOT), encoder=name, tokenizer=tokenizer, files=part)
            for part in (files, files[::2], files[1::2])
        ]
        commands[f"bare {name}"] = [sys.executable, "-c", codes[0]]
        if len(files) > 1:
            commands[f"bare {name}, 2 processes"] = [sys.executable, "-c", TWO_BARE.format(codes=codes[1:])]
    return commands


LOAD = """
import sys, time; sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
from open_lm.data.config import DataConfig
from open_lm.data.loader import build_loader
if __name__ == "__main__":
    config = DataConfig(dataset_manifest=({manifest!r},), workers={workers}, multiple_data_passes=True)
    shape = dict(vocab_size=65536, seq_len=2048, global_batch=64)
    batches = build_loader(config, **shape, rank=0, world_size=1, seed=0).batches(0, {steps})
    for _ in range(5): next(batches)
    started, cpu, n = time.perf_counter(), time.process_time(), 0
    for batch in batches: n += batch.inputs_BT.numel()
    print(n / (time.perf_counter() - started), n / (time.process_time() - cpu))
"""

MEMMAP = """
import time, numpy as np, torch
torch.set_num_threads(1)
tokens, dice = np.memmap({path!r}, "<u2", "r"), np.random.default_rng(0)
started, cpu, n = time.perf_counter(), time.process_time(), 0
for _ in range({steps}):
    starts = dice.integers(0, len(tokens) - 2049, 64)
    batch = torch.from_numpy(np.stack([tokens[s:s + 2049] for s in starts]).astype(np.int64))
    n += batch[:, :-1].numel()
print(n / (time.perf_counter() - started), n / (time.process_time() - cpu))
"""


def loading(folder: Path, peers_python: str, keys: list[str]) -> dict[str, list[str]]:
    """Name -> command that prints tokens/s; shards of 4 x 2048 random samples in every format."""
    import numpy as np

    from open_lm.data.config import SAMPLE_FORMATS
    from open_lm.data.shards import write_shard
    from open_lm.utils import make_wds_manifest

    samples = np.random.default_rng(0).integers(0, 50_000, (8192, 2049)).astype("<u2")
    samples.tofile(folder / "flat.npy")
    commands = {}
    for key in keys or SAMPLE_FORMATS:
        (folder / key).mkdir()
        for k in range(4):
            with open(folder / key / f"{k:08d}.tar", "wb") as file:
                write_shard(file, samples[2048 * k : 2048 * (k + 1)], key)
        with contextlib.redirect_stdout(sys.stderr):
            manifest = make_wds_manifest.main(["--data-dir", str(folder / key)])
        for workers in (0, 1):
            steps = 300 if key == "npy" else 100
            code = LOAD.format(root=str(ROOT), manifest=manifest, workers=workers, steps=steps)
            commands[f"{key}, {workers} workers"] = [sys.executable, "-c", code]
    commands["numpy memmap"] = [sys.executable, "-c", MEMMAP.format(path=str(folder / "flat.npy"), steps=300)]
    return commands | data_peers.loaders(folder / "flat.npy", folder, [peers_python, sys.executable])


def main() -> None:
    """Run all contenders in turn, several rounds, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-files", nargs="+")
    parser.add_argument("--tokenizer", default=str(ROOT.parent / "shared" / "data" / "gpt-neox-20b-tokenizer.json"))
    parser.add_argument("--megabytes", type=int, default=20, help="Text of the corpus it makes itself.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="File for all figures.")
    parser.add_argument("--contenders", default="", help="Only those of preprocessing whose names this regex finds.")
    parser.add_argument("--peers-python", default=sys.executable, help="Python of the environment with the peers.")
    parser.add_argument("--keys", nargs="+", default=[], help="Formats to load, of all when none is given.")
    parser.add_argument("--only", choices=("preprocessing", "loading"), help="Measure one of the two.")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="open_lm-data-"))
    try:
        results = run(args, folder)
    finally:
        shutil.rmtree(folder)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2))


def run(args: argparse.Namespace, folder: Path) -> dict:
    """All figures: name -> lists of one value a round."""
    files = args.input_files or corpus(folder, args.megabytes)
    making = {} if args.only == "loading" else preprocessing(files, args.tokenizer, folder, args.peers_python)
    making = {name: command for name, command in making.items() if re.search(args.contenders, name)}
    reading = {} if args.only == "preprocessing" else loading(folder, args.peers_python, args.keys)
    results: dict = {"preprocessing": {name: [] for name in making}, "loading": {name: [] for name in reading}}
    for _ in range(args.rounds):
        for name, command in making.items():
            results["preprocessing"][name].append(measured(command))
            shutil.rmtree(folder / "dolma", ignore_errors=True)
        for name, command in reading.items():
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
            wall, cpu = map(float, done.stdout.split()[-2:])
            results["loading"][name].append({"wall": wall, "cpu": cpu})
    if making:
        tokens = json.loads((folder / "out" / "ledger.json").read_bytes())["tokens"]["in"]
        print_preprocessing(results["preprocessing"], tokens)
    if reading:
        print_loading(results["loading"])
    return results


def ratios(ours: list[float], others: list[float]) -> str:
    """The median of the ratios of one round each, with the lowest and highest."""
    each = sorted(a / b for a, b in zip(ours, others, strict=True))
    return f"{statistics.median(each):.2f} ({each[0]:.2f}-{each[-1]:.2f})"


def print_preprocessing(results: dict, tokens: int) -> None:
    """One row a contender; the ratios are wall and CPU time of the last bare encoder, round by round, to its own."""
    base = next(name for name in reversed(results) if name.startswith("bare"))
    print(f"\n{tokens:,} tokens | wall s | CPU s | Mtokens / CPU s | peak MB of a process | {base}: x wall | x CPU")
    for name, rounds in results.items():
        wall, cpu, peak = (statistics.median(r[key] for r in rounds) for key in ("wall_s", "cpu_s", "peak_mb"))
        shown = [ratios([r[key] for r in results[base]], [r[key] for r in rounds]) for key in ("wall_s", "cpu_s")]
        print(" | ".join([f"{name} | {wall:.1f} | {cpu:.1f} | {tokens / cpu / 1e6:.2f} | {peak:.0f}", *shown]))


def print_loading(results: dict) -> None:
    """One row a contender; ratios of rates to those of a numpy memmap, round by round; CPU where one process works."""
    print("\nloading | Mtokens/s wall | x memmap | Mtokens per CPU second | x memmap")
    base = results["numpy memmap"]
    for name, rounds in results.items():
        shown = []
        for clock in ("wall", "cpu") if "1 workers" not in name else ("wall",):
            rates, bases = ([r[clock] for r in found] for found in (rounds, base))
            shown += [f"{statistics.median(rates) / 1e6:.1f}", ratios(rates, bases)]
        print(" | ".join([name, *shown]))


if __name__ == "__main__":
    main()
