"""Peers of benchmarks/data.py: dolma's tokenizer, MosaicML streaming, litdata, OpenLM's own make_2048.

They are run by `--peers-python`, an environment of their own, because their pins are not ours; see README.md.
"""

import subprocess
import sys
from pathlib import Path

READ = """
import sys, time, torch
torch.set_num_threads(1)
if __name__ == "__main__":
    {setup}
    batches, n = iter(loader), 0
    for _ in range(5): next(batches)
    started, cpu = time.perf_counter(), time.process_time()
    for k, batch in enumerate(batches):
        batch = {get}
        n += batch[:, :-1].numel()
        if k == 110: break
    print(n / (time.perf_counter() - started), n / (time.process_time() - cpu))
"""

WRITE_STREAMING = """
import numpy as np, sys
from streaming import MDSWriter
samples = np.fromfile(sys.argv[1], "<u2").reshape(-1, 2049)
with MDSWriter(out=sys.argv[2], columns={"tokens": "ndarray:uint16:2049"}) as out:
    for row in samples: out.write({"tokens": row})
"""

READ_STREAMING = """from streaming import StreamingDataset, StreamingDataLoader
    data = StreamingDataset(local={folder!r}, shuffle=True, batch_size=64)
    loader = StreamingDataLoader(data, batch_size=64, num_workers={workers})"""

WRITE_LITDATA = """
import numpy as np, sys, torch, litdata
def tokens(part):
    for row in np.fromfile(sys.argv[1], "<u2").reshape(-1, 2049)[part::2]:
        yield torch.from_numpy(row.astype(np.int32))
if __name__ == "__main__":
    litdata.optimize(tokens, [0, 1], sys.argv[2], chunk_bytes="64MB", num_workers=1,
                     item_loader=litdata.TokensLoader(block_size=2049))
"""

READ_LITDATA = """from litdata import StreamingDataset, StreamingDataLoader, TokensLoader
    data = StreamingDataset({folder!r}, item_loader=TokensLoader(block_size=2049), shuffle=True)
    loader = StreamingDataLoader(data, batch_size=64, num_workers={workers})"""

PEERS = {
    "streaming": (WRITE_STREAMING, READ_STREAMING, 'batch["tokens"].long()'),
    "litdata": (WRITE_LITDATA, READ_LITDATA, "batch.long()"),
}


def loaders(flat: Path, folder: Path, pythons: list[str]) -> dict[str, list[str]]:
    """Name -> command that prints tokens/s, by the wall clock and by its own CPU; a missing peer is reported."""
    commands = {}
    for name, (write, read, get) in PEERS.items():
        for python in pythons:
            script, out = folder / f"write_{name}.py", folder / name
            script.write_text(write)
            done = subprocess.run([python, str(script), str(flat), str(out)], capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1]
                continue
            for workers in (0, 1):
                code = READ.format(setup=read.format(folder=str(out), workers=workers), get=get)
                path = folder / f"read_{name}_{workers}.py"
                path.write_text(code)
                commands[f"{name}, {workers} workers"] = [python, str(path)]
            break
        else:
            print(f"{name}: left out ({why})", file=sys.stderr)
    return commands


def dolma(files: list[str], tokenizer: str, folder: Path, python: str, processes: int) -> dict[str, list[str]]:
    """Name -> command of `dolma tokens` over the same files, which writes flat arrays."""
    program = Path(python).parent / "dolma"
    if not program.exists():
        print(f"dolma: left out (no {program})", file=sys.stderr)
        return {}
    command = [str(program), "tokens", "--documents", *files, "--destination", str(folder / "dolma")]
    command += ["--tokenizer.name_or_path", tokenizer, "--tokenizer.eos_token_id", "0", "--tokenizer.pad_token_id", "1"]
    return {f"dolma tokens, {processes} processes": [*command, "--dtype", "uint16", "--processes", str(processes)]}
