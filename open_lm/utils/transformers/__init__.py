"""OpenLM's `open_lm.utils.transformers`: the classes of `open_lm.hf` under their old names."""
