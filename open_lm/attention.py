"""OpenLM's `open_lm.attention`: its public names; the code is in `open_lm.model` and `open_lm.compat`."""

from open_lm.compat.model import ATTN_ACTIVATIONS, ATTN_SEQ_SCALARS, get_attn_func

__all__ = ["ATTN_ACTIVATIONS", "ATTN_SEQ_SCALARS", "get_attn_func"]
