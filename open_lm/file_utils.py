"""OpenLM's `open_lm.file_utils`: its public names; the code is in `open_lm.model` and `open_lm.compat`."""

from open_lm.compat.model import pt_load

__all__ = ["pt_load"]
