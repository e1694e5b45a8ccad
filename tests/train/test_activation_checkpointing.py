"""Recomputing activations changes what is kept, not what is computed."""

import dataclasses

import pytest
import torch
from runs import flags, metrics, run_command, write_data
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from open_lm.errors import ConfigError
from open_lm.kernels.linear_cross_entropy import linear_cross_entropy
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.train import tasks
from open_lm.train.activation_checkpointing import recompute
from open_lm.train.config import ParallelConfig
from open_lm.train.parallel import blocks
from open_lm.train.step import train_step
from open_lm.train.timing import Timing

ARCHITECTURE = ModelConfig(hidden_dim=64, n_layers=4, n_heads=4, seq_len=128, vocab_size=61)


def kept_and_gradients(mode):
    """Bytes that autograd keeps of the activations of one forward pass, and the gradients."""
    torch.manual_seed(0)
    model = create_model(ARCHITECTURE)
    recompute(list(blocks(model)), ParallelConfig(grad_checkpointing_mode=mode))
    ids = torch.randint(0, 61, (2, 128))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids)[0].square().mean()
        n_bytes = sum(kept.values())
    loss.backward()
    return n_bytes, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mode", ["full", "every-2", "every-3", "selective"])
def test_gradients_stay_the_same_to_the_bit(mode):
    torch.testing.assert_close(kept_and_gradients(mode)[1], kept_and_gradients(None)[1], rtol=0, atol=0)


def test_more_recomputation_keeps_less():
    kept = {mode: kept_and_gradients(mode)[0] for mode in (None, "every-2", "every-4", "full")}
    assert kept["full"] < kept["every-2"] < kept["every-4"] < kept[None]


def test_selective_recomputation_repeats_no_product_and_no_attention():
    def flops(mode):
        torch.manual_seed(0)
        model = create_model(ARCHITECTURE)
        recompute(list(blocks(model)), ParallelConfig(grad_checkpointing_mode=mode))
        loss = model(torch.randint(0, 61, (2, 128)))[0].square().mean()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    assert flops("selective") == flops(None) < flops("full")


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (2, ["--fsdp", "--grad-checkpointing-mode", "every-2", "--fsdp-forward-prefetch", "2"]),
        (4, ["--fsdp", "--grad-checkpointing-mode", "selective", "--experimental-meta-device"]),
    ],
)
def test_ranks_with_recomputation_train_as_one_process_does(tmp_path, ranks, extra):
    manifest = write_data(tmp_path / "data")
    for name, arguments, n in (("one", [], 1), ("many", extra, ranks)):
        done = run_command(flags(tmp_path, manifest, *arguments, name=name), ranks=n)
        assert done.returncode == 0, done.stderr
    one, many = metrics(tmp_path, "one"), metrics(tmp_path, "many")
    assert list(many.values()) == pytest.approx(list(one.values()), abs=1e-5)
    assert len(one) == 12


def test_a_mode_that_does_not_exist_is_refused():
    for mode in ("every-0", "some", "every-"):
        with pytest.raises(ConfigError, match="--grad-checkpointing-mode"):
            ParallelConfig(grad_checkpointing_mode=mode)


class Casts(TorchDispatchMode):
    """Notes every matrix that is cast to bf16."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16 and result.ndim == 2:
            self.made.append(StorageWeakRef(result.untyped_storage()))
        return result


@pytest.mark.parametrize(("mode", "kept"), [("full", 0), (None, 16)])
def test_recomputed_blocks_keep_no_cast_weights(tiny, monkeypatch, mode, kept):
    make_state, make_batch, config = tiny
    state, alive = make_state("amp_bf16"), []
    state.model = create_model(dataclasses.replace(config, n_layers=4))
    recompute(list(state.model.layers), ParallelConfig(precision="amp_bf16", grad_checkpointing_mode=mode))

    def counting(*args):
        alive.append(sum(not storage.expired() for storage in casts.made))
        return linear_cross_entropy(*args)

    monkeypatch.setattr(tasks, "linear_cross_entropy", counting)
    with Casts() as casts:
        train_step(state, make_batch(), accum=1, clip=1.0, timing=Timing(torch.device("cpu")))
    assert len(casts.made) >= 16 and alive == [kept]
