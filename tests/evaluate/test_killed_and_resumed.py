"""An evaluation killed at any moment and resumed, again and again, ends with what a straight one has."""

import json
import os
import random
import signal
import sys
import time

import pytest
import torch
from icl_setup import SAMPLES, tiny_model, write_checkpoint, write_tokenizer

from open_lm.evaluate.command import evaluate
from open_lm.evaluate.flags import EvalConfig
from open_lm.model.config import ModelFlags

N_KILLS = 20
WRITES = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four tasks of eight jobs, two checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    kinds = {"python_words": "language_modeling", "python_choices": "multiple_choice", "python_imports": "schema",
             "short_answers": "generation_task_with_answers"}  # fmt: skip
    tasks = [
        {"label": name, "dataset_uri": str(SAMPLES / f"{name}.jsonl"), "icl_task_type": kind, "num_fewshot": [0, 2]}
        for name, kind in kinds.items()
    ]
    average = {"categories": [{"name": "all", "benchmarks": [{"name": n, "num_fewshot": 2} for n in kinds]}]}
    (folder / "tasks.yaml").write_text(json.dumps({"icl_tasks": tasks, "eval_gauntlet": average}))
    paths = [write_checkpoint(folder / f"epoch_{seed}.pt", tiny_model(seed), tokenizer) for seed in (1, 2)]

    def config(out):
        return EvalConfig(eval_yaml=str(folder / "tasks.yaml"), checkpoint=tuple(paths), output_dir=str(out),
                          resume=True, device="cpu")  # fmt: skip

    return config


def killed(config, out, *, after_cpu_seconds=None, at_file_operation=None):
    """Run the evaluation in a process that kills itself, or is killed by a timer; whether that happened before it was
    done."""
    if (child := os.fork()) == 0:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if after_cpu_seconds is not None:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the kernel ends the process, whatever it is doing
            signal.setitimer(signal.ITIMER_PROF, after_cpu_seconds)
        else:
            _die_at(at_file_operation, str(out))
        code = 1
        try:
            evaluate(config(out), ModelFlags())
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status != 1 << 8, "the evaluation raised an error"
    return status != 0


def _die_at(count, folder):
    """End this process without any clean-up at the `count`-th operation on files in `folder`."""
    left = [count]

    def look(event, arguments):
        if event in WRITES and any(isinstance(a, str) and a.startswith(folder) for a in arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def views(out):
    """The content of results.json, but for times and order."""
    content = json.loads((out / "results.json").read_text())
    for run in content["runs"]:
        for record in run["records"]:
            del record["seconds"]
        run["records"].sort(key=lambda record: (record["key"], record["metric"]))
    return sorted(content["runs"], key=lambda run: run["name"])


def lines(out):
    found = []
    for line in (out / "records.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut off by a kill
    return found


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    """The results of a straight evaluation, and the CPU seconds it takes."""
    torch.set_num_threads(1)
    evaluate(config(tmp_path_factory.mktemp("first")), ModelFlags())  # imports are not counted
    out, began = tmp_path_factory.mktemp("straight"), time.process_time()
    evaluate(config(out), ModelFlags())
    return views(out), time.process_time() - began


@pytest.mark.slow
@pytest.mark.parametrize("how", ["between two file operations", "at a moment of a timer"])
def test_twenty_kills_cost_at_most_the_task_at_hand(config, straight, tmp_path, how):
    rng, kills, finished = random.Random(0), 0, {}
    while kills < N_KILLS:
        if how.startswith("between"):
            was_killed = killed(config, tmp_path, at_file_operation=rng.randrange(1, 24))
        else:
            was_killed = killed(config, tmp_path, after_cpu_seconds=straight[1] * rng.uniform(0.05, 0.7))
        kills += was_killed
        if (tmp_path / "records.jsonl").exists():
            now = {(line["weights"], line["key"], line["identity"]): line["records"] for line in lines(tmp_path)}
            assert finished.items() <= now.items()  # no result is ever lost, and none is scored again
            assert len(now) == len(lines(tmp_path))
            finished = now
        if not was_killed:  # all was done: begin again elsewhere in the order, with half of the lines forgotten
            whole = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "records.jsonl").write_text("".join(rng.sample(whole, len(whole) // 2)))
            finished = {}
    evaluate(config(tmp_path), ModelFlags())
    assert views(tmp_path) == straight[0]
    assert len(lines(tmp_path)) == 16
