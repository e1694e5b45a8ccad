"""Fake CUDA tensors: models, batches and ranks on a GPU that is not there, for scripts/trace_cuda.py.

A fake tensor has a device and a shape, and neither memory nor values: an operation on two devices, or on shapes that do
not fit, fails as it would on a GPU. What reads values gets 1, or zeros of a list.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import contextlib
import dataclasses
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm.data.batch import Batch
from open_lm.distributed import World
from open_lm.kernels import linear_cross_entropy as loss
from open_lm.model import attend_masked
from open_lm.model.config import ModelFlags, resolve_architecture
from open_lm.model.mask import Mask
from open_lm.model.transformer import Transformer

CUDA = torch.device("cuda", 0)
BASE = dataclasses.replace(resolve_architecture(ModelFlags(model="open_lm_11m")), seq_len=128)


def without_values():
    """Let what reads values of fake tensors go on, and kernels that launch by themselves give way to plain torch."""
    attend_masked.MIN_FLEX_QUERIES = sys.maxsize
    setattr(loss, "_fused_chunk", lambda: None)  # noqa: B010
    setattr(Mask, "_document_start", lambda self, position: 0)  # noqa: B010
    for name, value in {"item": 1, "__int__": 1, "__float__": 1.0, "__bool__": True}.items():
        setattr(FakeTensor, name, lambda self, value=value: value)
    FakeTensor.tolist = lambda self: _zeros(tuple(self.shape))
    FakeTensor.nonzero = lambda self, **_: self.new_empty((0, self.ndim), dtype=torch.long)
    fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # torch would copy single numbers to the device that is not there
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True


def _zeros(shape):
    return 0 if not shape else [_zeros(shape[1:]) for _ in range(shape[0])]


def fake(mode, *shape, dtype=torch.float32):
    """A fake CUDA tensor."""
    return FakeTensor(mode, torch.empty(*shape, dtype=dtype, device="meta"), CUDA)


def fake_model(config, mode):
    """A Transformer whose parameters are fake CUDA tensors."""
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(FakeTensor(mode, parameter.data, CUDA))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer, CUDA)
    model.tie_weights()
    return model


def fake_batch(config, mode, rows=2):
    """A batch of fake CUDA samples."""
    return Batch.from_samples(fake(mode, rows, config.seq_len + 1, dtype=torch.long))


def trace(name, changes, work, **settings):
    """Whether `work(model, config, mode)` goes through; what went wrong is printed."""
    config, mode = dataclasses.replace(BASE, **changes), FakeTensorMode(allow_non_fake_inputs=True)
    try:
        model = fake_model(config, mode)
        with mode:
            work(model, config, mode, **settings)
    except Exception as error:
        frames = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        print(f"{name}: {type(error).__name__}: {str(error)[:300]}\n    {' '.join(frames[-12:])}", flush=True)
        return False
    print(f"{name}: ok", flush=True)
    return True


@contextlib.contextmanager
def fake_ranks(n, shape):
    """This process as rank 0 of `n` on a mesh of `shape`, whose exchanges give back what they were given."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.cuda.set_device = lambda device: None
    torch.cuda.device_count = lambda: n
    torch.cuda.current_device = lambda: 0
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        world = World(0, n, 0, CUDA, shape)
        assert world.meshes.tensor.size() * world.meshes.weights.size() == n  # made before tensors are fake
        yield world
    finally:
        dist.destroy_process_group()
