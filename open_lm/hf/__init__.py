"""Hugging Face transformers: `python -m open_lm.hf.export` and `python -m open_lm.hf.import_`."""
