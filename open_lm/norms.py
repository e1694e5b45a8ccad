"""OpenLM's `open_lm.norms`: its public names; the code is in `open_lm.model` and `open_lm.compat`."""

from open_lm.compat.model import get_norm_class

__all__ = ["get_norm_class"]
