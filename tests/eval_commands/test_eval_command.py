import csv
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from icl_setup import ROOT, SAMPLES, tiny_model, write_checkpoint, write_rows, write_tokenizer

SCRIPT = ROOT / "eval" / "eval_openlm_ckpt.py"


def yaml_of(path, labels=("python_words", "python_choices"), **more):
    kinds = {"python_words": "language_modeling", "python_choices": "multiple_choice", "python_imports": "schema"}
    tasks = [
        {"label": label, "dataset_uri": str(SAMPLES / f"{label}.jsonl"), "icl_task_type": kinds[label],
         "num_fewshot": [0], "random_baseline": 0.5 if label == "python_choices" else 0.0}
        for label in labels
    ]  # fmt: skip
    path.write_text(json.dumps({"max_seq_len": 64, "icl_tasks": tasks, **more}))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    return {
        "checkpoint": write_checkpoint(folder / "epoch_1.pt", tiny_model(), tokenizer),
        "tokenizer": tokenizer,
        "yaml": yaml_of(folder / "eval.yaml"),
        "folder": folder,
    }


def evaluate(*flags, cwd=None):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", *map(str, flags)], cwd=cwd, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def in_process(*flags):
    from open_lm.evaluate.command import evaluate as run
    from open_lm.evaluate.flags import EvalConfig
    from open_lm.flags import Parser, add_group, read_group
    from open_lm.model.config import ModelFlags

    parser = Parser(prog="eval")
    add_group(parser, EvalConfig)
    add_group(parser, ModelFlags)
    args = parser.parse_args(["--device", "cpu", *map(str, flags)])
    return run(read_group(args, EvalConfig), read_group(args, ModelFlags))


def test_one_command_from_any_folder_writes_three_files_and_a_table(files, tmp_path):
    code, out, err = evaluate("--eval-yaml", files["yaml"], "--checkpoint", files["checkpoint"],
                              "--output-dir", tmp_path / "out", cwd=tmp_path)  # fmt: skip
    assert code == 0, err
    assert "python_words/0-shot" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (run,) = results["runs"]
    assert (run["step"], run["tokens"]) == (7, 7000)
    assert [record["key"] for record in run["records"]] == ["python_words/0-shot", "python_choices/0-shot"]
    assert all(len(record["data_sha256"]) == 64 for record in run["records"])
    assert results["versions"]["torch"]
    (first, _) = csv.DictReader((tmp_path / "out" / "results.csv").open())
    assert float(first["value"]) == run["records"][0]["value"]
    assert (tmp_path / "out" / "results.md").read_text().startswith("| task | epoch_1 |")


def test_the_yaml_under_openlms_old_name_runs_as_shipped_from_any_folder(files, tmp_path):
    code, out, err = evaluate("--eval-yaml", "eval/in_memory_hf_eval.yaml", "--checkpoint", files["checkpoint"],
                              "--output-dir", tmp_path / "out", "--eval-precision", "bf16", cwd=tmp_path)  # fmt: skip
    assert code == 0, err
    keys = ["python_words/3-shot", "english_choices/0-shot", "python_imports/0-shot", "short_answers/2-shot"]
    assert all(key in out for key in keys)


def test_several_checkpoints_stand_side_by_side(files, tmp_path):
    other = write_checkpoint(tmp_path / "epoch_2.pt", tiny_model(seed=1), files["tokenizer"])
    results = in_process("--eval-yaml", files["yaml"], "--checkpoint", files["checkpoint"], other,
                         "--output-dir", tmp_path / "out")  # fmt: skip
    assert [run.name for run in results.runs] == ["epoch_1", "epoch_2"]
    assert "| task | epoch_1 | epoch_2 |" in (tmp_path / "out" / "results.md").read_text()


def test_resuming_runs_only_what_is_missing_or_changed(files, tmp_path, monkeypatch):
    from open_lm.evaluate.engine.runner import NativeRunner

    ran = []
    score = NativeRunner.run
    monkeypatch.setattr(NativeRunner, "run", lambda self, key, progress: ran.append(key) or score(self, key, progress))
    out = tmp_path / "out"
    common = ("--checkpoint", files["checkpoint"], "--output-dir", out)
    in_process("--eval-yaml", yaml_of(tmp_path / "a.yaml", ["python_words"]), *common)
    first = json.loads((out / "results.json").read_text())["runs"][0]["records"]
    in_process("--eval-yaml", yaml_of(tmp_path / "b.yaml", ["python_words", "python_imports"]), *common, "--resume")
    assert ran == ["python_words/0-shot", "python_imports/0-shot"]
    assert json.loads((out / "results.json").read_text())["runs"][0]["records"][0] == first[0]
    in_process("--eval-yaml", yaml_of(tmp_path / "c.yaml", ["python_words"], max_seq_len=32), *common, "--resume")
    assert ran[2:] == ["python_words/0-shot"]


