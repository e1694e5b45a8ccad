"""The samples that were really read are those the plan wants, or the run stops: proven anew at every step."""

import numpy as np
import pytest

from open_lm.data import loader as module
from open_lm.data.config import DataConfig
from open_lm.data.loader import PlannedSamples, build_loader
from open_lm.data.pipeline import Filled
from open_lm.data.reader import mark_of
from open_lm.errors import DataError


@pytest.fixture
def loader(data_set):
    folder = data_set([40, 60])
    config = DataConfig(dataset_manifest=(f"{folder}/manifest.jsonl",), workers=0)
    return build_loader(config, vocab_size=60_000, seq_len=4, global_batch=8, rank=0, world_size=1, seed=3)


class Faulty(PlannedSamples):
    """Reads as asked but for step 3, where `fault` says what is read instead."""

    fault = None

    def __call__(self, positions):
        changed = Faulty.fault(positions.copy()) if positions[0] == 24 else positions
        return super().__call__(changed)


FAULTS = {
    "one step ahead": lambda positions: positions + 8,
    "one twice, one not": lambda positions: np.append(positions[:-1], positions[0]),
    "of another place": lambda positions: np.append(positions[:-1], 99),
}


@pytest.mark.parametrize("name", FAULTS)
def test_reading_other_samples_than_planned_stops_the_run_at_that_step(loader, name):
    Faulty.fault = staticmethod(FAULTS[name])
    loader._fill = Faulty(loader.plan, loader._fill.reader)
    batches = loader.batches(0, 12)
    for _ in range(3):
        next(batches)
    with pytest.raises(DataError, match="step 3: the data workers read other samples than planned"):
        next(batches)


def test_the_order_within_a_step_does_not_matter_to_the_mark():
    urls, index = ["a", "b", "a", "c"], np.array([5, 5, 6, 0])
    assert mark_of(urls, index) == mark_of(urls[::-1], index[::-1]) != mark_of(urls, index[::-1])
    assert mark_of(["a", "b"], np.array([1, 2])) != mark_of(["a", "b"], np.array([2, 1]))


def test_a_worker_that_says_nothing_is_noticed(loader, monkeypatch):
    real = module.run_pipeline

    def silent(source, fill, **kwargs):
        return real(source, lambda positions: Filled(*fill(positions)[:2]), **kwargs)

    monkeypatch.setattr(module, "run_pipeline", silent)
    with pytest.raises(DataError, match="step 0"):
        next(loader.batches(0, 1))
