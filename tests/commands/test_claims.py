"""Requests to stop and to save ride on the sum of a step's counts: ranks decide together, and exchange nothing more."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from gloo import launch, run_ranks
from runs import flags, folder_of, write_data

from open_lm.distributed import World
from open_lm.errors import Preempted
from open_lm.main import main
from open_lm.mesh import MeshShape
from open_lm.run.claims import Agreement, Claims


def counts(stop, save):
    return torch.tensor([stop, save])


def test_one_process_does_what_it_claims_now():
    agreement = Agreement(World())
    agreement.read(None)
    assert agreement.lag == 0 and agreement.on(Claims(stop=True)) == Claims(stop=True)


def test_ranks_on_cpus_know_after_the_step_that_carried_the_claims():
    agreement = Agreement(World(size=2))
    agreement.read(counts(0, 0))
    assert agreement.on(Claims(True, True)) == Claims()
    agreement.read(counts(1, 2))
    assert agreement.on(Claims()) == Claims(True, True)


def test_on_gpus_a_claim_is_read_one_step_later_and_a_save_is_made_once():
    agreement = Agreement(World(size=2, device=torch.device("cuda", 0)))
    agreement.read(counts(0, 1))
    assert agreement.on(Claims()) == Claims()
    agreement.read(counts(0, 1))  # claimed before the save that follows
    assert agreement.on(Claims()) == Claims(save=True)
    agreement.forget_save()
    assert agreement.on(Claims()) == Claims()
    agreement.read(counts(1, 0))
    assert agreement.on(Claims()) == Claims()
    agreement.read(counts(0, 0))
    assert agreement.on(Claims()) == Claims(stop=True)


def _sums(world, shape):
    world = replace(world, mesh=shape)
    values = torch.tensor([10 + world.share_rank, 1])
    claims = [world.rank == world.size - 1, False]
    total, made = world.sum_with_claims(values, claims)
    assert torch.equal(total, world.sum(values)) and made.tolist() == [1, 0]
    halves = values.double() + 0.5
    assert torch.equal(world.sum_with_claims(halves, claims)[0], world.sum(halves))
    scalar, none = world.sum_with_claims(values[0], ())
    assert scalar.shape == () and none is None


@pytest.mark.parametrize("shape", [MeshShape(dp=2), MeshShape(tp=2)])
def test_a_claim_of_any_rank_reaches_all_and_the_sum_is_that_without_claims(shape):
    run_ranks(_sums, 2, shape)


def _counted(rank, words, folder):
    """A run of one of two ranks; how often it exchanged tensors or objects by itself."""
    seen = {"all_reduce": 0, "all_gather_object": 0, "broadcast_object_list": 0}

    def counting(name, real):
        def call(*args, **kwargs):
            seen[name] += 1
            return real(*args, **kwargs)

        return call

    for name in seen:
        setattr(dist, name, counting(name, getattr(dist, name)))
    main(words)
    with open(f"{folder}/{len(words)}_{rank}.json", "w") as file:
        json.dump(seen, file)


def test_a_step_makes_one_exchange_beside_those_of_the_gradients(tmp_path):
    manifest, found = write_data(tmp_path / "data"), []
    for steps in (6, 12):
        words = flags(tmp_path, manifest, "--save-every-minutes", "60", "--time-limit-minutes", "60", steps=steps,
                      name=f"run{steps}")  # fmt: skip
        words[words.index("--log-every-n-steps") + 1] = "100"
        launch(_counted, 2, words, str(tmp_path))
        found.append(json.loads((tmp_path / f"{len(words)}_0.json").read_text()))
    assert found[1]["all_reduce"] - found[0]["all_reduce"] == 6
    assert found[1]["all_gather_object"] == found[0]["all_gather_object"]
    assert found[1]["broadcast_object_list"] == found[0]["broadcast_object_list"]


def _stopped(rank, words, folder):
    """A run whose last rank gets a signal in its third step."""
    from open_lm.run.run import Run

    real = Run.claims

    def claims(run):
        run.n_claims = getattr(run, "n_claims", 0) + 1
        if rank == 1 and run.n_claims == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(run)

    Run.claims = claims
    with pytest.raises(Preempted, match="SIGUSR1 after step 4"):
        main(words)


@pytest.mark.parametrize("mesh", ["tp=2", pytest.param("dp=2", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path, mesh):
    words = flags(tmp_path, write_data(tmp_path / "data"), "--mesh", mesh)
    launch(_stopped, 2, words, str(tmp_path))
    saved = list((folder_of(tmp_path) / "checkpoints").glob("*step4*"))
    assert saved
