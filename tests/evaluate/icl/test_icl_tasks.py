import pytest
from icl_setup import sample, task_of, write_rows

from open_lm.errors import ConfigError, DataError, OpenLMError
from open_lm.evaluate.tasks.entry import read_task
from open_lm.evaluate.tasks.rows import read_rows
from open_lm.evaluate.tasks.suite import read_suite, require_data

ENTRY = {"label": "a", "dataset_uri": "a.jsonl", "icl_task_type": "language_modeling", "num_fewshot": [0, 3]}


def test_a_task_takes_llm_foundrys_defaults():
    task = read_task(ENTRY, "y")
    assert task.num_fewshot == (0, 3)
    assert (task.example_delimiter, task.continuation_delimiter, task.prelimiter) == ("\n", " ", "")
    assert task.metric_names == ("InContextLearningLMAccuracy",)
    assert task.fewshot_random_seed == 1234


def test_old_spellings_are_understood():
    task = read_task({**ENTRY, "icl_task_type": "question_answering", "question_prelimiter": "Q: "}, "y")
    assert (task.icl_task_type, task.prelimiter) == ("generation_task_with_answers", "Q: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"icl_task_type": "essay"}, "'essay' is unknown"),
        ({"num_fewshots": 1}, "Did you mean num_fewshot"),
        ({"num_fewshot": ["many"]}, "num_fewshot: found 'many'"),
        ({"num_fewshot": -1}, "below 0"),
        ({"label": None}, "no label"),
        ({"has_categories": "yes"}, "has_categories: found 'yes'"),
        ({"metric_names": ["Accuracy"]}, "not defined for language_modeling"),
    ],
)
def test_a_wrong_entry_is_named(change, said):
    with pytest.raises(ConfigError, match=said):
        read_task({**ENTRY, **change}, "tasks.yaml: icl_tasks[0]")


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": 2}, r"a.jsonl:2: key 'gold': found 2"),
        ("multiple_choice", {"query": "q", "choices": "ab", "gold": 0}, r"a.jsonl:2: key 'choices'"),
        ("multiple_choice", {"choices": ["a", "b"], "gold": 0}, r"a.jsonl:2: key 'query': found nothing"),
        ("language_modeling", {"context": "c", "continuation": " "}, r"a.jsonl:2: key 'continuation'"),
        ("schema", {"context_options": [], "continuation": "c", "gold": 0}, r"a.jsonl:2: key 'context_options'"),
        ("generation_task_with_answers", {"context": "c"}, r"a.jsonl:2: key 'answer'"),
        ("language_modeling", ["c"], r"a.jsonl:2: holds a list"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path, kind, row, said):
    good = {"query": "q", "choices": ["a", "b"], "gold": 0, "context": "c", "continuation": "d", "answer": "e"}
    good["context_options"] = ["a", "b"]
    path = write_rows(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(DataError, match=said):
        read_rows(task_of(path, kind))


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"context": "a", "continuation": "b"}\n{"context": \n')
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON"):
        read_rows(task_of(tmp_path / "a.jsonl", "language_modeling"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="no rows"):
        read_rows(task_of(tmp_path / "a.jsonl", "language_modeling"))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(OpenLMError, match=r"a\.jsonl"):
        read_rows(task_of(tmp_path / "a.jsonl", "language_modeling"))


def test_unicode_line_separators_do_not_split_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"context": "a\u2028b", "continuation": "c"}\n')
    (row,) = read_rows(task_of(tmp_path / "a.jsonl", "language_modeling")).rows
    assert row["context"] == "a\u2028b"


def test_a_suite_reads_what_llm_foundry_writes(tmp_path):
    (tmp_path / "tasks.yaml").write_text(f"icl_tasks:\n- {{label: a, dataset_uri: {sample('python_words')}, "
                                         "icl_task_type: language_modeling, num_fewshot: [0]}\n")  # fmt: skip
    path = tmp_path / "eval.yaml"
    path.write_text(
        "max_seq_len: 64\ndevice_eval_batch_size: 4\nprecision: amp_bf16\nseed: 28\nloggers: {}\n"
        "icl_tasks: tasks.yaml\n"
        "fsdp_config: {sharding_strategy: FULL_SHARD}\neval_gauntlet: {weighting: EQUAL, categories: []}\n"
    )
    suite = read_suite(str(path))
    require_data(suite)
    assert [task.label for task in suite.tasks] == ["a"]
    assert (suite.max_seq_len, suite.batch_size, suite.precision, suite.seed) == (64, 4, "amp_bf16", 28)
    assert suite.gauntlet == {"weighting": "EQUAL", "categories": []}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "readable YAML"),
        ("- 1", "holds a list"),
        ("max_seq_len: 1", "need a list of tasks"),
        ("precision: banana\nicl_tasks: [{label: a, dataset_uri: b, icl_task_type: schema, num_fewshot: 0}]", "banana"),
        ("max_seq_len: x\nicl_tasks: [{label: a, dataset_uri: b, icl_task_type: schema, num_fewshot: 0}]", "'x'"),
    ],
)
def test_a_wrong_yaml_is_an_error(tmp_path, text, said):
    (tmp_path / "y.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_suite(str(tmp_path / "y.yaml"))


@pytest.mark.parametrize(
    ("uri", "advice"), [("eval/local_data/b.jsonl", "openlm download tasks"), ("no/b.jsonl", "Correct dataset_uri")]
)
def test_missing_data_is_named_with_what_to_do(tmp_path, uri, advice):
    (tmp_path / "y.yaml").write_text(
        f"icl_tasks: [{{label: a, dataset_uri: {uri}, icl_task_type: schema, num_fewshot: 0}}]"
    )
    with pytest.raises(ConfigError, match=rf"a \({uri}\).*{advice}"):
        require_data(read_suite(str(tmp_path / "y.yaml")))


def test_an_unknown_task_name_is_an_error(tmp_path):
    (tmp_path / "y.yaml").write_text("icl_tasks: [{label: a, dataset_uri: b, icl_task_type: schema, num_fewshot: 0}]")
    with pytest.raises(ConfigError, match="--tasks z"):
        read_suite(str(tmp_path / "y.yaml"), only=["z"])
