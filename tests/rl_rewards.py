"""Rewards for tests of reinforcement learning."""

import os
import signal

_scored = []


def digits(answer, row):
    """The share of short answers' characters that are digits or letters."""
    assert "question" in row
    return sum(c.isalnum() for c in answer) / max(1, len(answer))


def broken(answer, row):
    return 1 / 0


def nan(answer, row):
    return float("nan")


def killing(answer, row):
    """digits; the process dies at answer number KILL_AT_ANSWER."""
    _scored.append(answer)
    if len(_scored) == int(os.environ["KILL_AT_ANSWER"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return digits(answer, row)
