"""The Triton kernel of the loss, run by Triton's interpreter, equals the definition in fp64."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT

pytest.importorskip("triton", reason="triton is not installed; CUDA builds of torch bring it")

PROGRAM = """
import json, torch
from open_lm.kernels import fused_rows
from open_lm.kernels.linear_cross_entropy import linear_cross_entropy_reference
from open_lm.kernels.loss_chunks import LossChunk, gradient_scale, sums_in_chunks

fused_rows.LARGEST_BLOCK = 32
found = []
for n, dim, vocab, z_loss, dtype in [(11, 8, 37, 1e-2, torch.float32), (5, 8, 32, 0.0, torch.float32),
                                     (7, 16, 70, 1e-3, torch.bfloat16), (9, 16, 70, 1e-3, torch.float16)]:
    torch.manual_seed(n)
    hidden, weight = torch.randn(n, dim).to(dtype), (3 * torch.randn(vocab, dim)).to(dtype)
    targets = torch.randint(0, vocab, (n,)); targets[1] = -100; targets[-1] = vocab - 1
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    sums = linear_cross_entropy_reference(*exact, targets, z_loss); sums.total.backward()
    plain = sums_in_chunks(LossChunk(4, weight, z_loss), hidden, weight, targets, True)
    got, gradients = sums_in_chunks(fused_rows.FusedChunk(4, weight, z_loss), hidden, weight, targets, True)
    for of_hidden, _ in (plain[1], gradients):  # is times the scale
        of_hidden /= gradient_scale(dtype)
    alone, none = sums_in_chunks(fused_rows.FusedChunk(4, weight, z_loss), hidden, weight, targets, False)
    assert none is None and torch.equal(alone, got)
    off = [((g.double() - e.grad).abs().max() / e.grad.abs().max()).item() for g, e in zip(gradients, exact)]
    off_plain = [((g.double() - e.grad).abs().max() / e.grad.abs().max()).item() for g, e in zip(plain[1], exact)]
    found.append({"sums": got.tolist(), "exact": [sums.cross_entropy.item(), sums.squared_log_z.item()],
                  "off": max(off), "plain": max(off_plain), "dtype": str(dtype)})
print(json.dumps(found))
"""


def test_the_kernel_equals_the_definition_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for case in json.loads(done.stdout.splitlines()[-1]):
        low = case["dtype"] != "torch.float32"
        assert case["sums"] == pytest.approx(case["exact"], rel=1e-2 if low else 1e-5)
        assert case["off"] < max(2 * case["plain"], 1e-5)
        assert case["plain"] < (1e-2 if low else 1e-5)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from open_lm.kernels.fused_rows import _reduce_row

types = {"targets": "*i64", "losses": "*fp32", "squares": "*fp32", "stride": "i64", "vocab_size": "i32",
         "z_loss": "fp32", "factor": "fp32", "needs_grad": "constexpr", "block": "constexpr"}
for capability, logits in ((80, "*bf16"), (80, "*fp16"), (90, "*bf16"), (90, "*fp32")):
    source = ASTSource(_reduce_row, {"logits": logits, **types}, {"needs_grad": True, "block": 4096})
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    print("compiled", capability, len(kernel.asm["cubin"]))
"""


def test_the_kernel_compiles_for_ampere_and_hopper_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.count("compiled") == 4, done.stderr[-3000:]
