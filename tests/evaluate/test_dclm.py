"""DCLM's own numbers, from its published scores of DCLM-7B: every mean of its results file, to the last digits."""

import json
from pathlib import Path

import pytest
from icl_setup import tiny_model, write_checkpoint, write_rows, write_tokenizer

from open_lm.errors import ConfigError
from open_lm.evaluate.command import evaluate
from open_lm.evaluate.dclm import dclm_results, read_metadata, scores_by_task
from open_lm.evaluate.flags import EvalConfig
from open_lm.evaluate.records import CheckpointRecords, Record
from open_lm.model.config import ModelFlags

PUBLISHED = json.loads(Path(__file__).with_name("dclm_7b_8k.json").read_text())


def record(label, value, shots=0, category=None, metric="InContextLearningMultipleChoiceAccuracy"):
    key = f"{label}/{shots}-shot" + (f"/{category}" if category else "")
    return Record(key, label, shots, category, metric, value, None, None, 10, 0, 0.0, "", "")


def run_of(scores):
    return CheckpointRecords("run/epoch_1", "p", "open_lm_7b", "t", weights="w1:0",
                             records=[record(label, value) for label, value in scores.items()])  # fmt: skip


def test_every_mean_of_a_published_file_comes_out():
    found = dclm_results(run_of(PUBLISHED["icl"]), "heavy", read_metadata(None))
    assert found["eval_metrics"] == {"icl": PUBLISHED["icl"]}
    for key, value in PUBLISHED["published"].items():
        assert found[key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-12)), key
    assert found["Core_v1"] == found["Core"] and found["Extended_v1"] == found["Extended"]
    changed = {"commonsense_qa": (0.2, 0.403), "agi_eval_lsat_ar": (0.2, 0.25)}
    changed["bigbench_language_identification"] = (0.091, 0.25)
    moved = sum((PUBLISHED["icl"][task] - b) / (1 - b) * sign for task, both in changed.items()
                for b, sign in zip(both, (-1, 1), strict=True))  # fmt: skip
    assert found["Core_v2"] == pytest.approx(found["Core_v1"] + moved / 22, abs=1e-12)
    assert found["Extended_v2"].startswith("N/A without --dclm-metadata: give eval/eval_meta_data.csv of")


def test_dclms_own_table_gives_version_2_of_extended(tmp_path):
    known = read_metadata(None)
    rows = [f'{name},{known.category[name]},multiple choice,0,1,{base * 100},,"a, b"' for name, base in
            (known.baseline | {"siqa": 0.5}).items()]  # fmt: skip
    header = "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description"
    (tmp_path / "meta.csv").write_text("\ufeff" + "\r\n".join([header, *rows]) + "\r\n")  # as a spreadsheet saves it
    found = dclm_results(run_of(PUBLISHED["icl"]), "heavy", read_metadata(str(tmp_path / "meta.csv")))
    siqa = PUBLISHED["icl"]["siqa"]
    moved = (siqa - 0.5) / 0.5 - (siqa - 0.333) / (1 - 0.333)
    assert found["Extended_v2"] == pytest.approx(found["Extended_v1"] + moved / 53)
    for text in (
        "a,b\n1,2\n",
        f"{header}\ncopa,x,y,0,1,100,,\n",
        f"{header}\ncopa,x,y,0,1,nan,,\n",
        f"{header}\ncopa,x",
    ):
        (tmp_path / "other.csv").write_text(text)
        with pytest.raises(ConfigError, match=r"--dclm-metadata .*other\.csv: need DCLM's"):
            read_metadata(str(tmp_path / "other.csv"))


def test_missing_tasks_are_named_and_means_are_over_the_others():
    scores = {
        name: value for name, value in PUBLISHED["icl"].items() if name not in ("copa", "bbq", "winogender_mc_male")
    }
    found = dclm_results(run_of(scores | {"my_task": 0.7}), "heavy", read_metadata(None))
    assert found["Core"] == found["Core_v2"] == "N/A due to missing tasks: ['copa']"
    assert set(eval(found["missing tasks"])) == {"copa", "bbq", "winogender_mc_male"}
    assert found["eval_metrics"]["icl"]["my_task"] == 0.7
    safety = [(scores[name] - 0.5) / 0.5 for name in ("winogender_mc_female", "enterprise_pii_classification")]
    assert found["aggregated_task_categories_centered"]["safety"] == pytest.approx(sum(safety) / 2)


def test_categories_are_averaged_and_a_task_asked_in_two_ways_keeps_both():
    records = [record("mmlu", 0.2, 5, "law"), record("mmlu", 0.6, 5, "physics"), record("copa", 0.5)]
    calibration = record("jeopardy", 0.1, metric="InContextLearningLMExpectedCalibrationError")
    records += [record("copa", 0.7, 3), calibration]
    run = CheckpointRecords("a", "p", "m", "t", records=records)
    assert scores_by_task(run) == {"mmlu": pytest.approx(0.4), "copa/0-shot": 0.5, "copa/3-shot": 0.7}


def test_the_command_writes_a_file_for_each_checkpoint(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    rows = [{"query": "if x", "choices": ["in", "else:"], "gold": i % 2} for i in range(4)]
    task = {"label": "copa", "dataset_uri": str(write_rows(tmp_path / "a.jsonl", rows)), "num_fewshot": [0],
            "icl_task_type": "multiple_choice"}  # fmt: skip
    (tmp_path / "heavy.yaml").write_text(json.dumps({"icl_tasks": [task]}))
    paths = tuple(write_checkpoint(tmp_path / f"epoch_{seed}.pt", tiny_model(seed), tokenizer) for seed in (1, 2))
    evaluate(EvalConfig(eval_yaml=str(tmp_path / "heavy.yaml"), checkpoint=paths, output_dir=str(tmp_path / "out"),
                        device="cpu", dclm_json=True), ModelFlags())  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for run in results["runs"]:
        found = json.loads((tmp_path / "out" / "dclm" / f"evaluation_{run['name']}_heavy.json").read_text())
        assert found["eval_metrics"]["icl"] == {"copa": run["records"][0]["value"]}
    with pytest.raises(ConfigError, match="--dclm-metadata"):
        EvalConfig(eval_yaml="x", dclm_metadata="y")
