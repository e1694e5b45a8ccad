"""OpenLM's `open_lm.datapreprocess.ray`."""
