"""OpenLM's `open_lm.datapreprocess.ray.tokenize_shuffle`: `main(argv)` of `openlm prepare-ray`."""

from open_lm.commands.prepare_ray import main

__all__ = ["main"]
