"""One run that is disturbed, started again, and compared with the same run undisturbed."""

import contextlib
import json
import logging

import torch
from faults.ranks import Ranks, run_ranks
from runs import flags, folder_of, run

from open_lm.checkpoint.commit import committed, damaged_file
from open_lm.checkpoint.read import read_checkpoint

STEPS = 24
INTERVALS = ["--num-checkpoints", "4", "--lr", "2e-3"]
"""A checkpoint every 6 steps; weights that differ by the order of a sum stay within 1e-5 at this learning rate."""


def warm_up(folder, manifest):
    """Import all that a run imports, so that the forked ranks need not."""
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    with contextlib.suppress(Exception):
        run(folder, manifest, steps=1, name="warm-up")
    logging.getLogger().handlers.clear()


class Scene:
    """The folder of a run and its flags. `made`: the undisturbed runs that there are, by setting."""

    def __init__(self, folder, manifest, made, elsewhere=None, batch=8):
        self.folder, self.manifest, self.made, self._elsewhere, self._batch = folder, manifest, made, elsewhere, batch

    def words(self, *extra, name="run", steps=STEPS):
        return flags(self.folder, self.manifest, *INTERVALS, *extra, name=name, steps=steps, batch=self._batch)

    def start(self, *extra, size=1, faults=(), name="run", steps=STEPS, **options):
        """The ranks of the run, started."""
        return Ranks(self.words(*extra, name=name, steps=steps), size, faults, **options)

    def run(self, *extra, size=1, faults=(), name="run", timeout=60, steps=STEPS, **options):
        """Run to its end: the exit codes and the output."""
        return run_ranks(self.words(*extra, name=name, steps=steps), size, faults, timeout, **options)

    def resume(self, *extra, size=1, **options):
        """Go on to the end with --resume latest."""
        codes, output = self.run(*extra, "--resume", "latest", size=size, **options)
        assert set(codes) == {0}, output
        return output

    def path(self, name="run"):
        return folder_of(self.folder, name) / "checkpoints"

    def commits(self, name="run"):
        return committed(str(self.path(name)))

    def steps(self, name="run"):
        """The steps of the complete checkpoints, in order; each is whole to the last bit."""
        commits = self.commits(name)
        assert all(damaged_file(str(self.path(name)), commit) is None for commit in commits)
        return sorted(commit.step for commit in commits)

    def weights(self, name="run"):
        """The weights of the newest checkpoint."""
        return read_checkpoint(str(self.path(name)))["state_dict"]

    def straight(self, *extra, size=1, steps=STEPS):
        """The weights of the same run undisturbed."""
        key = (size, steps, *extra)
        if key not in self.made:
            name = f"straight-{len(self.made)}"
            codes, output = self._elsewhere.run(*extra, size=size, steps=steps, name=name)
            assert set(codes) == {0}, output
            self.made[key] = self._elsewhere.weights(name)
        return self.made[key]

    def require_as_straight(self, *extra, size=1, steps=STEPS, within=0.0):
        """The run is at its end with the weights of the undisturbed one, and nothing lies about in its folder."""
        mine, theirs = self.weights(), self.straight(*extra, size=size, steps=steps)
        for name, tensor in theirs.items():
            torch.testing.assert_close(
                mine[name], tensor, rtol=0, atol=within, msg=lambda why, name=name: f"{name}: {why}"
            )
        newest = self.commits()[0]
        assert newest.step == steps
        consumed = [c for c in self.data_states() if c["steps"] == steps]
        assert consumed and all(state["samples_consumed"] == steps * self._batch for state in consumed)
        self.require_clean()

    def data_states(self):
        for commit in self.commits():
            stats = next(name for name in commit.files if "stats" in name)
            yield torch.load(self.path() / stats, weights_only=True)["data_state"]

    def require_clean(self):
        """No temporary file, no half of a checkpoint: every file belongs to a commit file."""
        named = {name for commit in self.commits() for name in (*commit.files, commit.commit_name)}
        found = {str(p.relative_to(self.path())) for p in self.path().rglob("*") if p.is_file()}
        assert found - named <= {"results.jsonl"}, found - named


def log_lines(path):
    """The injector's log."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
