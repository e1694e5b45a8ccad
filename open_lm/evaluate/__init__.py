"""Evaluation: validation loss and downstream tasks."""

from open_lm.flags import late_names

__getattr__ = late_names(__name__, "open_lm.compat.evaluation", ("evaluate_loop",))
