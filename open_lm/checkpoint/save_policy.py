"""Save policy: at which steps a checkpoint is written, its label, and how long it is kept. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.config import CheckpointConfig

SaveKind = Literal["interval", "step", "fixed", "ephemeral"]
"""`interval` and `step` (between the ends of intervals) stay as --keep-last says, each counted by itself; `fixed` ones
stay for ever; an `ephemeral` one goes as soon as another checkpoint is there."""


@dataclass(frozen=True)
class SaveSteps:
    """Steps at which --save-* ask for a checkpoint: intervals end after `interval_ends` steps, the run after `last`."""

    flags: CheckpointConfig
    interval_ends: tuple[int, ...]
    last: int

    def kind_at(self, step: int, *, time_is_up: bool = False) -> SaveKind | None:
        """The kind of checkpoint due after `step` steps, if any; of several, the one that is kept longest.

        `time_is_up`: --save-every-minutes have passed since the last one.
        """
        flags = self.flags
        is_end = step in self.interval_ends
        if step in flags.fixed_steps:
            return "fixed"
        if step == self.last or (is_end and _divides(flags.save_frequency, self._intervals_done(step))):
            return "interval"
        if time_is_up or _divides(flags.save_every_steps, step):
            return "step"
        if _divides(flags.ephemeral_every_steps, step) or (is_end and flags.save_most_recent):
            return "ephemeral"
        return None

    def label(self, step: int) -> str:
        """The K of epoch_K.pt: the number of the interval that ends here, or `<intervals done>-step<step>`.

        0 before the first step.
        """
        done = self._intervals_done(step)
        if step == 0:
            return "0"
        return str(done) if step in self.interval_ends else f"{done}-step{step}"

    def all(self) -> list[int]:
        """Every step with a checkpoint that stays, as far as steps decide."""
        flags = self.flags
        every = range(flags.save_every_steps, self.last, flags.save_every_steps) if flags.save_every_steps else ()
        candidates = {*self.interval_ends, *every, *flags.fixed_steps, self.last}
        return sorted(
            step for step in candidates if step <= self.last and self.kind_at(step) not in (None, "ephemeral")
        )

    def _intervals_done(self, step: int) -> int:
        return sum(end <= step for end in self.interval_ends)


class SaveClock:
    """Whether --save-every-minutes have passed since the last checkpoint; without the flag they never do."""

    def __init__(self, minutes: float | None):
        self._seconds = minutes * 60 if minutes else None
        self.restart()

    @property
    def runs(self) -> bool:
        return self._seconds is not None

    def is_up(self) -> bool:
        """Whether it is time, by the clock of this process."""
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds

    def restart(self) -> None:
        """Count from now."""
        self._since = time.monotonic()


def _divides(every: int | None, count: int) -> bool:
    return bool(every) and count % (every or 1) == 0


def kind_of(commit: Commit) -> SaveKind:
    """Retention of a checkpoint as it was meant when written; older commit files only record kept or not."""
    if not commit.facts.get("kept", True):
        return "ephemeral"
    return commit.facts.get("kind", "step" if "-" in commit.label else "interval")


def to_delete(complete: Sequence[Commit], newest: Commit, n_kept: int | None) -> list[Commit]:
    """The `complete` checkpoints that retention deletes now that `newest`, one of them, exists.

    `n_kept` None keeps all but ephemeral ones. Ephemeral ones never count as one of those that are kept, fixed ones
    neither count nor go, and `newest` stays whatever it is, as does what a newer program wrote. Without `newest` among
    the complete nothing goes.
    """
    others = [commit for commit in complete if commit.label != newest.label]
    if len(others) == len(complete):
        return []
    going = [commit for commit in others if kind_of(commit) == "ephemeral"]
    for kind in ("interval", "step") if n_kept is not None else ():
        alike = sorted((c for c in complete if kind_of(c) == kind), key=lambda c: (-c.branch, -c.step))
        going += [commit for commit in alike[n_kept:] if commit.label != newest.label]
    return [commit for commit in going if not commit.is_newer]
