"""Points of a fit: parameters, tokens, loss and task error of runs, from any table with named columns."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_lm.errors import ConfigError, DataError
from open_lm.ladder.laws import Array
from open_lm.ladder.science import pandas
from open_lm.ladder.sizes import label_params

FLOPS_PER_PARAM_TOKEN = 6
"""C = 6 N D, where a table holds compute instead of tokens."""
_OPERATORS = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_CONDITION = re.compile(r"\s*(.+?)\s*(==|!=|<=|>=|<|>|=)\s*(.+?)\s*")


@dataclass(frozen=True)
class Points:
    """K runs, or K checkpoints of runs; `error` is NaN where it was not measured."""

    n: Array
    d: Array
    loss: Array
    error: Array
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.n)

    @property
    def flops(self) -> Array:
        return FLOPS_PER_PARAM_TOKEN * self.n * self.d

    def take(self, chosen: Any) -> Points:
        """The points of a boolean mask or of indices."""
        indices = np.arange(len(self))[chosen]
        names = tuple(self.names[k] for k in indices)
        return Points(self.n[indices], self.d[indices], self.loss[indices], self.error[indices], names)


@dataclass(frozen=True)
class TableColumns:
    """Names of a table's columns; of `tokens`, `flops` and `ratio` (tokens per parameter) one is enough."""

    params: str = "num_params"
    loss: str = "loss"
    tokens: str | None = "tokens"
    flops: str | None = None
    ratio: str | None = None
    error: tuple[str, ...] = ()
    """Columns of task scores; the error is 1 minus their mean. With `errors_given` their mean itself."""
    errors_given: bool = False
    name: str | None = None


