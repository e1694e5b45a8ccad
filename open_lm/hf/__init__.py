"""Between OpenLM and Hugging Face: `python -m open_lm.hf.export` and `python -m open_lm.hf.import_`."""
