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
