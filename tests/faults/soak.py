"""Soak: one small run is killed and resumed hundreds of times, in every setting; nothing good may be lost.

    make soak                                   # 500 cycles
    PYTHONPATH=.:tests python tests/faults/soak.py --cycles 200 --seed 7 --json soak.json

An episode is one run to its end: 1 to 4 ranks (DDP or FSDP), 0 to 3 data workers, consolidated or sharded checkpoints,
written beside the training or not, a remote copy on. Each cycle starts it with --resume latest and kills one rank, or
all, at a random event: a step, a read, any operation on a file of a save, an upload, a restore. After every cycle each
checkpoint that was complete before, here or in the copy, must be there bit by bit, unless --keep-last let it go; at
the end the weights are those of the undisturbed run, bit by bit where all cycles had the same ranks, within 1e-5 else.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from faults.scene import Scene, warm_up  # noqa: E402
from runs import write_data  # noqa: E402

from open_lm.checkpoint.commit import committed, damaged_file  # noqa: E402

STEPS = 48
EVENTS = {
    "step": 24, "data": 24, "gradients": 24, "load": 1, "save": 3, "upload": 12, "file.open": 12, "file.write": 300,
    "file.sync": 12, "file.rename": 12, "file.renamed": 12, "file.remove": 6,
}  # fmt: skip
"""Events that a cycle is killed at, and the last occurrence that it may be."""


class Episode:
    """One run from its first step to its last."""

    def __init__(self, scene, number, rng):
        self.scene, self.name, self.rng = scene, f"run-{number}", rng
        self.size, self.is_fixed = rng.randint(1, 4), rng.random() < 0.6
        self.keep = rng.choice([None, 2])
        self.fsdp = ["--fsdp"] if self.is_fixed and self.size > 1 and rng.random() < 0.4 else []
        self.words = ["--remote-sync", str(scene.folder / "remote"), "--remote-sync-frequency", "0.05"]
        self.words += [
            *self.fsdp,
            "--num-checkpoints",
            "8",
            "--checkpoint-format",
            rng.choice(["consolidated", "sharded"]),
        ]
        self.words += ["--keep-last", str(self.keep)] if self.keep else []
        self.words += [] if rng.random() < 0.5 else ["--no-async-save"]
        self.folders = [scene.path(self.name), scene.folder / "remote" / self.name / "checkpoints"]
        self.known = [{}, {}]

    def cycle(self):
        """Start it and kill it: where it was killed, or None when it came to its end before."""
        rng = self.rng
        size = self.size if self.is_fixed else rng.randint(1, 4)
        event = rng.choice(list(EVENTS))
        fault = {"event": event, "rank": rng.randrange(size), "nth": rng.randint(1, EVENTS[event]), "do": "kill"}
        words = [*self.words, "--workers", str(rng.choice([0, 0, 1, 2, 3])), "--resume", "latest"]
        with self.scene.start(*words, size=size, faults=[fault], name=self.name, steps=STEPS) as ranks:
            if rng.random() < 0.5:  # the whole job goes
                ranks.wait_until(lambda: _any_ended(ranks), 120)
                if not any(code == 0 for code in ranks.codes):
                    ranks.kill()
            codes, output = ranks.wait(120), ranks.output()
        if set(codes) == {0}:
            return None
        assert -9 in codes, (fault, codes, output[-3000:])
        return event

    def require_nothing_lost(self):
        """Every checkpoint that was complete is complete and unchanged, or was let go of by --keep-last."""
        for known, folder in zip(self.known, self.folders, strict=True):
            now = {c.label: (c.step, c.identity) for c in committed(str(folder)) if not damaged_file(str(folder), c)}
            n_listed = len(committed(str(folder)))
            assert n_listed == len(now), f"{folder}: a checkpoint is damaged"
            kept = sorted(known.values())[-self.keep :] if self.keep else list(known.values())
            newer = [found for found in now.values() if found not in kept]
            n_gone = len([found for found in kept if found not in now.values()])
            assert n_gone <= (len(newer) if self.keep else 0), f"{folder}: {kept} became {sorted(now.values())}"
            assert not known or max(now.values())[0] >= max(known.values())[0]
            known.clear()
            known.update(now)

    def difference(self):
        """The largest difference of a weight from the undisturbed run."""
        straight = self.scene.straight(*self.fsdp, size=self.size if self.is_fixed else 1, steps=STEPS)
        mine = self.scene.weights(self.name)
        assert self.scene.commits(self.name)[0].step == STEPS
        return max(float((mine[name] - tensor).abs().max()) for name, tensor in straight.items())


def _any_ended(ranks):
    for rank, pid in enumerate(ranks.pids):
        if ranks.codes[rank] is None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            ranks.codes[rank] = os.waitstatus_to_exitcode(status) if ended else None
    return any(code is not None for code in ranks.codes)


def soak(folder, cycles, seed, seconds=float("inf"), say=print):
    """`cycles` kills; what was seen."""
    manifest = write_data(folder / "data", (300, 500))
    warm_up(folder, manifest)
    made = {}
    scene = Scene(folder, manifest, made, Scene(folder / "undisturbed", manifest, made, batch=12), batch=12)
    rng, killed, worst, episodes, began = random.Random(seed), Counter(), [0.0, 0.0], [0, 0], time.monotonic()
    while killed.total() < cycles and time.monotonic() - began < seconds:
        episode = Episode(scene, sum(episodes), rng)
        while event := episode.cycle():
            killed[event] += 1
            episode.require_nothing_lost()
        episode.require_nothing_lost()
        difference = episode.difference()
        episodes[episode.is_fixed] += 1
        worst[episode.is_fixed] = max(worst[episode.is_fixed], difference)
        assert difference <= (0 if episode.is_fixed else 1e-5), (episode.name, episode.words, difference)
        say(f"{killed.total()} kills, {sum(episodes)} runs, {time.monotonic() - began:.0f} s", flush=True)
    return {
        "kills": killed.total(), "by event": dict(killed), "runs with the same ranks": episodes[1],
        "their largest difference": worst[1], "runs with other ranks": episodes[0], "their": worst[0], "lost": 0,
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no new run after so long")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        seen = soak(Path(folder), arguments.cycles, arguments.seed, arguments.seconds)
    print(json.dumps(seen, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()
