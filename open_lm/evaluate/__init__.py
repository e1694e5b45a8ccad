"""Evaluation: validation loss and downstream tasks."""
