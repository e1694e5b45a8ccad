"""Checkpoints: written all-or-nothing, found, restored."""
