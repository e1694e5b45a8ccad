"""OpenLM's `open_lm.datapreprocess`: its tools under their old import names."""
