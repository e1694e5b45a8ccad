"""SciPy and pandas, which only the fits and tables of a ladder need: imported here and nowhere else."""

from __future__ import annotations

from typing import Any

from open_lm.errors import ConfigError

PIP = "pip install scipy pandas"


def scipy_optimize() -> Any:
    """`scipy.optimize`.

    Raises:
        ConfigError: SciPy is not installed.
    """
    try:
        from scipy import optimize
    except ImportError as error:
        raise ConfigError(f"fitting a law needs SciPy, which is not installed: {PIP}") from error
    return optimize


def pandas() -> Any:
    """The module pandas.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pandas as module
    except ImportError as error:
        raise ConfigError(f"tables of a ladder need pandas, which is not installed: {PIP}") from error
    return module
