"""A tiny training state that can be saved and restored, on any ranks, without data or flags."""

import torch

from open_lm.checkpoint.config import CheckpointConfig
from open_lm.checkpoint.manager import Checkpoints
from open_lm.distributed import World
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.precision import Precision
from open_lm.train.averagers import parse_averagers
from open_lm.train.averaging import WeightAverage
from open_lm.train.config import OptimizerConfig, ParallelConfig
from open_lm.train.optim import build_optimizers
from open_lm.train.parallel import wrap
from open_lm.train.run_length import RunLength
from open_lm.train.spike_guard import SpikeGuard
from open_lm.train.state import TrainState
from open_lm.train.tasks import NextToken

CONFIG = ModelConfig(hidden_dim=16, n_layers=2, n_heads=2, seq_len=12, vocab_size=37)
AVERAGE = "ema_0.5_1"
STATS = {"evaluation_metrics": [], "samples_seen": 0}


class NoData:
    """A loader that knows nothing and accepts everything."""

    def state(self, step):
        return {"steps": step}

    def check_state(self, state):
        pass


def make_state(world=None, *, fsdp=False, seed=0, optimizer="adamw", extra_state=False):
    world = world or World()
    torch.manual_seed(seed)
    model = wrap(create_model(CONFIG), world, ParallelConfig(device="cpu", precision="fp32", fsdp=fsdp))
    state = TrainState(
        model=model,
        optimizers=build_optimizers(model, OptimizerConfig(optimizer=optimizer), lr=1e-2),
        precision=Precision("fp32", "cpu"),
        lr_at=lambda step: 1e-2,
        run_length=RunLength((100,), tokens_per_step=8 * CONFIG.seq_len),
        task=NextToken(0.0),
        world=world,
    )
    if extra_state:
        state.averages.append(WeightAverage(parse_averagers(AVERAGE)[0], model))
        state.guard = SpikeGuard(6.0)
    return state


def take_steps(state, n):
    """`n` updates with gradients that are a function of the step alone, the same on any ranks."""
    for _ in range(n):
        for k, p in enumerate(state.model.parameters()):
            full = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * state.step + k))
            if hasattr(p, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                full = distribute_tensor(full, p.device_mesh, p.placements)
            p.grad = full
        state.copied.wait()
        for optimizer in state.optimizers:
            optimizer.step()
        state.step += 1
        state.tokens += state.tokens_per_step
        for average in state.averages:
            average.update(state.step)
        if state.guard:
            state.guard.accept(1 / state.step, 1.0)


def make_checkpoints(folder, **flags):
    about = {"model": CONFIG.to_dict(), "flags": {"optimizer": "adamw"}}
    return Checkpoints(str(folder), CheckpointConfig(**flags), name="run", config=about)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def content(state):
    """Everything of a state as whole tensors, for comparing bit by bit."""
    from open_lm.checkpoint.snapshot import live
    from open_lm.checkpoint.tree import map_tensors

    tree = map_tensors(live(state), lambda name, tensor: whole(tensor.detach()).clone())
    return {**tree, "step": state.step, "tokens": state.tokens}


def assert_same(left, right, *, where=""):
    """Two trees of tensors and values are equal bit by bit."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            assert_same(left[name], right[name], where=f"{where}.{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for k, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, where=f"{where}[{k}]")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    else:
        assert left == right, where
