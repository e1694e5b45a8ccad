"""The divergence of two output layers against torch in fp64 with all logits in memory."""

import pytest
import torch
import torch.nn.functional as F

from open_lm.kernels import linear_divergence as module
from open_lm.kernels.linear_divergence import linear_divergence


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_logits", [1, 60, 1 << 24])
def test_value_and_gradients_are_those_of_the_definition(temperature, chunk_logits, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 4), (11, 4), (7, 3), (11, 3)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    hidden, weight = (t.requires_grad_() for t in tensors[:2])
    counted = torch.tensor([1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)

    teacher = F.softmax(tensors[2] @ tensors[3].T / temperature, -1)
    student = F.log_softmax(hidden @ weight.T / temperature, -1)
    expected = temperature**2 * (teacher * (teacher.log() - student)).sum(-1)[counted].sum()
    grads = torch.autograd.grad(expected, (hidden, weight))

    total = linear_divergence(hidden, weight, tensors[2], tensors[3], counted, temperature)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(torch.autograd.grad(total, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_student_equal_to_its_teacher_has_no_divergence():
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    total = linear_divergence(hidden, weight, hidden, weight, torch.ones(5, dtype=torch.bool))
    assert total.item() == pytest.approx(0, abs=1e-6)


def under_fp16(n_targets, counted=None):
    """The gradients of hidden and weight in fp64 and under fp16 autocast with a loss scale, for a mean over
    `n_targets` targets; most of the vocabulary has probabilities of 1e-7 in both distributions."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 64), torch.randn(2000, 64) * 0.25
    weight[1000:] *= 0.2
    weight[1000:, 0] -= 1.0
    hidden[:, 0] = hidden[:, 0].abs() + 4
    teacher, teacher_weight = hidden + torch.randn(512, 64) * 0.3, weight + torch.randn(2000, 64) * 0.05
    counted = torch.ones(512, dtype=torch.bool) if counted is None else counted

    def gradients(dtype, scale):
        a, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float32):
            total = linear_divergence(a, w, teacher.to(dtype), teacher_weight.to(dtype), counted, 2.0)
        (total / n_targets * scale).backward()
        return a.grad.double() / scale, w.grad.double() / scale

    return gradients(torch.float64, 1.0), gradients(torch.float32, 65536.0)


@pytest.mark.parametrize("n_targets", [8, 512, 1 << 22])
def test_under_fp16_the_number_of_targets_takes_no_gradients_away(n_targets):
    expected, found = under_fp16(n_targets)
    assert all(grad.isfinite().all() for grad in found)
    rare, rare_found = expected[1][1000:], found[1][1000:]
    assert (rare_found - rare).norm() < 0.05 * rare.norm()
    for e, f in zip(expected, found, strict=True):
        assert (f - e).norm() < 0.02 * e.norm()


def test_under_fp16_a_loss_scale_that_is_too_large_shows_in_the_gradients():
    """So that the step is skipped and the scale falls: nothing wraps around or is cut off."""
    _, found = under_fp16(n_targets=1e-3)
    assert not torch.stack([grad.norm() for grad in found]).norm().isfinite()
