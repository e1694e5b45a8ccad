"""Two runs that should agree: the tools name the first module, parameter or step that does not."""

import gzip
import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT, folder_of, run, run_command, write_data
from runs import flags as run_flags
from train.conftest import make_batch, make_state

from open_lm.errors import ConfigError
from open_lm.report.compare import compare_series, compare_tensors
from open_lm.run.profiling import traced
from open_lm.train.activation_checkpointing import recompute_in_backward


def tool(name, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two runs from the same seed; the second was told of another weight decay, which shows in the second step."""
    folder = tmp_path_factory.mktemp("runs")
    manifest = write_data(folder / "data")
    for name, decay in (("one", "0.1"), ("same", "0.1"), ("other", "0.5")):
        run(folder, manifest, "--trace-steps", "1,2", "--wd", decay, "--copy-codebase", name=name, steps=4)
    return folder


def test_equal_runs_agree_in_every_tool(two_runs):
    one, same = folder_of(two_runs, "one"), folder_of(two_runs, "same")
    for name in ("compare_traces", "compare_losses", "compare_checkpoints"):
        done = tool(name, one, same)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "agree" in done.stdout


def test_each_tool_names_the_first_difference(two_runs):
    one, other = folder_of(two_runs, "one"), folder_of(two_runs, "other")
    traces = tool("compare_traces", one, other)
    assert traces.returncode == 1
    assert "step1-rank0.pt: " in traces.stdout and "step2-rank0.pt: the first that differs is" in traces.stdout
    assert "layers.0.attention" in traces.stdout.split("first that differs is")[1].splitlines()[1]
    losses = tool("compare_losses", one, other)
    assert losses.returncode == 1 and "the first that differs is step 2" in losses.stdout
    weights = tool("compare_checkpoints", one, other)
    assert weights.returncode == 1 and "flags wd: 0.1 and 0.5" in weights.stdout
    assert tool("compare_losses", one, other, "--rtol", "10").returncode == 0


def test_what_cannot_be_compared_is_said_by_name(two_runs, tmp_path):
    one = folder_of(two_runs, "one")
    assert "have no traced step in common" in tool("compare_traces", one, tmp_path).stderr
    assert "does not exist" in tool("compare_losses", one, tmp_path / "none").stderr
    assert "has no train/none" in tool("compare_losses", one, one, "--metric", "train/none").stderr


def test_the_code_that_ran_is_kept(two_runs):
    kept = folder_of(two_runs, "one") / "code" / "open_lm" / "main.py"
    assert kept.read_text() == (ROOT / "open_lm" / "main.py").read_text()


def test_a_trace_holds_what_the_modules_saw_once_even_with_recomputation():
    state, batch = make_state(), make_batch()
    with traced(state.model) as plain:
        state.task.loss_sums(state.model, batch).total.backward()
    for block in state.model.layers:
        recompute_in_backward(block)
    with traced(state.model) as recomputed:
        state.task.loss_sums(state.model, batch).total.backward()
    assert compare_tensors(plain, recomputed) == []
    hidden = state.model.tok_embeddings(batch.inputs_BT)
    torch.testing.assert_close(plain["1 tok_embeddings output 0"], hidden.detach())
    torch.testing.assert_close(plain["1 layers.0 input 0"], hidden.detach())
    assert next(iter(plain)) == "1 model input 0"


def test_traces_of_two_ranks_and_micro_batches(tmp_path):
    manifest = write_data(tmp_path / "data")
    arguments = run_flags(tmp_path, manifest, "--trace-steps", "2", "--accum-freq", "2", "--fsdp", steps=2)
    assert run_command(arguments, ranks=2).returncode == 0
    for rank in (0, 1):
        trace = torch.load(folder_of(tmp_path) / "traces" / f"step2-rank{rank}.pt", weights_only=True)
        assert {name.split(" ")[0] for name in trace} == {"1", "2"}
        assert trace["2 model input 0"].shape == (2, 16)


def test_a_profile_is_a_chrome_trace_of_the_steps_asked_for(tmp_path):
    run(tmp_path, write_data(tmp_path / "data"), "--profile-steps", "2-3", steps=4)
    (file,) = (folder_of(tmp_path) / "profile").iterdir()
    assert file.name == "step3-rank0.json.gz"
    with gzip.open(file) as stream:
        events = json.load(stream)["traceEvents"]
    steps = [event for event in events if event.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == 2


@pytest.mark.parametrize("words", ["0", "3-2", "a", "1,,x"])
def test_steps_that_are_none_are_refused(tmp_path, words):
    with pytest.raises(ConfigError, match=r"--trace-steps .*: give steps"):
        run(tmp_path, "none", "--trace-steps", words)


def test_tensors_are_compared_by_shape_type_value_and_presence():
    a = {"x": torch.ones(2), "y": torch.tensor([1.0, float("nan")]), "z": torch.zeros(1), "only": torch.zeros(1)}
    b = {"x": torch.ones(2) * 1.1, "y": torch.tensor([1.0, float("nan")]), "z": torch.zeros(2)}
    assert [d.name for d in compare_tensors(a, b)] == ["x", "z", "only"]
    assert [d.name for d in compare_tensors(a, b, rtol=0.2)] == ["z", "only"]
    assert compare_series({1: 1.0, 2: 2.0}, {2: 2.0, 3: 1.0}) == []
