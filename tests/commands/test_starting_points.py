"""Starting points of a run: a mean of checkpoints, the whole state of another run, weights unless it can resume."""

import pytest
import torch
from runs import flags, folder_of, metrics, run, run_command, weights, write_data

from open_lm.errors import CheckpointError
from open_lm.main import main


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data", (200,))


def path_of(tmp_path, name, label="1", kind="epoch"):
    return str(folder_of(tmp_path, name) / "checkpoints" / f"{kind}_{label}.pt")


def evaluated(tmp_path, *arguments):
    held_out = str(tmp_path / "data" / "00000000.tar")
    common = ["--val-data", held_out, "--val-num-samples", "160", "--device", "cpu", "--precision", "fp32"]
    return main([*common, "--logs", str(tmp_path), "--name", "eval", *arguments]).validation[0].loss


def test_the_mean_is_what_is_trained_on_and_evaluated(tmp_path, manifest):
    run(tmp_path, manifest, "--averagers", "ema_0.9_1", name="a", steps=6)
    run(tmp_path, manifest, "--seed", "7", name="b", steps=6)
    first, second = path_of(tmp_path, "a", kind="ema_0.9_1"), path_of(tmp_path, "b")
    wrapped = torch.load(second, weights_only=True)
    wrapped["state_dict"] = {f"module.{name}": tensor for name, tensor in wrapped["state_dict"].items()}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    left, right = (torch.load(path, weights_only=True)["state_dict"] for path in (first, second))
    named = {name: 0.25 * left[name].double() + 0.75 * right[name].double() for name in left}
    mean = {**{name: tensor for name, tensor in right.items() if name not in named}, **named}
    torch.save({**wrapped, "state_dict": {name: t.float() for name, t in mean.items()}}, tmp_path / "mean.pt")

    asked = ["--average", first, str(tmp_path / "wrapped.pt"), "--average-coefficients", "0.25", "0.75"]
    assert evaluated(tmp_path, *asked) == pytest.approx(evaluated(tmp_path, "--pretrained", str(tmp_path / "mean.pt")))
    assert evaluated(tmp_path, "--average", second, second) == evaluated(tmp_path, "--pretrained", second)
    run(tmp_path, manifest, *asked, name="from_mean", steps=2)
    run(tmp_path, manifest, "--pretrained", str(tmp_path / "mean.pt"), name="from_file", steps=2)
    assert metrics(tmp_path, "from_mean")[1] == pytest.approx(metrics(tmp_path, "from_file")[1], abs=1e-6)


def test_checkpoints_of_two_models_have_no_mean(tmp_path, manifest):
    run(tmp_path, manifest, name="a", steps=2)
    run(tmp_path, manifest, "--qk-norm", name="b", steps=2)
    with pytest.raises(CheckpointError, match="qk_norm"):
        run(tmp_path, manifest, "--average", path_of(tmp_path, "a"), path_of(tmp_path, "b"), name="c")


@pytest.mark.parametrize("form", ["consolidated", "sharded"])
def test_the_whole_state_goes_on_in_a_new_run(tmp_path, manifest, form):
    run(tmp_path, manifest, name="straight")
    run(tmp_path, manifest, "--num-checkpoints", "2", "--stop-at-step", "6", "--checkpoint-format", form, name="first")
    source = str(folder_of(tmp_path, "first"))
    result = run(tmp_path, manifest, "--pretrained", source, "--load-pretrained-state", name="second")
    assert result.step == 12
    assert metrics(tmp_path, "second") == {k: v for k, v in metrics(tmp_path, "straight").items() if k > 6}
    torch.testing.assert_close(weights(tmp_path, "second"), weights(tmp_path, "straight"), rtol=0, atol=0)


def test_one_command_starts_from_weights_and_later_resumes(tmp_path, manifest):
    run(tmp_path, manifest, name="first", steps=4)
    again = ["--pretrained", path_of(tmp_path, "first"), "--resume", "latest"]
    run(tmp_path, manifest, *again, "--stop-at-step", "6", name="second")
    before = metrics(tmp_path, "second")
    run(tmp_path, manifest, *again, name="second")
    after = metrics(tmp_path, "second")
    assert {k: after[k] for k in before} == before and list(after) == list(range(1, 13))
    assert "resumed from" in (folder_of(tmp_path, "second") / "out.log").read_text()


def test_a_run_saves_shards_on_two_ranks_and_ends_bit_equal_after_a_resume(tmp_path, manifest):
    extra = ["--fsdp", "--checkpoint-format", "sharded", "--num-checkpoints", "2"]
    for name, stops in (("straight", []), ("broken", ["--stop-at-step", "7"]), ("broken", [])):
        arguments = flags(tmp_path, manifest, *extra, *stops, "--resume", "latest", name=name)
        done = run_command(arguments, ranks=2)
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path, "broken") == metrics(tmp_path, "straight")
    folder = folder_of(tmp_path, "broken") / "checkpoints"
    assert len(list(folder.glob("*.sharded-*"))) == 3 and not list(folder.glob("*.pt"))
