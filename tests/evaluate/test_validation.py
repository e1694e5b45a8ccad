"""Held-out loss by the byte and its intervals, against plain torch in fp64, scipy, and the theory of the mean."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from runs import SEQ_LEN, VOCAB

from open_lm.data.batch import IGNORED, Batch
from open_lm.distributed import World
from open_lm.evaluate.bootstrap import Bootstrap, interval_95, resampled_means
from open_lm.evaluate.validation import ValidationSet, evaluate
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.precision import Precision

SETTINGS = Bootstrap(sequences=True, tokens=True, n_resamples=2000, max_population=None, seed=0)
FP32 = Precision("fp32", "cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(ModelConfig(hidden_dim=16, n_layers=1, n_heads=2, seq_len=SEQ_LEN, vocab_size=VOCAB))


def batches(n=13, size=4):
    """Random sequences, the first half masked in every third, the last batch filled up with masked rows."""
    samples = torch.randint(0, VOCAB, (-(-n // size) * size, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = samples[:, :-1], samples[:, 1:].clone()
    targets[::3, : SEQ_LEN // 2] = IGNORED
    targets[n:] = IGNORED
    return [Batch(*part) for part in zip(inputs.split(size), targets.split(size), strict=True)]


def reference(model):
    """Losses of each counted token, sequence by sequence, in fp64 from the logits on."""
    losses = []
    for batch in batches():
        with torch.no_grad():
            logits = model(batch.inputs_BT)[0].double()
        for row, targets in zip(logits, batch.targets_BT, strict=True):
            if (targets != IGNORED).any():
                losses.append(F.cross_entropy(row[targets != IGNORED], targets[targets != IGNORED], reduction="none"))
    return losses


@pytest.mark.parametrize("bootstrap", [None, SETTINGS])
def test_the_loss_is_the_mean_over_tokens_with_and_without_intervals(model, bootstrap):
    expected = reference(model)
    (found,) = evaluate(model, [ValidationSet("a", "a", batches)], World(), FP32, bootstrap)
    assert found.loss == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)
    assert (found.sequences, found.tokens) == (13, sum(map(len, expected)))
    assert (found.bytes, found.bits_per_byte) == (None, None)


def test_bits_per_byte_are_all_bits_over_the_bytes_of_the_targets(model):
    bytes_of_V = torch.arange(VOCAB)  # id k stands for k bytes, 0 for none
    (found,) = evaluate(model, [ValidationSet("a", "a", batches, bytes_of_V)], World(), FP32)
    targets = [int(t) for batch in batches() for t in batch.targets_BT.flatten() if t != IGNORED]
    assert found.bytes == sum(targets)
    bits = sum(float(losses.sum()) for losses in reference(model)) / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / sum(targets), rel=1e-5)


def test_intervals_are_scipys(model):
    (found,) = evaluate(model, [ValidationSet("a", "a", batches)], World(), FP32, SETTINGS)
    losses = reference(model)
    for interval, values in [
        (found.sequence_interval, [float(part.mean()) for part in losses]),
        (found.token_interval, torch.cat(losses).numpy()),
    ]:
        theirs = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=5000, method="percentile", vectorized=True, rng=np.random.default_rng(0)
        ).confidence_interval
        spread = theirs.high - theirs.low
        assert interval == pytest.approx((theirs.low, theirs.high), abs=0.1 * spread)


@pytest.mark.parametrize("size", [10, 5000])
def test_resamples_of_any_size_have_the_spread_that_theory_gives(size, monkeypatch):
    monkeypatch.setattr(
        "open_lm.evaluate.bootstrap.DRAWS_AT_ONCE", 700
    )  # several resamples a block, several a resample
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    means = resampled_means(values.numpy(), 400, size, seed=1)
    n_drawn = min(size, len(values))
    assert float(means.std()) == pytest.approx(float(values.std()) / n_drawn**0.5, rel=0.2)
    assert float(means.mean()) == pytest.approx(
        float(values.mean()), abs=4 * float(values.std()) / (n_drawn * 400) ** 0.5
    )


def test_the_order_of_the_values_does_not_matter():
    values = torch.rand(50)
    assert interval_95(values, SETTINGS) == interval_95(values.flip(0), SETTINGS)


def test_at_two_ranks_everything_is_as_at_one(tmp_path, model):
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    (one,) = evaluate(model, [ValidationSet("a", "a", batches, torch.arange(VOCAB))], World(), FP32, SETTINGS)
    assert first == second
    assert first["loss"] == pytest.approx(one.loss, rel=1e-6)
    assert first["bytes"] == one.bytes
    assert first["token_interval"] == pytest.approx(one.token_interval, rel=1e-6)
    assert first["sequence_interval"] == pytest.approx(one.sequence_interval, rel=1e-6)


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    same = create_model(ModelConfig(hidden_dim=16, n_layers=1, n_heads=2, seq_len=SEQ_LEN, vocab_size=VOCAB))
    mine = ValidationSet("a", "a", lambda: batches()[rank::2], torch.arange(VOCAB))
    (found,) = evaluate(same, [mine], World(rank, 2), FP32, SETTINGS)
    (folder / f"{rank}.json").write_text(json.dumps(vars(found)))
    torch.distributed.destroy_process_group()
