"""Costs of a mesh: what a rank holds and what it receives in a step, by arithmetic and one pass on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from open_lm import text
from open_lm.kernels.loss_chunks import rows_per_chunk
from open_lm.mesh import MeshShape
from open_lm.model import create_model
from open_lm.model.architecture import ModelConfig
from open_lm.params import RunConfig
from open_lm.run.kept_memory import kept_bytes
from open_lm.run.local_weights import LocalWeights
from open_lm.run.mesh_traffic import traffic
from open_lm.train.activation_checkpointing import recomputed_share
from open_lm.train.averagers import parse_averagers
from open_lm.train.config import OptimizerConfig
from open_lm.train.optim import build_optimizers


@dataclass(frozen=True)
class RankCosts:
    """Bytes that one rank holds, and that it receives from others in one optimizer step."""

    state: int
    """Weights, their averages, gradients and optimizer: its share."""
    gathered: int
    """Whole weights of the blocks that FSDP has gathered: the current and the next, and the outer layers'."""
    activations: int
    """Memory that the forward pass of one micro-batch keeps for the backward pass, cast weights included."""
    held: int
    """Memory at the peak: never all of these at once, but temporary values beside them."""
    peak: str
    """Moment of the peak."""
    traffic: dict[str, int]
    """Received in a step, by axis."""

    def __str__(self) -> str:
        received = ", ".join(f"{axis} {text.size(n)}" for axis, n in self.traffic.items() if n) or "nothing"
        return (
            f"memory a rank {text.size(self.held)} at the peak, {self.peak}; not all at once: {text.size(self.state)} "
            f"weights, gradients and optimizer, {text.size(self.gathered)} gathered weights, "
            f"{text.size(self.activations)} activations of a micro-batch\n"
            f"traffic       received a rank and step: {received}"
        )


def costs_of_run(config: RunConfig, model: ModelConfig, shape: MeshShape, *, sequences: int, accum: int) -> RankCosts:
    """The costs of a rank of a run of `config`, which computes `sequences` a step in `accum` micro-batches."""
    parallel = config.parallel
    return rank_costs(
        model,
        shape,
        sequences=sequences,
        accum=accum,
        precision=parallel.precision,
        sharded=not shape.is_plain or parallel.fsdp,
        recompute=recomputed_share(parallel, model.n_layers),
        low_gather=parallel.fsdp_amp or parallel.fsdp_pure_bf16,
        whole_gradients=parallel.fsdp_whole_gradients,
        moments=moments_of(config.optimizer),
        averages=len(parse_averagers(config.optimizer.averagers)),
    )


class Moments(NamedTuple):
    """Numbers that an optimizer keeps for each weight."""

    of_blocks: float
    of_tables: float
    """Those of the token embedding and the output layer."""

    def in_the_mean(self, weights: LocalWeights) -> float:
        """Those for each of the `weights` of a rank."""
        return (self.of_tables * weights.tables + self.of_blocks * weights.blocks) / weights.whole


ADAMW = Moments(2, 2)


def moments_of(config: OptimizerConfig) -> Moments:
    """State that the optimizer of `config` keeps, seen after its step on a small model."""
    model = create_model(ModelConfig(hidden_dim=64, n_layers=1, n_heads=1, seq_len=8, vocab_size=64))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    kept: dict[Any, int] = {}
    for optimizer in build_optimizers(model, config, 1e-3):
        optimizer.step()
        kept |= {p: sum(t.numel() for t in held.values() if t.ndim) for p, held in optimizer.state.items()}
    layers: Any = model.layers
    blocks = set(layers.parameters())
    weights = [(p.numel(), kept[p], p in blocks) for p in model.parameters() if p.ndim > 1]
    shares = [
        sum(n for _, n, is_block in weights if is_block is of_blocks)
        / sum(numel for numel, _, is_block in weights if is_block is of_blocks)
        for of_blocks in (True, False)
    ]
    return Moments(*shares)


