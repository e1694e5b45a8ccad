"""An evaluation folder forgets nothing: other checkpoints, other tasks, kills at any byte, and two processes."""

import csv
import json

import pytest
import torch
from icl_setup import tiny_model, write_checkpoint, write_rows, write_tokenizer

from open_lm.evaluate.command import evaluate
from open_lm.evaluate.fingerprint import weights_fingerprint
from open_lm.evaluate.flags import EvalConfig
from open_lm.model.config import ModelFlags

TASKS = {"a": ["if x", "for y"], "b": ["def f", "return z"], "c": ["x = 1", "y = 2"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A YAML of three small tasks, and two checkpoints."""
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    tasks = []
    for label, queries in TASKS.items():
        rows = [{"query": q, "choices": ["in", "else:"], "gold": i % 2} for i, q in enumerate(queries)]
        path = write_rows(folder / f"{label}.jsonl", rows)
        tasks.append({"label": label, "dataset_uri": str(path), "icl_task_type": "multiple_choice", "num_fewshot": [0]})
    (folder / "tasks.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    for seed in (1, 2):
        write_checkpoint(folder / f"epoch_{seed}.pt", tiny_model(seed), tokenizer)
    return folder


def scored(files, out, *tasks, checkpoints=(1,), resume=True, **settings):
    """`{(name, key): value}` in results.json after an evaluation, and the results."""
    config = EvalConfig(
        eval_yaml=str(files / "tasks.yaml"), checkpoint=tuple(str(files / f"epoch_{n}.pt") for n in checkpoints),
        tasks=tasks, output_dir=str(out), resume=resume, device="cpu", **settings,
    )  # fmt: skip
    evaluate(config, ModelFlags())
    content = json.loads((out / "results.json").read_text())
    return {(run["name"], r["key"]): r["value"] for run in content["runs"] for r in run["records"]}


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """All tasks of both checkpoints in one go."""
    return scored(files, tmp_path_factory.mktemp("straight"), checkpoints=(1, 2), resume=False)


def n_lines(out):
    return len((out / "records.jsonl").read_text().splitlines())


def test_resume_keeps_other_checkpoints_and_other_tasks_and_scores_nothing_twice(files, straight, tmp_path):
    assert scored(files, tmp_path, "a").keys() == {("epoch_1", "a/0-shot")}
    assert scored(files, tmp_path, "b", checkpoints=(2,)).keys() == {("epoch_1", "a/0-shot"), ("epoch_2", "b/0-shot")}
    assert scored(files, tmp_path, checkpoints=(1, 2)) == straight
    assert n_lines(tmp_path) == 6
    assert scored(files, tmp_path, "c") == straight and n_lines(tmp_path) == 6


def test_other_settings_are_scored_anew_and_the_old_ones_are_found_again(files, tmp_path):
    first = scored(files, tmp_path, "a")
    scored(files, tmp_path, "a", max_seq_len=64)
    assert n_lines(tmp_path) == 2
    assert scored(files, tmp_path, "a") == first and n_lines(tmp_path) == 2


def test_without_resume_the_view_is_new_but_no_line_is_lost(files, straight, tmp_path):
    scored(files, tmp_path, checkpoints=(1, 2))
    assert scored(files, tmp_path, "a", resume=False).keys() == {("epoch_1", "a/0-shot")}
    assert n_lines(tmp_path) == 7
    assert scored(files, tmp_path, "a") == straight


def test_a_kill_at_any_byte_of_a_line_costs_that_task_alone(files, straight, tmp_path):
    scored(files, tmp_path, checkpoints=(1, 2))
    whole = (tmp_path / "records.jsonl").read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in (last, last + 1, (last + len(whole)) // 2, len(whole) - 2, len(whole) - 1):
        (tmp_path / "records.jsonl").write_bytes(whole[:cut])
        (tmp_path / "results.json").unlink()
        assert scored(files, tmp_path, checkpoints=(1, 2)) == straight
        again = (tmp_path / "records.jsonl").read_text().splitlines()
        assert sum(line.startswith("{") and line.endswith("}") for line in again) == 6


def test_a_run_that_moved_is_the_same_weights_under_its_new_name(files, tmp_path):
    scored(files, tmp_path, "a")
    moved = tmp_path / "epoch_9.pt"
    moved.write_bytes((files / "epoch_1.pt").read_bytes())
    config = EvalConfig(eval_yaml=str(files / "tasks.yaml"), checkpoint=(str(moved),), tasks=("a",),
                        output_dir=str(tmp_path), resume=True, device="cpu")  # fmt: skip
    (run,) = evaluate(config, ModelFlags()).runs
    assert run.name == "epoch_9" and n_lines(tmp_path) == 1


def test_a_results_json_from_before_the_lines_is_kept(files, straight, tmp_path):
    scored(files, tmp_path, checkpoints=(1, 2))
    (tmp_path / "records.jsonl").unlink()
    assert scored(files, tmp_path, checkpoints=(1, 2)) == straight
    assert not (tmp_path / "records.jsonl").exists()  # nothing was scored
    scored(files, tmp_path, "a", max_seq_len=64)
    assert n_lines(tmp_path) == 7


def test_a_fingerprint_is_that_of_all_bits_names_and_places():
    model = tiny_model()
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(tiny_model())
    weight = model.layers[0].attention.in_proj.weight
    with torch.no_grad():
        weight[:2] = weight[:2].flip(0)
    swapped = weights_fingerprint(model)
    with torch.no_grad():
        weight[:2] = weight[:2].flip(0)
        assert weights_fingerprint(model) == before
        weight[3, 3] = -weight[3, 3]
    assert len({before, swapped, weights_fingerprint(model), weights_fingerprint(tiny_model().bfloat16())}) == 4


def test_columns_of_one_name_are_told_apart_by_their_weights(files, tmp_path):
    """A checkpoint that was trained again under its old name, or is scored in another type, is a column of its own."""
    scored(files, tmp_path, "a")
    scored(files, tmp_path, "a", eval_precision="bf16")
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    first, second = (run["weights"] for run in runs)
    assert first != second
    heading = (tmp_path / "results.md").read_text().splitlines()[0]
    assert heading == f"| task | epoch_1 ({first[:9]}) | epoch_1 ({second[:9]}) |"
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["weights"] for row in rows] == [first, second]
