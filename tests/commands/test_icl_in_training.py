"""Scores on tasks while a model trains: those of its checkpoint, on any number of ranks, and nothing disturbed."""

import json

import pytest
from icl_setup import SAMPLES, write_rows, write_tokenizer
from runs import flags, folder_of, metrics, run, run_command, weights, write_data

from open_lm import load_model
from open_lm.distributed import World
from open_lm.errors import ConfigError, DataError

KINDS = {"python_words": "language_modeling", "python_choices": "multiple_choice"}
WORDS, CHOICES = "icl/python_words/accuracy", "icl/python_choices/accuracy"
WORDS_KEY = "python_words/0-shot/InContextLearningLMAccuracy"
CHOICES_KEY = "python_choices/0-shot/InContextLearningMultipleChoiceAccuracy"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Shards, a model of their vocabulary, a tokenizer, and a YAML of tasks."""
    folder = tmp_path_factory.mktemp("icl")
    shape = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 16, "vocab_size": 400}
    (folder / "model.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    tasks = [
        {"label": name, "dataset_uri": str(SAMPLES / f"{name}.jsonl"), "icl_task_type": kind, "num_fewshot": [0]}
        for name, kind in KINDS.items()
    ]
    further = {
        "answers": ("generation_task_with_answers", [{"context": f"c {i}", "answer": "x"} for i in range(5)]),
        "options": ("schema", [{"context_options": ["a", f"b {i}"], "continuation": "c", "gold": 0} for i in range(9)]),
    }
    for name, (kind, rows) in further.items():
        path = write_rows(folder / f"{name}.jsonl", rows)
        tasks.append({"label": name, "dataset_uri": str(path), "icl_task_type": kind, "num_fewshot": [0]})
    benchmarks = [{"name": "python_choices", "num_fewshot": 0, "random_baseline": 0.5}]
    gauntlet = {"categories": [{"name": "choices", "benchmarks": benchmarks}], "averages": {"centred": ["choices"]}}
    (folder / "tasks.yaml").write_text(json.dumps({"icl_tasks": tasks, "eval_gauntlet": gauntlet}))
    return {
        "manifest": write_data(folder / "data", vocab=400),
        "model": ["--model", str(folder / "model.json")],
        "tokenizer": write_tokenizer(folder / "tokenizer.json"),
        "tasks": str(folder / "tasks.yaml"),
        "folder": folder,
    }


def asked(files, *more):
    return [*files["model"], "--icl-tasks", files["tasks"], "--tokenizer", files["tokenizer"], *more]


def scores_of_checkpoint(files, tmp_path, name="run"):
    """The same tasks asked of the run's last checkpoint, by the engine alone."""
    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.evaluate.engine.icl import evaluate_icl
    from open_lm.evaluate.tasks.suite import read_suite

    model = load_model(folder_of(tmp_path, name) / "checkpoints" / "epoch_1.pt")
    tokenizer = load_tokenizer(files["tokenizer"])
    return evaluate_icl(model, tokenizer, read_suite(files["tasks"]).tasks, world=World(), max_seq_len=16)


def test_scores_are_those_of_the_checkpoint_and_training_is_not_disturbed(tmp_path, files):
    run(tmp_path, files["manifest"], *files["model"], name="without")
    result = run(tmp_path, files["manifest"], *asked(files, "--icl-every-steps", "5"))
    assert list(metrics(tmp_path, key=WORDS)) == [5, 10, 12]
    expected = scores_of_checkpoint(files, tmp_path)
    assert metrics(tmp_path, key=CHOICES)[12] == expected[CHOICES_KEY]
    assert result.scores["python_choices/accuracy"] == metrics(tmp_path, key=CHOICES)[12]
    assert result.scores["centred"] == pytest.approx(2 * result.scores["python_choices/accuracy"] - 1)
    assert set(result.scores) == {
        *(f"{name}/accuracy" for name in (*KINDS, "options")), "answers/exact_match", "choices", "centred",
    }  # fmt: skip
    assert metrics(tmp_path) == metrics(tmp_path, "without")
    before, after = weights(tmp_path, "without"), weights(tmp_path)
    assert all((before[key] == after[key]).all() for key in before)
    assert "tasks | python_words/accuracy" in (folder_of(tmp_path) / "out.log").read_text()


def test_intervals_count_as_they_do_for_validation(tmp_path, files):
    more = ["--num-checkpoints", "4", "--icl-frequency", "2"]
    run(tmp_path, files["manifest"], *asked(files, *more))
    assert list(metrics(tmp_path, key=WORDS)) == [6, 12]
    run(tmp_path, files["manifest"], *asked(files, "--icl-frequency", "0"), name="at_the_end")
    assert list(metrics(tmp_path, "at_the_end", key=WORDS)) == [12]


@pytest.mark.parametrize("how", [["--fsdp"], [], pytest.param(["--mesh", "tp=2"], marks=pytest.mark.slow)])
def test_two_ranks_ask_each_question_once_and_agree_with_one(tmp_path, files, how):
    arguments = flags(tmp_path, files["manifest"], *asked(files, "--icl-every-steps", "6", *how))
    done = run_command(arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    expected = scores_of_checkpoint(files, tmp_path)
    assert list(metrics(tmp_path, key=WORDS)) == [6, 12]
    assert metrics(tmp_path, key=WORDS)[12] == expected[WORDS_KEY]
    assert metrics(tmp_path, key=CHOICES)[12] == expected[CHOICES_KEY]


@pytest.mark.parametrize(
    ("rows", "error", "said"),
    [
        (None, ConfigError, "--icl-tasks .*no data for bad"),
        (["{"], DataError, r"bad.jsonl:1: not JSON"),
        ([json.dumps({"context": "a", "continuation": "b"}), "{}"], DataError, r"bad.jsonl:2: key 'context'"),
        ([json.dumps({"context": "a", "continuation": "word " * 90})], DataError, r"bad.jsonl:1: a continuation of"),
        ([], DataError, "no rows"),
    ],
)
def test_bad_tasks_are_refused_before_the_first_step(tmp_path, files, rows, error, said):
    if rows is not None:
        (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    task = {"label": "bad", "dataset_uri": str(tmp_path / "bad.jsonl"), "icl_task_type": "language_modeling"}
    (tmp_path / "bad.yaml").write_text(json.dumps({"icl_tasks": [{**task, "num_fewshot": [0]}]}))
    with pytest.raises(error, match=said):
        run(tmp_path, files["manifest"], *asked(files, "--icl-tasks", str(tmp_path / "bad.yaml")))
    assert not metrics(tmp_path)


def test_an_unknown_tokenizer_or_one_of_another_vocabulary_is_refused(tmp_path, files):
    with pytest.raises(ConfigError, match=r"--icl-tasks needs to know the tokenizer.*--tokenizer"):
        run(tmp_path, files["manifest"], *files["model"], "--icl-tasks", files["tasks"])
    small = write_data(tmp_path / "small")
    with pytest.raises(ConfigError, match="400 tokens, the model has 16 embeddings"):
        run(tmp_path, small, "--icl-tasks", files["tasks"], "--tokenizer", files["tokenizer"], name="small")
