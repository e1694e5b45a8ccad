"""Every parallel mode gives the losses and weights of one process, and their checkpoints are the same."""

import pytest
import torch
from gloo import run_ranks
from runs import flags, folder_of, metrics, run, run_command, weights, write_data

from open_lm.errors import ConfigError
from open_lm.train.config import ParallelConfig
from open_lm.train.parallel import clip_grad_norm, mixed_precision


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


def test_fsdp_amp_adds_gradients_in_fp32():
    policy = mixed_precision(ParallelConfig(fsdp=True, fsdp_amp=True))
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("limit", "factor"), [(None, 1.0), (2.0, 0.4), (5.0, 1.0), (9.0, 1.0)])
def test_gradients_are_scaled_down_to_the_limit_of_their_norm(limit, factor):
    layer = torch.nn.Linear(2, 2)
    gradients = torch.tensor([[0.0, 2.0], [4.0, 1.0]]), torch.tensor([2.0, 0.0])  # 4 + 16 + 1 + 4 = 5²
    layer.weight.grad, layer.bias.grad = (gradient.clone() for gradient in gradients)
    assert clip_grad_norm(layer, limit).item() == pytest.approx(5.0)
    for found, gradient in zip((layer.weight.grad, layer.bias.grad), gradients, strict=True):
        torch.testing.assert_close(found, gradient * factor)


def test_flags_without_a_meaning_are_accepted_with_one_warning(caplog):
    ParallelConfig(fsdp=True, fsdp_limit_all_gathers=True)
    assert caplog.text.count("--fsdp-limit-all-gathers has no meaning") == 1


def _gradient_bytes(world, whole):
    """The most bytes of gradients a rank holds between the micro-batches of a step."""
    from open_lm.model import create_model
    from open_lm.model.config import ModelConfig
    from open_lm.train.parallel import grad_sync, wrap

    sizes = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 12, "vocab_size": 37}
    config = ParallelConfig(device="cpu", precision="fp32", fsdp=True, fsdp_whole_gradients=whole)
    torch.manual_seed(0)
    model = wrap(create_model(ModelConfig(**sizes)), world, config)
    ids = torch.randint(37, (4, 12), generator=torch.Generator().manual_seed(world.rank))
    for is_last, rows in ((False, ids[:2]), (True, ids[2:])):
        with grad_sync(model, enabled=is_last):
            model(rows)[0].square().mean().backward()
        if not is_last:
            held = [p.grad for p in model.parameters() if p.grad is not None]
    assert bool(held) is not whole  # sharded gradients after the first micro-batch, or none until the last
    return torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])


def _both_ways(world):
    torch.testing.assert_close(_gradient_bytes(world, False), _gradient_bytes(world, True))


def test_fsdp_shards_gradients_after_each_micro_batch_with_the_same_sum():
    run_ranks(_both_ways, 2)
