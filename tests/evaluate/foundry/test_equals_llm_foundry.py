"""Our engine against the real library: the same files, tokenizer and weights must give the same numbers."""

import importlib.util
import json

import pytest
from icl_setup import sample, task_of, tiny_model, tiny_tokenizer, write_rows
from shared import SHARED

from open_lm.distributed import World
from open_lm.evaluate.engine.runner import NativeRunner
from open_lm.evaluate.eval_model import EvalModel
from open_lm.evaluate.records import CheckpointRecords
from open_lm.evaluate.tasks.suite import Suite

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llmfoundry") is None, reason="LLM Foundry is not installed: `make install-eval`"
    ),
]
ICL = SHARED / "data" / "icl"
CALIBRATED = {
    kind: [f"InContextLearning{name}", f"InContextLearning{short}ExpectedCalibrationError"]
    for kind, name, short in [
        ("multiple_choice", "MultipleChoiceAccuracy", "MC"),
        ("schema", "MultipleChoiceAccuracy", "MC"),
        ("language_modeling", "LMAccuracy", "LM"),
    ]
}
SHARED_FILES = {
    "arc_easy": ("multiple_choice", {"continuation_delimiter": "\nAnswer: ", "num_fewshot": [0, 3]}),
    "boolq": ("multiple_choice", {"continuation_delimiter": "\nAnswer: "}),
    "copa": ("multiple_choice", {"num_fewshot": [0, 2]}),
    "jeopardy_all": (
        "language_modeling",
        {"continuation_delimiter": "\nAnswer: ", "has_categories": True, "num_fewshot": [2]},
    ),
    "lambada_openai": ("language_modeling", {}),
    "piqa": ("multiple_choice", {"continuation_delimiter": "\nAnswer: ", "prompt_string": "Choose.\n"}),
    "winograd_wsc": ("schema", {"num_fewshot": [0, 2], "prelimiter": "S: "}),
}


@pytest.fixture(scope="module")
def runners(tmp_path_factory):
    """Both engines over one suite: our sample files, and the first rows of the shared ones where they are."""
    from open_lm.evaluate.foundry.runner import FoundryRunner

    folder = tmp_path_factory.mktemp("equal")
    tokenizer = tiny_tokenizer(folder)
    model = tiny_model(seed=3, seq_len=384)
    eval_model = EvalModel(model, tokenizer, 384, 400, CheckpointRecords("tiny", "", "", tokenizer.name))
    suite = Suite(tasks=tuple(tasks(folder)), batch_size=16)
    settings = (eval_model, suite, World(), 384, "fp32")
    return NativeRunner(*settings), FoundryRunner(*settings)


def tasks(folder):
    for name, kind in [("python_words", "language_modeling"), ("python_imports", "schema")]:
        yield task_of(sample(name), kind, label=name, num_fewshot=[0, 3], metric_names=CALIBRATED[kind])
    yield task_of(
        sample("python_choices"), "multiple_choice", label="python_choices", num_fewshot=[1], example_delimiter="\n\n",
        metric_names=CALIBRATED["multiple_choice"],
    )  # fmt: skip
    yield task_of(
        sample("short_answers"), "generation_task_with_answers", label="short_answers", num_fewshot=[2],
        continuation_delimiter=" is ", early_stopping_criteria=["\n\n"],
    )  # fmt: skip
    for name, (kind, settings) in SHARED_FILES.items() if ICL.is_dir() else ():
        rows = [json.loads(line) for line in (ICL / f"{name}.jsonl").read_text().split("\n")[:24] if line]
        path = write_rows(folder / f"{name}.jsonl", rows)
        yield task_of(path, kind, label=name, metric_names=CALIBRATED[kind], **settings)


def test_every_number_of_every_task_is_llm_foundrys(runners):
    native, foundry = runners
    assert native.keys == foundry.keys
    different = {}
    for key in native.keys:
        ours, theirs = (runner.run(key, lambda n: None) for runner in runners)
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine.key, mine.metric, mine.questions) == (other.key, other.metric, other.questions)
            if mine.value != pytest.approx(other.value, abs=1e-6):
                different[key, mine.metric] = (mine.value, other.value)
    assert not different


def test_the_scores_would_notice_a_difference(runners):
    """Some right and some wrong in most tasks: equal numbers are not all nought or one."""
    native, _ = runners
    values = [record.value for key in native.keys for record in native.run(key, lambda n: None)]
    assert sum(0 < value < 1 for value in values) >= len(values) // 2
