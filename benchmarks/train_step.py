"""How fast is a training step, beside the peers that are installed?  Interleaved in one run; ratios with their spread.

    python benchmarks/train_step.py [--model open_lm_11m] [--rounds 7] [--precision amp_bf16] [--json FILE]

Every contestant takes the same batch through forward, backward and an AdamW step. The peer here is transformers' Llama
of the same width, depth, heads and vocabulary, with its own loss and torch's fused AdamW.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm.data.batch import Batch
from open_lm.distributed import World
from open_lm.model import create_model
from open_lm.model.config import ModelFlags, resolve
from open_lm.precision import Precision
from open_lm.train.config import OptimizerConfig
from open_lm.train.horizon import Horizon
from open_lm.train.optim import build_optimizers
from open_lm.train.parallel import blocks
from open_lm.train.state import TrainState
from open_lm.train.step import train_step
from open_lm.train.tasks import NextToken
from open_lm.train.timing import Timing


def ours(config, precision: str, batch: Batch, compiled: bool) -> Callable[[], float]:
    """One step of the project's own loop."""
    model = create_model(config)
    if compiled:
        for block in blocks(model):
            block.compile()
    state = TrainState(
        model=model,
        optimizers=build_optimizers(model, OptimizerConfig(), 1e-4),
        precision=Precision(precision, "cpu"),
        lr_at=lambda step: 1e-4,
        horizon=Horizon((10**6,), batch.inputs_BT.numel()),
        task=NextToken(),
        world=World(),
    )
    timing = Timing(torch.device("cpu"))
    return lambda: train_step(state, batch, accum=1, clip=1.0, timing=timing).loss.item()


def llama(config, precision: str, batch: Batch) -> Callable[[], float]:
    """One step of transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 256 * -(-int(8 * config.hidden_dim / 3) // 256)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_dim, intermediate_size=width,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            max_position_embeddings=config.seq_len, tie_word_embeddings=False,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    context = Precision(precision, "cpu").autocast

    def step() -> float:
        with context():
            loss = model(input_ids=batch.inputs_BT, labels=batch.inputs_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    """Warm up, then take turns; print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_lm_11m")
    parser.add_argument("--precision", default="amp_bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = resolve(ModelFlags(model=args.model))
    torch.manual_seed(0)
    batch = Batch.from_samples(torch.randint(0, config.vocab_size, (1, config.seq_len + 1)))
    contestants = {
        "transformers Llama": llama(config, args.precision, batch),
        "open_lm": ours(config, args.precision, batch, compiled=False),
        "open_lm --torchcompile": ours(config, args.precision, batch, compiled=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(args.rounds + 2):
        for name, step in contestants.items():
            began = time.perf_counter()
            step()
            if turn >= 2:  # the first two compile, allocate and page in
                seconds[name].append(time.perf_counter() - began)
    peer = seconds["transformers Llama"]
    result = {}
    for name, own in seconds.items():
        ratios = sorted(theirs / mine for theirs, mine in zip(peer, own, strict=True))
        result[name] = {
            "seconds": statistics.median(own),
            "ratio": statistics.median(ratios),
            "spread": ratios[:: len(ratios) - 1],
        }
        low, high = result[name]["spread"]
        print(f"{name:24s} {result[name]['seconds']:7.3f} s   x{result[name]['ratio']:.2f}   ({low:.2f} to {high:.2f})")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "precision": args.precision, "result": result}, indent=1))


if __name__ == "__main__":
    main()
