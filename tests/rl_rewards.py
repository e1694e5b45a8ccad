"""Rewards for tests of reinforcement learning."""


def digits(answer, row):
    """The share of short answers' characters that are digits or letters."""
    assert "question" in row
    return sum(c.isalnum() for c in answer) / max(1, len(answer))


def broken(answer, row):
    return 1 / 0


def nan(answer, row):
    return float("nan")
