"""Suites that others wrote run as they are: DCLM's CORE in both versions, its folders, its code tasks left out."""

import json

import pytest
import torch
from icl_setup import tiny_model, tiny_tokenizer, write_rows

from open_lm.errors import ConfigError
from open_lm.evaluate.averages import gauntlet_averages
from open_lm.evaluate.engine.batching import plan_batches
from open_lm.evaluate.engine.encode import Choice, Question
from open_lm.evaluate.engine.scoring import Scorer
from open_lm.evaluate.tasks.suite import read_suite
from open_lm.precision import Precision

CHOICE = {"icl_task_type": "multiple_choice", "num_fewshot": [0]}


def suite_of(path, tasks, **more):
    path.write_text(json.dumps({"icl_tasks": tasks, **more}))
    return str(path)


def test_core_is_computed_with_the_baselines_of_both_versions():
    suite = read_suite("dclm_core.yaml")
    assert len(suite.tasks) == 22
    found = {f"{task.label}/{task.num_fewshot[0]}-shot": 0.5 for task in suite.tasks}
    averages = gauntlet_averages(suite.gauntlet, found)
    same = {"hellaswag_zeroshot": 0.25, "jeopardy": 0, "bigbench_qa_wikidata": 0, "arc_easy": 0.25,
            "arc_challenge": 0.25, "copa": 0.5, "piqa": 0.5, "openbook_qa": 0.25, "lambada_openai": 0,
            "hellaswag": 0.25, "winograd": 0.5,
            "winogrande": 0.5, "bigbench_dyck_languages": 0, "bigbench_cs_algorithms": 0, "bigbench_operators": 0,
            "bigbench_repeat_copy_logic": 0, "squad": 0, "coqa": 0, "boolq": 0.62}  # fmt: skip
    changed = {"commonsense_qa": (0.2, 0.403), "agi_eval_lsat_ar": (0.2, 0.25)}
    changed["bigbench_language_identification"] = (0.091, 0.25)
    for version, name in enumerate(("core_v1", "core_v2")):
        baselines = [*same.values(), *(both[version] for both in changed.values())]
        expected = sum((0.5 - b) / (1 - b) for b in baselines) / 22
        assert averages[name] == pytest.approx(expected)
    assert averages["core"] == averages["core_v2"]


def test_code_tasks_are_skipped_by_name_and_the_others_run(tmp_path, caplog):
    write_rows(tmp_path / "a.jsonl", [{"query": "a", "choices": ["b", "c"], "gold": 0}])
    tasks = [
        {"label": "plain", "dataset_uri": "a.jsonl", **CHOICE},
        {"label": "human_eval", "dataset_uri": "h.jsonl", "icl_task_type": "code_evaluation", "num_fewshot": [0],
         "pass_at_k": 1, "num_beams": 20, "batch_size": 1},
    ]  # fmt: skip
    suite = read_suite(suite_of(tmp_path / "t.yaml", tasks))
    assert [task.label for task in suite.tasks] == ["plain"]
    assert "1 tasks skipped, of types that are not run here: human_eval (code_evaluation)" in caplog.text
    with pytest.raises(ConfigError, match="pass_at_k needs the written programs to be run"):
        read_suite(suite_of(tmp_path / "p.yaml", [{**tasks[0], "pass_at_k": 1}]))


def test_two_tasks_of_one_name_are_refused_and_one_task_at_two_numbers_of_examples_is_not(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"query": "a", "choices": ["b", "c"], "gold": 0}])
    task = {"label": "mmlu", "dataset_uri": "a.jsonl", **CHOICE}
    with pytest.raises(ConfigError, match="two tasks are called mmlu at 0-shot"):
        read_suite(suite_of(tmp_path / "t.yaml", [task, {**task, "dataset_uri": "b.jsonl"}]))
    assert len(read_suite(suite_of(tmp_path / "t.yaml", [task, {**task, "num_fewshot": [5]}])).tasks) == 2


def test_files_below_eval_are_found_from_the_folder_above_as_the_downloader_leaves_them(tmp_path, monkeypatch):
    (tmp_path / "eval/local_data").mkdir(parents=True)
    write_rows(tmp_path / "eval/local_data/a.jsonl", [{"query": "a", "choices": ["b", "c"], "gold": 0}])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yamls").mkdir()
    path = suite_of(tmp_path / "yamls/t.yaml", [{"label": "a", "dataset_uri": "local_data/a.jsonl", **CHOICE}])
    assert read_suite(path).tasks[0].data_path == str(tmp_path / "eval/local_data/a.jsonl")


def test_scores_of_attention_scaled_by_length_do_not_depend_on_the_batch(tmp_path):
    scaled = {"attn_name": "custom_attn", "attn_activation": "relu", "attn_seq_scalar": "max",
              "attn_seq_scalar_alpha": 1.0}  # fmt: skip
    model, encode = tiny_model(**scaled), tiny_tokenizer(tmp_path).encode
    scorer = Scorer(model, torch.device("cpu"), Precision("fp32", "cpu"))
    pairs = [("if x", " in"), ("for every item of the list of items", " in y: return z"), ("def f", " x y")]
    choices = [Choice(tuple(encode(a)), tuple(encode(b))) for a, b in pairs]

    def scores(chosen):
        questions = [Question((choice,), 0, False) for choice in chosen]
        batches = plan_batches(questions, 4096, share_beginnings=scorer.runs_trees)
        return {name: score for batch in batches for name, score in scorer.score(batch).items()}

    together = scores(choices)
    for number, choice in enumerate(choices):
        (alone,) = scores([choice]).values()
        ids = torch.tensor([choice.context + choice.continuation[:-1]])
        log_probs = model(ids)[0].log_softmax(-1)[0, len(choice.context) - 1 :]
        expected = -log_probs.gather(1, torch.tensor(choice.continuation)[:, None]).mean().item()
        assert alone.cross_entropy == pytest.approx(expected, rel=1e-5)
        assert together[number, 0].cross_entropy == pytest.approx(alone.cross_entropy, rel=1e-5)


def test_a_published_folder_is_scored_with_the_tokenizer_that_lies_in_it(tmp_path):
    import published_folder

    from open_lm.evaluate.command import evaluate
    from open_lm.evaluate.flags import EvalConfig
    from open_lm.model.config import ModelFlags

    folder, *_ = published_folder.make(tmp_path / "DCLM-tiny", nested=True, vocab_size=420)
    write_rows(tmp_path / "a.jsonl", [{"query": "Machine", "choices": ["learning", "study"], "gold": 0}])
    path = suite_of(tmp_path / "t.yaml", [{"label": "a", "dataset_uri": str(tmp_path / "a.jsonl"), **CHOICE}])
    config = EvalConfig(eval_yaml=path, checkpoint=(str(folder),), output_dir=str(tmp_path / "out"), device="cpu")
    (run,) = evaluate(config, ModelFlags()).runs
    assert (run.name, run.tokenizer, len(run.records)) == ("DCLM-tiny", str(folder), 1)