def rank_costs(
    config: ModelConfig,
    shape: MeshShape,
    *,
    sequences: int,
    accum: int,
    precision: str,
    sharded: bool,
    recompute: float,
    low_gather: bool = False,
    whole_gradients: bool = False,
    moments: Moments = ADAMW,
    averages: int = 0,
) -> RankCosts:
    """The costs of a rank of `shape` that computes `sequences` a step in `accum` micro-batches.

    `recompute`: the share of the blocks whose activations are computed again. `low_gather`: FSDP gathers weights in
    bf16 (--fsdp-amp, --fsdp-pure-bf16). `whole_gradients`: it keeps gradients whole between micro-batches. `averages`:
    the number of running averages of the weights.
    """
    with torch.device("meta"):
        model = create_model(config)
    weights = LocalWeights.of(model, config, shape)
    stored, is_sharded = 2 if precision == "bf16" else 4, sharded and shape.size > 1
    gathered = (2 if low_gather else stored) if is_sharded else 0  # FSDP makes its copy even where one rank has it all
    is_cast = precision not in ("fp32", "bf16") and not (low_gather and is_sharded)
    micro, value = max(1, sequences // accum), 4 if precision == "fp32" else 2
    tokens = micro * config.seq_len // shape.cp
    kept = kept_bytes(config, shape, micro, precision, recompute=recompute)
    cast = 2 * (recompute * weights.block + (1 - recompute) * weights.blocks) * is_cast
    activations = kept.blocks + kept.around + cast
    state = weights.share * ((1 + moments.in_the_mean(weights)) * stored + 4 * averages)
    n_gradients = weights.whole if whole_gradients and is_sharded and accum > 1 else weights.share
    held = _moments(
        weights,
        state + weights.tables * gathered,
        n_gradients * stored,
        activations,
        kept.block if recompute else kept.block / 4,
        tokens=tokens,
        dim=config.hidden_dim,
        vocab=config.vocab_size // shape.tp,
        value=value,
        stored=stored,
        gathered=gathered,
        keeps_gradients=accum > 1 or (shape.size > 1 and not sharded),
    )
    peak = max(held, key=lambda moment: held[moment])
    return RankCosts(
        state=round(state + n_gradients * stored),
        gathered=round((weights.tables + 2 * weights.block) * gathered),
        activations=round(activations),
        held=round(held[peak]),
        peak=peak,
        traffic=traffic(
            model, config, weights,
            tokens=tokens * accum, accum=accum, value=value, stored=stored, gathered=gathered or stored,
            recompute=recompute, whole_gradients=whole_gradients,
        ),
    )  # fmt: skip


def _moments(
    weights: LocalWeights,
    resting: float,
    gradients: float,
    activations: float,
    block: float,
    *,
    tokens: int,
    dim: int,
    vocab: int,
    value: int,
    stored: int,
    gathered: int,
    keeps_gradients: bool,
) -> dict[str, float]:
    """Memory held at each of the moments that can be a step's peak; `resting` is what is held all the time.

    Between the last two gradients grow evenly as activations go. Gradients are there before the backward pass in all
    micro-batches but the first, and in DDP's buckets; FSDP reduces those of embedding and output when it ends.
    """
    n_table = vocab * dim
    before = resting + activations + gradients * keeps_gradients
    logits = rows_per_chunk(tokens, dim, vocab) * vocab * (value + 4)
    output = n_table * (4 + (2 * value if value == 2 else 0))  # its gradient; the cast weight and a product of a chunk
    whole = 2 * stored * weights.tables if gathered else 0  # gradients of the outer layers, and what is sent of them
    sent = 2 * stored * weights.block if gathered else 0  # those of a block, whose activations are gone by then
    passing = 2 * weights.block * gathered + max(block, sent)
    return {
        "in the loss": before + logits + output + tokens * dim * (stored + 2 * value),
        "as the backward pass begins": before + passing + 8 * n_table + 2 * stored * tokens * dim,
        "as the backward pass ends": resting + gradients + passing + whole,
    }
