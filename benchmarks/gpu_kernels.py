"""Loss and attention on a GPU: milliseconds and peak memory of each form, forward and backward.

python benchmarks/gpu_kernels.py [--vocab 50432] [--dim 2048] [--tokens 8192] [--seq-len 8192]
"""

import argparse
import time

import torch

from open_lm.kernels import linear_cross_entropy as loss
from open_lm.kernels.loss_chunks import LossChunk, rows_per_chunk, sums_in_chunks
from open_lm.model import attend_masked
from open_lm.model.mask import Mask, Reach

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measured(work, rounds=10):
    """`(milliseconds, peak GiB above what was there)` of one call."""
    for _ in range(2):
        work()
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - began), 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / rounds, (torch.cuda.max_memory_allocated() - before) / 2**30


def of_loss(args):
    hidden = torch.randn(args.tokens, args.dim, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(args.vocab, args.dim, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, args.vocab, (args.tokens,), device=DEVICE)
    n_rows = rows_per_chunk(args.tokens, args.dim, args.vocab)
    kinds = {"chunks": LossChunk, "chunks, rows in Triton": loss._fused_chunk() if DEVICE.type == "cuda" else None}
    for name, kind in kinds.items():
        if kind is not None:
            yield (
                f"loss, {name}",
                lambda kind=kind: sums_in_chunks(kind(n_rows, weight, 1e-4), hidden, weight, targets, True),
            )

    def whole():
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss.linear_cross_entropy_reference(x, w, targets, 1e-4).total.backward()

    yield "loss, all logits at once", whole


def of_attention(args):
    n = args.seq_len
    qkv = [torch.randn(1, n, h, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for h in (16, 4, 4)]
    documents = (torch.arange(n, device=DEVICE) // 1000)[None]
    for rule, given in {"documents": {"documents_BS": documents}, "window of 1024": {"reach": Reach(1024)}}.items():
        for name, attend in (("flex or blocks", attend_masked.masked_attention), ("blocks", attend_masked.in_blocks)):
            yield (
                f"{rule}, {name}",
                lambda attend=attend, given=given: attend(*qkv, Mask(n, n, DEVICE, **given)).sum().backward(),
            )

    def dense():
        visible = Mask(n, n, DEVICE, documents_BS=documents).dense()
        attend_masked.attention(*qkv, visible=visible).sum().backward()

    yield "documents, dense mask", dense


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocab", 50_432), ("dim", 2048), ("tokens", 8192), ("seq-len", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print("| what | ms | GiB at peak |\n|---|---:|---:|")
    for name, work in (*of_loss(args), *of_attention(args)):
        try:
            milliseconds, gib = measured(work)
            print(f"| {name} | {milliseconds:.2f} | {gib:.2f} |", flush=True)
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory | |", flush=True)


if __name__ == "__main__":
    main()
