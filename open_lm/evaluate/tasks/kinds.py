"""Task types, a class each: what a row must hold, how it becomes a prompt, what is measured. New ones join `KINDS`.

Delimiters and spaces are exactly LLM Foundry's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from open_lm.errors import DataError
from open_lm.evaluate.tasks.task import EXACT_MATCH, LM_ACCURACY, LM_CALIBRATION, MC_ACCURACY, MC_CALIBRATION, EvalTask

TaskRow = dict[str, Any]


@dataclass(frozen=True)
class TaskPrompt:
    """The texts of one question: what precedes it, its context (or contexts), and its possible continuations."""

    preamble: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


class TaskType:
    """A type of task; subclasses say how one differs from a context and one right continuation."""

    metrics: ClassVar[tuple[str, ...]]
    """The metrics of this kind; the first is the default."""
    keys: ClassVar[dict[str, str]]
    """Keys of a row, unless the task says otherwise."""
    generates: ClassVar[bool] = False
    """Whether the model writes an answer, instead of continuations being scored."""
    foundry_keys: ClassVar[tuple[str, ...]] = ("context_key",)
    """Settings that LLM Foundry's constructor of this type takes besides those of all types."""

    def checked(self, row: TaskRow, task: EvalTask, where: str) -> TaskRow:
        """The row, completed; `where` is its file and line.

        Raises:
            DataError: a key is missing or of the wrong kind.
        """
        raise NotImplementedError

    def answer(self, task: EvalTask, row: TaskRow) -> str:
        """The right answer, as an example shows it."""
        return row[task.answer_key]

    def shot(self, task: EvalTask, row: TaskRow, preceding: str) -> str:
        """A row with its right answer, as it stands before another question."""
        delimiter = task.example_delimiter if preceding else ""
        context = f"{delimiter}{task.prelimiter}{row[task.context_key]}{task.continuation_delimiter}"
        return context + self.answer(task, row)

    def prompt(self, task: EvalTask, row: TaskRow, preamble: str, prefix_space: bool) -> TaskPrompt:
        """The question after `preamble`."""
        delimiter = task.example_delimiter if preamble else ""
        context = f"{delimiter}{task.prelimiter}{row[task.context_key]}{task.continuation_delimiter}"
        context = context.rstrip() if task.strip_dataset else context
        texts = tuple(_spaced(text, prefix_space) for text in self.continuations(task, row))
        return TaskPrompt(preamble, (context,), texts, self.gold(row))

    def continuations(self, task: EvalTask, row: TaskRow) -> tuple[str, ...]:
        """The texts to score after the context."""
        return (row[task.answer_key],)

    def gold(self, row: TaskRow) -> int:
        """The number of the right continuation, or context."""
        return 0


class MultipleChoice(TaskType):
    """One context, several continuations, one of them right."""

    metrics = (MC_ACCURACY, MC_CALIBRATION)
    keys: ClassVar = {"context_key": "query", "answer_key": "answer", "choices_key": "choices"}

    def checked(self, row: TaskRow, task: EvalTask, where: str) -> TaskRow:
        text_of(row, task.context_key, where)
        _require_gold(row, _texts(row, task.choices_key, where, at_least=1), where)
        return row

    def answer(self, task: EvalTask, row: TaskRow) -> str:
        return row[task.choices_key][row["gold"]]

    def continuations(self, task: EvalTask, row: TaskRow) -> tuple[str, ...]:
        return tuple(row[task.choices_key])

    def gold(self, row: TaskRow) -> int:
        return row["gold"]


class LanguageModeling(TaskType):
    """One context and the continuation that the model should find likeliest, token by token."""

    metrics = (LM_ACCURACY, LM_CALIBRATION)
    keys: ClassVar = {"context_key": "context", "answer_key": "continuation"}

    def checked(self, row: TaskRow, task: EvalTask, where: str) -> TaskRow:
        text_of(row, task.context_key, where)
        text_of(row, task.answer_key, where, empty=False)
        return row