def test_a_failing_task_keeps_the_finished_ones(files, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [{"context": "a", "continuation": "word " * 500}])
    tasks = json.loads(Path(files["yaml"]).read_text())["icl_tasks"]
    tasks.append({"label": "bad", "dataset_uri": str(bad), "icl_task_type": "language_modeling", "num_fewshot": [0]})
    (tmp_path / "y.yaml").write_text(json.dumps({"max_seq_len": 64, "icl_tasks": tasks}))
    code, _, err = evaluate("--eval-yaml", tmp_path / "y.yaml", "--checkpoint", files["checkpoint"],
                            "--output-dir", tmp_path / "out")  # fmt: skip
    assert code == 65
    assert "bad.jsonl:1" in err
    assert "Traceback" not in err
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["records"]
    assert [record["key"] for record in kept] == ["python_words/0-shot", "python_choices/0-shot"]


def test_an_interrupt_keeps_the_finished_tasks(files, tmp_path):
    slow = write_rows(tmp_path / "slow.jsonl", [{"context": f"a {i}", "continuation": "b " * 20} for i in range(60000)])
    tasks = json.loads(Path(files["yaml"]).read_text())["icl_tasks"][:1]
    tasks.append({"label": "slow", "dataset_uri": str(slow), "icl_task_type": "language_modeling", "num_fewshot": [0]})
    (tmp_path / "y.yaml").write_text(json.dumps({"max_seq_len": 64, "icl_tasks": tasks}))
    flags = ["--eval-yaml", tmp_path / "y.yaml", "--checkpoint", files["checkpoint"], "--output-dir", tmp_path / "out"]
    command = [sys.executable, SCRIPT, "--device", "cpu", *map(str, flags)]
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell lets what it starts with & ignore it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=heeds) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "results.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["records"]
    assert [record["key"] for record in kept] == ["python_words/0-shot"]


def test_gauntlet_averages_are_centred_on_chance(files, tmp_path):
    chance = {"python_words": 0.0, "python_choices": 0.5}
    benchmarks = [{"name": name, "num_fewshot": 0, "random_baseline": share} for name, share in chance.items()]
    gauntlet = {"categories": [{"name": "python", "benchmarks": benchmarks}], "averages": {"all": ["python"]}}
    results = in_process("--eval-yaml", yaml_of(tmp_path / "y.yaml", eval_gauntlet=gauntlet), "--checkpoint",
                         files["checkpoint"], "--output-dir", tmp_path / "out")  # fmt: skip
    (run,) = results.runs
    words, choices = (record.value for record in run.records)
    assert run.averages == pytest.approx(dict.fromkeys(("python", "all"), (words + (choices - 0.5) / 0.5) / 2))


def test_keys_that_ask_for_what_is_done_otherwise_are_named(files, tmp_path, caplog):
    path = yaml_of(tmp_path / "y.yaml", ["python_words"], fsdp_config={"sharding_strategy": "FULL_SHARD"}, loggers={})
    in_process("--eval-yaml", path, "--checkpoint", files["checkpoint"], "--output-dir", tmp_path / "out")
    assert "fsdp_config has no effect here: every rank holds the whole model" in caplog.text
    assert "loggers" not in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--checkpoint": "no.pt"}, "no.pt: no such"),
        ({"--eval-yaml": "no.yaml"}, "no.yaml"),
        ({"--tasks": "nothing"}, "--tasks nothing: not in"),
        ({"--tokenizer": "no.json"}, "--tokenizer no.json"),
        ({"--model": "open_lm_11m"}, "another model"),
        ({"--engine": "quick"}, "invalid choice: 'quick'"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(files, tmp_path, change, said):
    from open_lm.errors import OpenLMError

    flags = {"--eval-yaml": files["yaml"], "--checkpoint": files["checkpoint"], "--output-dir": tmp_path / "out"}
    with pytest.raises(OpenLMError, match=said):
        in_process(*(part for pair in {**flags, **change}.items() for part in pair))
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(files, tmp_path):
    from open_lm.errors import ConfigError

    small = write_checkpoint(tmp_path / "small.pt", tiny_model(vocab_size=300), files["tokenizer"])
    with pytest.raises(ConfigError, match="400 tokens, the model has 300 embeddings"):
        in_process("--eval-yaml", files["yaml"], "--checkpoint", small, "--output-dir", tmp_path / "out")


def test_a_checkpoint_without_a_tokenizer_asks_for_one(tmp_path, files):
    from open_lm.errors import CheckpointError

    bare = write_checkpoint(tmp_path / "bare.pt", tiny_model())
    with pytest.raises(CheckpointError, match="give --tokenizer"):
        in_process("--eval-yaml", files["yaml"], "--checkpoint", bare, "--output-dir", tmp_path / "out")


def test_help_is_quick_to_import():
    code = "\n".join([
        "import sys, runpy",
        "sys.argv = ['x', '--help']",
        "try: runpy.run_path(%r, run_name='__main__')",
        "except SystemExit: pass",
        "assert 'torch' not in sys.modules",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code % str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_of_transformers_is_scored_by_its_folder(files, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=64, **shape))
    model.save_pretrained(tmp_path / "llama")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=files["tokenizer"], eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "llama")
    results = in_process("--eval-yaml", files["yaml"], "--hf-model", tmp_path / "llama", "--hf-seq-len", 64,
                         "--output-dir", tmp_path / "out")  # fmt: skip
    (run,) = results.runs
    assert run.name == "llama"
    assert [record.questions for record in run.records] == [40, 40]