def read_table(path: str) -> Any:
    """The CSV, JSON (records) or pickle at `path` as a data frame.

    Raises:
        DataError: it is missing or not a table.
    """
    pd = pandas()
    readers = {".csv": pd.read_csv, ".json": pd.read_json, ".pkl": pd.read_pickle, ".tsv": _read_tsv}
    ending = next((e for e in readers if path.endswith(e)), None)
    if ending is None:
        raise ConfigError(f"--data {path}: give a .csv, .tsv, .json or .pkl table.")
    try:
        frame = readers[ending](path)
    except (OSError, ValueError, EOFError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise DataError(f"--data {path}: not readable as a table ({error}).") from error
    if not len(frame):
        raise DataError(f"--data {path}: the table has no rows.")
    return frame


def _read_tsv(path: str) -> Any:
    return pandas().read_csv(path, sep="\t")


def where(frame: Any, conditions: Sequence[str], flag: str = "--where") -> Any:
    """The rows of `frame` that meet all conditions, each `COLUMN OP VALUE` such as "dataset=rpj" or "params<1e9".

    Raises:
        ConfigError: a condition does not parse, names no column, or leaves nothing.
    """
    for condition in conditions:
        frame = frame[_mask(frame, condition, flag)]
        if not len(frame):
            raise ConfigError(f"{flag} {condition!r} leaves no row.")
    return frame


def split(frame: Any, conditions: Sequence[str], flag: str) -> tuple[Any, Any]:
    """The rows of `frame` that do not meet all conditions, and those that do; by place, for names may repeat.

    Raises:
        ConfigError: a condition does not parse, names no column, or no row meets all.
    """
    chosen = np.full(len(frame), bool(conditions))
    for condition in conditions:
        chosen &= np.asarray(_mask(frame, condition, flag))
        if not chosen.any():
            raise ConfigError(f"{flag} {condition!r} leaves no row.")
    return frame[~chosen], frame[chosen]


def _mask(frame: Any, condition: str, flag: str) -> Any:
    found = _CONDITION.fullmatch(condition)
    if found is None:
        raise ConfigError(f"{flag} {condition!r}: give COLUMN OP VALUE, with one of = != < > <= >=.")
    column, operator, value = found.groups()
    operator = "==" if operator == "=" else operator
    require_column(frame, column, flag)
    values, types = frame[column], pandas().api.types
    if types.is_bool_dtype(values):
        if value.lower() not in _TRUTH or operator not in ("==", "!="):
            raise ConfigError(f"{flag} {condition!r}: {column} is true or false: give {column}=true or {column}=false.")
        return _OPERATORS[operator](values, _TRUTH[value.lower()])
    if types.is_numeric_dtype(values):
        try:
            return _OPERATORS[operator](values, float(value))
        except ValueError:
            raise ConfigError(f"{flag} {condition!r}: {column} holds numbers, {value!r} is none.") from None
    if operator in ("==", "!="):
        return _OPERATORS[operator](values.astype(str), value)
    words = [*values.astype(str), value]
    sizes = [_quantity(word) for word in words]
    if None in sizes:
        raise ConfigError(
            f"{flag} {condition!r}: {words[sizes.index(None)]!r} is no number and no size such as 60M: {operator} has "
            "no meaning. Compare a column of numbers, such as num_params, or use = and !=."
        )
    return _OPERATORS[operator](np.array(sizes[:-1], dtype=np.float64), sizes[-1])


def _quantity(word: str) -> float | None:
    """The number that a word or a label such as 370M stands for; text sorts 60M above it."""
    try:
        return float(word)
    except ValueError:
        return label_params(word)


def require_column(frame: Any, column: str, flag: str) -> None:
    """Refuse a name that is not a column.

    Raises:
        ConfigError: naming the columns there are.
    """
    if column not in frame.columns:
        raise ConfigError(f"{flag} {column}: no such column. There are: {', '.join(map(str, frame.columns))}.")


def points_of(frame: Any, columns: TableColumns, *, drop_first: int = 0) -> Points:
    """The points in `frame`, without its first `drop_first` rows and without rows that miss a value.

    Raises:
        ConfigError: a column is missing.
        DataError: a value is no positive number.
    """
    frame = frame.iloc[drop_first:]
    n = numbers(frame, columns.params, "--params-column")
    loss = numbers(frame, columns.loss, "--loss-column")
    if columns.flops is not None:
        with np.errstate(divide="ignore", invalid="ignore"):  # an N of 0 is refused below
            d = numbers(frame, columns.flops, "--flops-column") / (FLOPS_PER_PARAM_TOKEN * n)
    elif columns.ratio is not None:
        d = numbers(frame, columns.ratio, "--ratio-column") * n
    else:
        d = numbers(frame, columns.tokens or "tokens", "--tokens-column")
    names = frame[columns.name].astype(str) if columns.name else frame.index.astype(str)
    points = Points(n, d, loss, _errors(frame, columns), tuple(names))
    whole = np.isfinite(n) & (np.isfinite(d) | (n <= 0)) & np.isfinite(loss)
    if not whole.all():
        left_out = ", ".join(points.names[k] for k in np.flatnonzero(~whole)[:5])
        logging.warning(
            "%d of %d rows lack a finite loss, N or D and are left out: %s", (~whole).sum(), len(n), left_out
        )
    points = points.take(whole)
    for what, values in (("parameters", points.n), ("tokens", points.d), ("loss", points.loss)):
        if (values <= 0).any():
            name = points.names[int(np.argmax(values <= 0))]
            raise DataError(f"row {name}: {what} {values.min():g} is not positive; a power law needs that it is.")
    return points


def _errors(frame: Any, columns: TableColumns) -> Array:
    if not columns.error:
        return np.full(len(frame), np.nan)
    flag = "--error-columns" if columns.errors_given else "--score-columns"
    low, high = (0, 2) if columns.errors_given else (-1, 1)  # centred accuracies are negative below chance
    scores = np.stack([_shares(frame, column, flag, low, high) for column in columns.error]).mean(axis=0)
    return scores if columns.errors_given else 1 - scores


def _shares(frame: Any, column: str, flag: str, low: float, high: float) -> Array:
    """A column of accuracies or errors.

    Raises:
        DataError: a value is outside [low, high], so in percent.
    """
    values = numbers(frame, column, flag)
    outside = (values < low) | (values > high)
    if outside.any():
        raise DataError(
            f"{flag} {column}: {values[outside][0]:g} is outside [{low}, {high}]. Accuracies and errors are shares of "
            "1: divide percentages by 100."
        )
    return values


def numbers(frame: Any, column: str, flag: str) -> Array:
    """A column as floats; `flag` named it.

    Raises:
        ConfigError: there is no such column.
        DataError: a value is no number.
    """
    require_column(frame, column, flag)
    try:
        return np.asarray(frame[column], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{flag} {column}: not all numbers ({error}).") from error