class Schema(TaskType):
    """Several contexts, one continuation: which context makes it likeliest."""

    metrics = (MC_ACCURACY, MC_CALIBRATION)
    keys: ClassVar = {"context_key": "context_options", "answer_key": "continuation", "choices_key": "context_options"}
    foundry_keys = ()

    def checked(self, row: TaskRow, task: EvalTask, where: str) -> TaskRow:
        text_of(row, "continuation", where, empty=False)
        _require_gold(row, _texts(row, task.choices_key, where, at_least=1), where)
        return row

    def shot(self, task: EvalTask, row: TaskRow, preceding: str) -> str:
        delimiter = task.example_delimiter if preceding else ""  # LLM Foundry has this order here, and only here
        context = f"{task.prelimiter}{delimiter}{row[task.choices_key][row['gold']]}"
        return f"{context}{task.continuation_delimiter}{row['continuation']}"

    def prompt(self, task: EvalTask, row: TaskRow, preamble: str, prefix_space: bool) -> TaskPrompt:
        continuation = _spaced(row["continuation"], prefix_space)
        return TaskPrompt(preamble, self._contexts(task, row, preamble), (continuation,), row["gold"])

    def _contexts(self, task: EvalTask, row: TaskRow, preamble: str) -> tuple[str, ...]:
        options = row[task.choices_key]
        if not preamble:
            return tuple(f"{task.prelimiter}{option}" for option in options)
        delimiter = task.continuation_delimiter
        delimiter = delimiter.rstrip() if task.strip_dataset else delimiter
        return tuple(f"{task.prelimiter}{task.example_delimiter}{option}{delimiter}" for option in options)


class Generation(TaskType):
    """One context, after which the model writes; right when it is the answer or an alias of it."""

    metrics = (EXACT_MATCH,)
    keys: ClassVar = {"context_key": "context", "answer_key": "answer"}
    generates = True
    foundry_keys = ("cot_delimiter", "do_normalization", "early_stopping_criteria", "generation_kwargs")

    def checked(self, row: TaskRow, task: EvalTask, where: str) -> TaskRow:
        text_of(row, "context", where)
        text_of(row, "answer", where)
        if row.get("aliases") is not None:
            _texts(row, "aliases", where, at_least=0)
        return row | {"aliases": list(dict.fromkeys([row["answer"], *(row.get("aliases") or [])]))}

    def answer(self, task: EvalTask, row: TaskRow) -> str:
        """The answer; with its chain of thought where the file has one."""
        if "chain_of_thought" in row:
            return f"{row['chain_of_thought'] or ''}{task.cot_delimiter}{row[task.answer_key]}"
        return row[task.answer_key]

    def continuations(self, task: EvalTask, row: TaskRow) -> tuple[str, ...]:
        return ()


KINDS: dict[str, TaskType] = {
    "multiple_choice": MultipleChoice(),
    "language_modeling": LanguageModeling(),
    "schema": Schema(),
    "generation_task_with_answers": Generation(),
}


def type_of(task: EvalTask) -> TaskType:
    """The type of a task that was read and checked."""
    return KINDS[task.icl_task_type]


def text_of(row: TaskRow, key: str, where: str, *, empty: bool = True) -> str:
    """The text under `key`.

    Raises:
        DataError: there is none.
    """
    value = row.get(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        found = "nothing" if key not in row else repr(value)
        raise DataError(f"{where}: key {key!r}: found {found}, need text. Keys there: {', '.join(row) or 'none'}.")
    return value


def _texts(row: TaskRow, key: str, where: str, *, at_least: int) -> list[str]:
    value = row.get(key)
    if not isinstance(value, list) or len(value) < at_least or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: key {key!r}: found {value!r:.80}, need a list of at least {at_least} texts.")
    return value


def _require_gold(row: TaskRow, choices: list[str], where: str) -> None:
    gold = row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise DataError(f"{where}: key 'gold': found {gold!r}, need the number of a choice, 0 to {len(choices) - 1}.")


def _spaced(text: str, prefix_space: bool) -> str:
    return f" {text}" if prefix_space and not text.startswith(" ") else text
