"""Metric sinks, one per file."""
