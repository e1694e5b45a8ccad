"""Several checkpoints in one evaluation: the task files are read once, the questions encoded once, and one model at a
time is held."""

import gc
import json
import weakref

import pytest
from icl_setup import SAMPLES, tiny_model, write_checkpoint, write_tokenizer

import open_lm.evaluate.command as command
import open_lm.evaluate.engine.icl as icl
import open_lm.evaluate.tasks.jobs as jobs
from open_lm.evaluate.flags import EvalConfig
from open_lm.model.config import ModelFlags

TASKS = {"python_words": "language_modeling", "python_choices": "multiple_choice",
         "short_answers": "generation_task_with_answers"}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    tasks = [
        {"label": name, "dataset_uri": str(SAMPLES / f"{name}.jsonl"), "icl_task_type": kind, "num_fewshot": [0, 1]}
        for name, kind in TASKS.items()
    ]
    (folder / "tasks.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    for seed in (1, 2, 3):
        write_checkpoint(folder / f"epoch_{seed}.pt", tiny_model(seed), tokenizer)
    return folder


def evaluated(files, out, *seeds):
    config = EvalConfig(
        eval_yaml=str(files / "tasks.yaml"), checkpoint=tuple(str(files / f"epoch_{n}.pt") for n in seeds),
        output_dir=str(out), device="cpu",
    )  # fmt: skip
    runs = command.evaluate(config, ModelFlags()).runs
    return {run.name: {(r.key, r.metric): (r.value, r.stderr, r.truncated) for r in run.records} for run in runs}


def counted(monkeypatch, module, name):
    calls, plain = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or plain(*a, **k))
    return calls


def test_files_are_read_and_questions_encoded_once_for_all(files, tmp_path, monkeypatch):
    alone = {}
    for seed in (1, 2, 3):
        alone |= evaluated(files, tmp_path / str(seed), seed)
    reads = counted(monkeypatch, jobs, "read_rows")
    encoded = [counted(monkeypatch, icl, name) for name in ("encode_questions", "encode_prompts")]
    assert evaluated(files, tmp_path / "all", 1, 2, 3) == alone
    assert len(reads) == len(TASKS)
    assert sum(map(len, encoded)) == 2 * len(TASKS)


def test_checkpoints_with_other_tokenizers_and_contexts_have_questions_of_their_own(files, tmp_path):
    backend = json.loads((files / "tokenizer.json").read_text())
    backend["model"]["merges"] = backend["model"]["merges"][:20]
    (tmp_path / "short.json").write_text(json.dumps(backend))
    write_checkpoint(tmp_path / "epoch_8.pt", tiny_model(2), str(tmp_path / "short.json"))
    write_checkpoint(tmp_path / "epoch_9.pt", tiny_model(2, seq_len=40), str(files / "tokenizer.json"))
    for name in ("epoch_8.pt", "epoch_9.pt"):
        (files / name).write_bytes((tmp_path / name).read_bytes())
    alone = {}
    for seed in (2, 8, 9):
        alone |= evaluated(files, tmp_path / str(seed), seed)
    assert evaluated(files, tmp_path / "all", 2, 8, 9) == alone
    assert alone["epoch_2"] != alone["epoch_8"] != alone["epoch_9"] != alone["epoch_2"]


def test_beyond_the_room_for_kept_questions_they_are_encoded_again(files, tmp_path, monkeypatch):
    import open_lm.evaluate.engine.runner as runner

    both = evaluated(files, tmp_path / "kept", 1, 2)
    monkeypatch.setattr(runner, "KEPT_TOKENS", 0)
    encoded = [counted(monkeypatch, icl, name) for name in ("encode_questions", "encode_prompts")]
    assert evaluated(files, tmp_path / "again", 1, 2) == both
    assert sum(map(len, encoded)) == 4 * len(TASKS)


def test_a_model_is_let_go_before_the_next_is_loaded(files, tmp_path, monkeypatch):
    held, plain = [], command._eval_model

    def loaded(*arguments):
        gc.collect()
        assert all(model() is None for model in held)
        eval_model = plain(*arguments)
        held.append(weakref.ref(eval_model.model))
        return eval_model

    monkeypatch.setattr(command, "_eval_model", loaded)
    evaluated(files, tmp_path, 1, 2, 3)
    assert len(held) == 3


def test_a_malformed_row_of_the_last_task_is_refused_before_a_model_is_loaded(files, tmp_path, monkeypatch):
    from open_lm.errors import DataError

    tasks = json.loads((files / "tasks.yaml").read_text())["icl_tasks"]
    (tmp_path / "bad.jsonl").write_text('{"query": "a"}\n')
    tasks.append({"label": "bad", "dataset_uri": str(tmp_path / "bad.jsonl"), "icl_task_type": "multiple_choice",
                  "num_fewshot": [0]})  # fmt: skip
    (tmp_path / "tasks.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    monkeypatch.setattr(command, "_eval_model", lambda *_: pytest.fail("a model was loaded"))
    config = EvalConfig(eval_yaml=str(tmp_path / "tasks.yaml"), checkpoint=(str(files / "epoch_1.pt"),), device="cpu",
                        output_dir=str(tmp_path / "out"))  # fmt: skip
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        command.evaluate(config, ModelFlags())
