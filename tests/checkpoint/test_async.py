"""A save beside the training holds the state of its step, bit for bit, however far training has come meanwhile."""

import threading

import pytest
import torch
from checkpoint.states import CONFIG, STATS, NoData, assert_same, content, make_checkpoints, make_state, take_steps
from gloo import run_ranks

from open_lm.checkpoint import manager
from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.restore import restore
from open_lm.data.batch import Batch
from open_lm.errors import StorageError
from open_lm.precision import Precision
from open_lm.train.step import average_losses, train_step
from open_lm.train.timing import Timing

FORMATS = ["consolidated", "sharded"]


class Held:
    """Lets the writing of a checkpoint begin only when `release` is called."""

    def __init__(self, monkeypatch):
        self.begun, self._may_go = threading.Event(), threading.Event()
        for name in ("write_consolidated", "write_sharded"):
            monkeypatch.setattr(manager, name, self._held(getattr(manager, name)))

    def _held(self, write):
        def waiting(*arguments):
            self.begun.set()
            assert self._may_go.wait(60)
            return write(*arguments)

        return waiting

    def release(self):
        self._may_go.set()


def save_while_training(folder, state, held, form):
    """The state at the save, as whole tensors; three more steps are taken before anything is written."""
    take_steps(state, 2)
    at_the_save = content(state)
    checkpoints = make_checkpoints(folder, checkpoint_format=form)
    assert checkpoints.save(state, NoData(), label="1", stats=STATS)
    assert held.begun.wait(60) if state.world.is_master or form == "sharded" else True
    take_steps(state, 3)
    assert not committed(str(folder))
    held.release()
    assert checkpoints.wait()
    return at_the_save


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_what_is_written_is_the_state_at_the_save(tmp_path, monkeypatch, form, optimizer):
    state = make_state(optimizer=optimizer, extra_state=True)
    expected = save_while_training(tmp_path, state, Held(monkeypatch), form)
    again = make_state(optimizer=optimizer, seed=1, extra_state=True)
    restore(make_checkpoints(tmp_path, resume="latest"), again, NoData())
    assert_same(content(again), expected)


def one_step(state):
    """A step of the training itself, and then the loss of each average on its batch."""
    rows = torch.randint(0, CONFIG.vocab_size, (8, CONFIG.seq_len + 1), generator=torch.Generator().manual_seed(1))
    batch = Batch.from_samples(rows)
    taken = train_step(state, batch, accum=1, clip=1.0, timing=Timing(state.world.device)).taken
    average_losses(state, batch, accum=1)
    return taken


def spike(state):
    state.accept = lambda *_: False


def overflow(state):
    state.precision = Precision("fp16", "cpu")
    scaled = state.precision.backward
    state.precision.backward = lambda loss: scaled(loss * float("inf"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("optimizer", "skipped"),
    [("adamw", None), ("adamw", spike), ("lion", overflow)],
    ids=["taken", "left out as a spike", "left out as an overflow"],
)
def test_a_save_returns_before_the_copy_and_no_step_changes_anything_until_it_is_made(
    tmp_path, monkeypatch, form, optimizer, skipped
):
    """Weights, moments and averages: also a step that is left out changes some of them."""
    real, may_go = manager.take, threading.Event()
    monkeypatch.setattr(manager, "take", lambda *words, **more: (may_go.wait(60), real(*words, **more))[1])
    state = make_state(optimizer=optimizer, extra_state=True)
    checkpoints = make_checkpoints(tmp_path, checkpoint_format=form)
    take_steps(state, 1)
    expected = content(state)
    assert checkpoints.save(state, NoData(), label="1", stats=STATS)
    if skipped:
        skipped(state)
    stepping = threading.Thread(target=one_step, args=(state,))
    stepping.start()
    stepping.join(0.2)
    assert stepping.is_alive()
    may_go.set()
    stepping.join(60)
    assert checkpoints.wait() and state.step == 2
    again = make_state(seed=1, optimizer=optimizer, extra_state=True)
    restore(make_checkpoints(tmp_path, resume="latest"), again, NoData())
    assert_same(content(again), expected)


def _on_ranks(world, folder, form):
    with pytest.MonkeyPatch.context() as monkeypatch:
        state = make_state(world, fsdp=True, extra_state=True)
        expected = save_while_training(folder, state, Held(monkeypatch), form)
    again = make_state(world, fsdp=True, seed=1, extra_state=True)
    restore(make_checkpoints(folder, resume="latest"), again, NoData())
    assert_same(content(again), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_two_sharded_ranks_train_on_while_their_state_is_written(tmp_path, form):
    run_ranks(_on_ranks, 2, tmp_path, form)


def test_the_next_save_waits_for_the_one_on_its_way_and_reuses_its_memory(tmp_path, monkeypatch):
    held, state = Held(monkeypatch), make_state()
    expected = save_while_training(tmp_path, state, held, "consolidated")
    checkpoints = make_checkpoints(tmp_path)
    later = []
    for label in ("2", "3"):
        take_steps(state, 1)
        later.append(content(state))
        assert checkpoints.save(state, NoData(), label=label, stats=STATS)
    assert checkpoints.wait()
    for label, wanted in zip(("1", "2", "3"), (expected, *later), strict=True):
        stored = torch.load(tmp_path / f"epoch_{label}.pt", weights_only=True)["state_dict"]
        assert_same(dict(stored), dict(wanted["weights"]))


@pytest.mark.parametrize("then", ["the next step", "the end by another error"])
def test_a_save_that_fails_beside_the_training_is_noticed(tmp_path, monkeypatch, caplog, then):
    def full(*arguments):
        raise StorageError("no space left.")

    monkeypatch.setattr(manager, "write_consolidated", full)
    state, checkpoints = make_state(), make_checkpoints(tmp_path)
    take_steps(state, 1)
    assert checkpoints.save(state, NoData(), label="1", stats=STATS)
    checkpoints._background.wait()
    assert "was not written" not in caplog.text
    if then == "the next step":
        checkpoints.wait_if_done()
    else:
        assert checkpoints.close()
    assert checkpoints.problem == "no space left." and "was not written" in caplog.text
    assert not committed(str(tmp_path))
