"""Between two log steps the host never waits for a value: no step reads a tensor back."""

import contextlib

import pytest
import torch

from open_lm.train.loop import train

READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class Silent:
    """A run in which nothing is due."""

    def observe(self, state):
        return contextlib.nullcontext()

    def __getattr__(self, name):
        return lambda *_: None


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
@pytest.mark.parametrize("accum", [1, 2])
def test_steps_without_a_log_line_read_nothing_back(tiny, optimizer, accum):
    make_state, make_batch, _ = tiny
    state = make_state(z_loss=1e-4, optimizer=optimizer)
    train(state, [make_batch(0)], Silent(), accum=accum, clip=1.0)  # the optimizer's state is made in the first step
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(state, [make_batch(k) for k in range(1, 4)], Silent(), accum=accum, clip=1.0)
    names = [event.name for event in profile.events()]
    assert "aten::mm" in names
    assert [event.name for event in profile.events() if event.name in READS and not in_fused_adamw(event)] == []


def in_fused_adamw(event):
    """On a CPU torch's fused AdamW looks at its step counts, which are in host memory; on a GPU it does not."""
    while event is not None:
        if event.name == "aten::_fused_adamw_":
            return True
        event = event.cpu_parent
    return False


def test_the_count_sees_a_read():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(1).item()
    assert "aten::_local_scalar_dense" in {event.key for event in profile.key_averages()}


def test_a_norm_on_the_host_is_counted_beside_parts_on_the_device():
    """As under --fsdp-cpu-offload; `meta` stands for the GPU."""
    from types import SimpleNamespace

    from open_lm.distributed import World
    from open_lm.run.recorder import Recorder
    from open_lm.tracking.meter import Meter
    from open_lm.train.step import StepReport

    recorder = SimpleNamespace(
        _meter=Meter(World(), 1, 1, None), _watchdog=SimpleNamespace(beat=lambda: None), _bar=None
    )
    Recorder.add(recorder, StepReport(torch.zeros(2, device="meta"), torch.ones((), dtype=torch.float64), 1e-3), None)
    assert recorder._meter._sums.device.type == "meta"


def test_groups_are_left_alone_after_a_failure_on_gpus_and_destroyed_else(monkeypatch):
    from open_lm import distributed

    destroyed = []
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: destroyed.append(1))
    on_gpu, on_cpu = (distributed.World(device=torch.device(name)) for name in ("cuda", "cpu"))
    for world, is_lost, n in ((on_gpu, True, 0), (on_gpu, False, 1), (on_cpu, True, 2), (on_cpu, False, 3)):
        distributed.leave(world, is_lost=is_lost)
        assert len(destroyed) == n
