"""Thin adapters under OpenLM's old names, so that scripts written for OpenLM import and run."""
