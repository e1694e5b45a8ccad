"""Weights in the formats of other programs: Hugging Face, the Hub, OpenLM and its wrappers."""
