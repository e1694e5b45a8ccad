"""µ-transfer made visible: activations over widths and depths after a few steps, and loss over learning rates.

Small models are trained in this process on sequences of a random grammar, which larger models learn better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.ladder.transfer_setup import DEPTHS, WIDTHS, Coordinates, TransferSetup
from open_lm.model import create_model
from open_lm.model.init import init_weights
from open_lm.train.config import OptimizerConfig
from open_lm.train.optim import build_optimizers, set_lr


def grammar_batches(setup: TransferSetup, seed: int) -> Iterator[Tensor]:
    """Batches of sequences whose next token depends on the last two, (B, T + 1)."""
    table = torch.Generator().manual_seed(1)
    logits = 2.5 * torch.randn(setup.vocab_size, setup.vocab_size, generator=table)
    pairs = 1.5 * torch.randn(setup.vocab_size, setup.vocab_size, generator=table)
    drawn = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(setup.vocab_size, (setup.batch, 2), generator=drawn)
        for _ in range(setup.seq_len - 1):
            odds = (logits[tokens[:, -1]] + pairs[tokens[:, -2]]).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(odds, 1, generator=drawn)], dim=1)
        yield tokens


def train_small(
    setup: TransferSetup,
    width: int,
    depth: int,
    batches: Iterator[Tensor],
    *,
    after: Callable[[nn.Module, int], None] | None = None,
) -> list[float]:
    """Losses of a run of `setup.steps` steps of AdamW without warm-up; `after(model, steps taken)` is called too."""
    architecture = setup.architecture(width, depth)
    torch.manual_seed(setup.seed)
    model = create_model(architecture)
    init_weights(model)
    optimizers = build_optimizers(model, OptimizerConfig(wd=0.0), setup.lr, architecture)
    set_lr(optimizers, setup.lr)
    losses = []
    for step in range(setup.steps + 1):
        if after is not None:
            after(model, step)
        if step == setup.steps:
            break
        tokens = next(batches)
        logits = model(tokens[:, :-1])[0]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def coordinates(setup: TransferSetup, width: int, depth: int) -> list[Coordinates]:
    """Sizes of the outputs of embedding, middle and last block, and logits, on the one batch that is trained on.

    One small batch, for its gradients point the same way at every width; those of many tokens do only in part, which
    shows as a dependence on width that the parametrization has no part in.
    """
    tokens = next(grammar_batches(replace(setup, batch=4, seq_len=8), setup.seed))
    seen: dict[int, dict[str, Tensor]] = {}

    def look(model: nn.Module, step: int) -> None:
        if step in (0, setup.steps):
            seen[step] = outputs_of(model, tokens[:, :-1])

    train_small(setup, width, depth, repeat(tokens), after=look)
    first, last = seen[0], seen[setup.steps]
    return [
        Coordinates(width, depth, part, last[part].abs().mean().item(), (last[part] - first[part]).abs().mean().item())
        for part in last
    ]


@torch.no_grad()
def outputs_of(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Outputs of a model's parts for `tokens`: the residual stream at three depths, and the logits."""
    found: dict[str, Tensor] = {}
    layers = list(model.layers)  # type: ignore[arg-type]
    parts = {"embedding": model.tok_embeddings, "middle block": layers[len(layers) // 2 - 1], "last block": layers[-1]}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out.detach().clone()}))
        for name, module in parts.items()
    ]
    found["logits"] = model(tokens)[0]
    for hook in hooks:
        hook.remove()
    return found


def coordinate_check(
    setup: TransferSetup, widths: Sequence[int] = WIDTHS, depths: Sequence[int] = DEPTHS, *, n_seeds: int = 1
) -> list[Coordinates]:
    """Coordinates over widths at the base depth and over depths at the base width, means over seeds."""
    shapes = [(width, setup.base_depth) for width in widths] + [(setup.base_width, depth) for depth in depths]
    rows: list[Coordinates] = []
    for width, depth in dict.fromkeys(shapes):
        drawn = [coordinates(replace(setup, seed=seed), width, depth) for seed in range(n_seeds)]
        for same in zip(*drawn, strict=True):
            size, change = (sum(getattr(c, key) for c in same) / n_seeds for key in ("size", "change"))
            rows.append(Coordinates(width, depth, same[0].part, size, change))
    return rows


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest over the mean."""
    return (max(values) - min(values)) / (sum(values) / len(values))


def lr_sweep(setup: TransferSetup, shapes: Sequence[tuple[int, int]], rates: Sequence[float]) -> list[dict[str, float]]:
    """Mean loss over the last fifth of a run at each learning rate, for each (width, depth)."""
    rows = []
    for width, depth in shapes:
        for rate in rates:
            losses = train_small(replace(setup, lr=rate), width, depth, grammar_batches(setup, setup.seed))
            last = losses[-max(1, len(losses) // 5) :]
            rows.append({"width": width, "depth": depth, "lr": rate, "loss": sum(last) / len(last)})
    return rows
