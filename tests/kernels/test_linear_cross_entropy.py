"""The fused output layer and loss against its definition, in values and gradients."""

import pytest
import torch

from open_lm.kernels import linear_cross_entropy as module
from open_lm.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "rows_per_chunk", lambda *_: 5)


def tensors(n=23, d=8, v=37, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, v, (n,))
    targets[::4] = -100
    return hidden, weight, targets


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_values_and_gradients_equal_the_definition(z_loss):
    hidden, weight, targets = tensors()
    got = linear_cross_entropy(hidden, weight, targets, z_loss)
    expected = linear_cross_entropy_reference(hidden, weight, targets, z_loss)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(3 * got.total, (hidden, weight))
    theirs = torch.autograd.grad(3 * expected.total, (hidden, weight))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
def test_gradients_are_those_of_small_differences():
    hidden, weight, targets = tensors(n=6, d=3, v=5)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 0.1).total, weight)
    step = 1e-4
    for place in ((0, 0), (2, 1), (4, 2)):
        nudge = torch.zeros_like(weight)
        nudge[place] = step
        up, down = (linear_cross_entropy_reference(hidden, weight + s * nudge, targets, 0.1).total for s in (1, -1))
        assert gradient[place].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=2e-2, abs=1e-2)


def test_a_batch_without_targets_costs_nothing_and_moves_nothing():
    hidden, weight, _ = tensors()
    got = linear_cross_entropy(hidden, weight, torch.full((23,), -100))
    assert got.total.item() == 0
    for gradient in torch.autograd.grad(got.total, (hidden, weight)):
        assert gradient.abs().max() == 0


def test_backward_twice_gives_the_same_gradient():
    hidden, weight, targets = tensors(dtype=torch.float32)
    total = linear_cross_entropy(hidden, weight, targets).total
    first = torch.autograd.grad(2 * total, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(2 * total, hidden)[0]
    torch.testing.assert_close(first, second)


def test_bf16_autocast_stays_near_fp32():
    hidden, weight, targets = tensors(n=64, d=16, dtype=torch.float32)
    exact = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, targets)
    assert rounded.cross_entropy.dtype == torch.float32
    torch.testing.assert_close(rounded.cross_entropy, exact.cross_entropy, rtol=2e-2, atol=0)


def test_the_sums_are_not_rounded_to_the_type_of_the_weights():
    hidden, weight, targets = tensors(n=64, d=16, dtype=torch.bfloat16)
    got = linear_cross_entropy(hidden, weight, targets)
    assert got.total.dtype == torch.float32
    assert torch.autograd.grad(got.total, weight)[0].dtype == torch.bfloat16


def test_under_fp16_rare_ids_get_their_gradients_and_frequent_ones_do_not_overflow():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(512, 64), torch.randn(2000, 64) * 0.25, torch.randint(0, 1000, (512,))
    weight[1000:] *= 0.2
    weight[1000:, 0] -= 2.0  # half of the vocabulary has probabilities of 1e-12 to 1e-8
    hidden[:, 0] = hidden[:, 0].abs() + 4
    targets[:400] = 3

    def gradients(dtype, autocast):
        a, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            total = linear_cross_entropy(a, w, targets).total
        (total / 512 * (65536.0 if autocast else 1.0)).backward()
        return (a.grad / 65536, w.grad / 65536) if autocast else (a.grad, w.grad)

    expected, found = gradients(torch.float64, False), gradients(torch.float32, True)
    rare, rare_found = expected[1][1000:], found[1][1000:].double()
    assert found[1].isfinite().all() and found[0].isfinite().all()
    assert (rare_found == 0).double().mean() < 0.1
    assert (rare_found - rare).norm() < 0.05 * rare.norm()
    for e, f in zip(expected, found, strict=True):
        assert (f.double() - e).norm() < 0.01 * e.norm()
