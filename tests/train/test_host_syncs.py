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
