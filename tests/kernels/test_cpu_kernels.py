"""The C++ kernels against textbook formulas in fp64, in values and gradients, and when they are used at all."""

import math

import pytest
import torch
from torch import nn

from open_lm.kernels import attention, linear_cross_entropy, native
from open_lm.kernels.attention import causal_attention
from open_lm.train.activation_checkpointing import recompute_in_backward

CLOSE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Largest relative error (of norms). In bf16 torch's own attention is off by 2e-3 to 5e-3."""


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not native.use_cpu_kernels():
        pytest.skip("the C++ kernels do not run here: no compiler or no AVX-512")
    yield
    native.use_cpu_kernels(False)


def off_by(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-9)).item()


def textbook_attention(q, k, v):
    """(B, T, H, K) in fp64, written out."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[3])
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(future, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 8), (2, 37, 3, 3, 8), (1, 64, 2, 1, 16), (2, 131, 4, 2, 40), (1, 300, 2, 2, 64), (1, 2100, 1, 1, 10)],
)
def test_attention_and_its_gradients_are_the_textbook_s(dtype, shape):
    torch.manual_seed(0)
    batch, length, heads, groups, width = shape
    q, k, v = (torch.randn(batch, length, n, width).to(dtype).requires_grad_() for n in (heads, groups, groups))
    assert attention.runs_for(q, k, v)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    grad = torch.randn(batch, length, heads, width).to(dtype)
    got, exact = causal_attention(q, k, v), textbook_attention(q64, k64, v64)
    assert off_by(got, exact) < CLOSE[dtype]
    theirs = torch.autograd.grad(exact, (q64, k64, v64), grad.double())
    for mine, other in zip(torch.autograd.grad(got, (q, k, v), grad), theirs, strict=True):
        assert mine.dtype == dtype
        assert off_by(mine, other) < CLOSE[dtype] or length == 1


def test_attention_reads_slices_of_one_projection_in_place():
    torch.manual_seed(0)
    packed = torch.randn(2, 70, 3 * 24, requires_grad=True)
    q, k, v = (x.unflatten(-1, (3, 8)) for x in packed.split(24, -1))
    exact = textbook_attention(*(x.double() for x in (q, k, v)))
    got = causal_attention(q, k, v)
    assert off_by(got, exact) < 2e-6
    strange = torch.randn(2, 70, 8, 3).transpose(2, 3)  # a gradient whose last dimension is not contiguous
    (mine,) = torch.autograd.grad(got, packed, strange)
    (theirs,) = torch.autograd.grad(exact, packed, strange.double())
    assert off_by(mine, theirs.double()) < 2e-6


def test_scores_far_apart_neither_overflow_nor_become_nan():
    q = (torch.randn(1, 90, 2, 8) * 300).requires_grad_()
    got = causal_attention(q, q, q)
    assert off_by(got, textbook_attention(*[q.double()] * 3)) < 1e-5
    assert torch.autograd.grad(got.sum(), q)[0].isfinite().all()


def textbook_loss(hidden, weight, targets, z_loss):
    logits = hidden @ weight.T
    log_z, counts = logits.exp().sum(-1).log(), targets >= 0
    cross_entropy = ((log_z - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]) * counts).sum()
    squared = (log_z.square() * counts).sum()
    return cross_entropy + z_loss * squared, cross_entropy, squared


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(23, 8, 37), (300, 96, 1001), (2500, 16, 300), (1, 2, 5)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_and_its_gradients_are_the_textbook_s(dtype, shape, z_loss):
    torch.manual_seed(0)
    n, dim, vocab = shape
    hidden, weight = (torch.randn(rows, dim).to(dtype).requires_grad_() for rows in (n, vocab))
    targets = torch.randint(0, vocab, (n,))
    targets[1::4] = -100
    assert linear_cross_entropy.runs_for(hidden, weight)
    hidden64, weight64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    got = linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, z_loss)
    exact = textbook_loss(hidden64, weight64, targets, z_loss)
    assert [x.item() for x in got] == pytest.approx([x.item() for x in exact], rel=1e-5)
    theirs = torch.autograd.grad(3 * exact[0], (hidden64, weight64))
    for mine, other in zip(torch.autograd.grad(3 * got.total, (hidden, weight)), theirs, strict=True):
        assert mine.dtype == dtype
        assert off_by(mine, other) < CLOSE[dtype]


def test_a_batch_without_targets_costs_nothing_and_moves_nothing():
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    got = linear_cross_entropy.linear_cross_entropy(hidden, weight, torch.full((9,), -100))
    assert got.total.item() == 0
    for gradient in torch.autograd.grad(got.total, (hidden, weight)):
        assert gradient.abs().max() == 0


def test_several_threads_compute_what_one_does():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(70, 16), torch.randn(1500, 16), torch.randint(0, 1500, (70,))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.open_lm.linear_cross_entropy(hidden, weight, targets, 0.0, True))
    torch.set_num_threads(before)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_the_operators_keep_torchs_contract():
    q = torch.randn(1, 20, 2, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.open_lm.attention_forward, (q, q, q))


def test_it_runs_under_compilation_and_activation_checkpointing():
    class Mix(nn.Module):
        def forward(self, x):
            return causal_attention(x, x * 2, x)

    x = torch.randn(1, 33, 2, 8, requires_grad=True)
    (exact,) = torch.autograd.grad(Mix()(x).square().sum(), x)
    compiled, recomputed = torch.compile(Mix(), backend="aot_eager"), Mix()
    recompute_in_backward(recomputed)
    for module in (compiled, recomputed):
        torch.testing.assert_close(torch.autograd.grad(module(x).square().sum(), x)[0], exact)


def test_what_the_kernels_do_not_compute_falls_to_torch():
    q = torch.randn(1, 12, 2, 8, requires_grad=True)
    with torch.no_grad():
        assert not attention.runs_for(q, q, q)  # no training step
    for other in (q.half(), q.double(), q[..., :7]):
        assert not attention.runs_for(other, other, other)
        exact = textbook_attention(*[other.double()] * 3)
        assert off_by(causal_attention(other, other, other), exact) < 1e-2
    assert not attention.runs_for(q[:, -1:], q, q)  # decoding: fewer queries than keys
    native.use_cpu_kernels(False)
    assert not attention.runs_for(q, q, q)
    assert native.use_cpu_kernels()
