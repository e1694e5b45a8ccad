"""Every parallel mode gives the losses and weights of one process, and their checkpoints are the same."""

import pytest
import torch
from runs import flags, folder_of, metrics, run, run_command, weights, write_data

from open_lm.errors import ConfigError
from open_lm.train.config import ParallelConfig


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A run in one process and its data."""
    folder = tmp_path_factory.mktemp("single")
    manifest = write_data(folder / "data")
    run(folder, manifest, "--num-checkpoints", "2", "--grad-clip-norm", "1")
    return folder, manifest


def assert_same_run(folder, other):
    assert list(metrics(other).values()) == pytest.approx(list(metrics(folder).values()), abs=1e-5)
    torch.testing.assert_close(weights(other, label="2"), weights(folder, label="2"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (2, ["--fsdp", "--accum-freq", "2", "--grad-checkpointing"]),
        (4, ["--fsdp", "--fsdp-hybrid-o2", "--fsdp-group-size", "2"]),
        (4, ["--accum-freq", "2"]),
    ],
    ids=["fsdp", "hybrid", "ddp"],
)
def test_ranks_do_not_change_the_run(tmp_path, single, ranks, extra):
    folder, manifest = single
    arguments = flags(tmp_path, manifest, "--num-checkpoints", "2", "--grad-clip-norm", "1", *extra)
    done = run_command(arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, tmp_path)


def test_saved_on_four_sharded_ranks_resumed_on_one_and_on_two(tmp_path, single):
    folder, manifest = single
    common = ["--num-checkpoints", "2", "--grad-clip-norm", "1"]
    done = run_command(flags(tmp_path, manifest, *common, "--fsdp"), ranks=4)
    assert done.returncode == 0, done.stderr
    for ranks in (1, 2):
        for old in (folder_of(tmp_path) / "checkpoints").glob("*_2*"):
            old.unlink()
        done = run_command(flags(tmp_path, manifest, *common, "--resume", "latest"), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "resumed from" in done.stderr
        assert_same_run(folder, tmp_path)


def test_flags_that_shape_fsdp_need_it():
    with pytest.raises(ConfigError, match="--fsdp-amp"):
        ParallelConfig(fsdp_amp=True)
    with pytest.raises(ConfigError, match="exclude"):
        ParallelConfig(fsdp=True, fsdp_amp=True, fsdp_pure_bf16=True)


def test_flags_without_a_meaning_are_accepted_with_one_warning(caplog):
    ParallelConfig(fsdp=True, fsdp_limit_all_gathers=True)
    assert caplog.text.count("--fsdp-limit-all-gathers has no meaning") == 1
