import random

from hypothesis import given
from hypothesis import strategies as st
from icl_setup import task_of

from open_lm.evaluate.tasks.prompts import prompts, sample_shots

QA = [{"query": f"q{i}", "choices": [f"a{i}", f"b{i}"], "gold": i % 2} for i in range(4)]


def only(task, rows, n_shots):
    return list(prompts(task, rows, n_shots, prefix_space=True))


def test_a_question_without_examples_is_stripped_before_its_answer():
    task = task_of("x", "multiple_choice", continuation_delimiter="\nAnswer: ", prelimiter="Question: ")
    (first, *_) = only(task, QA, 0)
    assert (first.preamble, first.contexts) == ("", ("Question: q0\nAnswer:",))
    assert first.continuations == (" a0", " b0")
    assert first.gold == 0


def test_examples_stand_before_the_question_with_their_answers():
    task = task_of("x", "multiple_choice", prompt_string="Answer!", example_delimiter="\n\n")
    rows = QA[:2]
    (first, second) = only(task, rows, 1)
    assert first.preamble == "Answer!\n\nq1 b1"
    assert first.contexts == ("\n\nq0",)
    assert second.preamble == "Answer!\n\nq0 a0"


def test_without_prompt_the_first_example_has_no_delimiter():
    (first, _) = only(task_of("x", "multiple_choice"), QA[:2], 1)
    assert first.preamble == "q1 b1"


def test_schema_puts_prelimiter_and_delimiter_in_its_own_order():
    row = {"context_options": ["one", "two"], "continuation": "end", "gold": 1}
    task = task_of("x", "schema", prelimiter="P:", continuation_delimiter=" - ")
    (first, _) = only(task, [row, row], 1)
    assert first.preamble == "P:two - end"
    assert first.contexts == ("P:\none -", "P:\ntwo -")
    (plain, _) = only(task, [row, row], 0)
    assert plain.contexts == ("P:one", "P:two")
    assert plain.continuations == (" end",)


def test_continuations_get_no_space_from_tokenizers_that_add_their_own():
    task = task_of("x", "language_modeling")
    (first,) = prompts(task, [{"context": "a", "continuation": "b"}], 0, prefix_space=False)
    assert first.continuations == ("b",)


def test_a_chain_of_thought_is_shown_in_examples_only():
    task = task_of("x", "generation_task_with_answers", cot_delimiter=" So ")
    rows = [{"context": f"c{i}", "answer": f"a{i}", "chain_of_thought": f"t{i}"} for i in range(2)]
    (first, _) = only(task, rows, 1)
    assert first.preamble == "c1 t1 So a1"
    assert first.contexts == ("\nc0",)


@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 2**32))
def test_examples_are_distinct_and_never_the_question_itself(n_rows, n_shots, seed):
    generator = random.Random(seed)
    for index in range(n_rows):
        shots = sample_shots(n_rows, n_shots, index, generator)
        assert index not in shots
        # LLM Foundry's rule: with every other row drawn and the question among them, none replaces it
        assert len(shots) in (min(n_shots, n_rows - 1), n_rows - 2)
        assert shots <= set(range(n_rows))
