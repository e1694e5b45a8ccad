"""Model size: parameters, compute per token and training memory of an architecture, without building it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from open_lm import text
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.model import create_model
from open_lm.model.architecture import Architecture, ModelConfig
from open_lm.model.config import ALIASES, ModelFlags, model_names, resolve_architecture

if TYPE_CHECKING:
    from torch import nn

TRAINING_BYTES_PER_PARAMETER = 16
"""With --precision amp_bf16: fp32 weight, gradient and two AdamW moments; activations come on top."""


@dataclass(frozen=True)
class ModelSize:
    """Cost of an architecture."""

    parameters: int
    embedding_parameters: int
    flops_per_token: int
    training_bytes: int

    @property
    def non_embedding_parameters(self) -> int:
        """All parameters but the embeddings of tokens and the output matrix."""
        return self.parameters - self.embedding_parameters


@dataclass(frozen=True)
class DescribeFlags:
    """Models to describe"""

    all: bool = flag(False, "Every registered architecture instead of --model.")
    markdown: bool = flag(False, "Print a markdown table.")
    json: bool = flag(False, "Print one JSON object a line.")


def model_size(config: Architecture) -> ModelSize:
    """The size of an architecture, counted on a model without memory.

    FLOPs per token are those of training, forward and backward, as in PaLM (arXiv:2204.02311): 6 for every weight but
    those of the token embedding, and what mixes positions. That is 12 L H K T for L layers of H heads, K wide, over a
    context of T; halved, because the attention is causal, and less under a sliding window. In a Mamba it is 18 L I N
    for I channels with N numbers of state (6 products and sums forward, twice that backward).
    """
    import torch  # not at the top: the help of the ladder's commands comes here

    with torch.device("meta"):
        model = create_model(config)
    n_parameters = sum(p.numel() for p in model.parameters())
    table = config.vocab_size * config.hidden_dim
    n_tables = 1 if config.is_tied else 2
    in_products = n_parameters - (n_tables - 1) * table - idle_parameters(model)
    return ModelSize(
        n_parameters,
        n_tables * table,
        6 * in_products + config.mixing_flops_per_token,
        TRAINING_BYTES_PER_PARAMETER * n_parameters,
    )


def idle_parameters(model: nn.Module) -> int:
    """Parameters of experts that one token does not go through."""
    from open_lm.model.moe import MixtureOfExperts

    idle = 0
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            n_experts = sum(p.numel() for p in module.experts.parameters())
            idle += n_experts - n_experts * module.top_k // module.n_experts
    return idle


def as_markdown(configs: dict[str, ModelConfig]) -> str:
    """The table of docs/models.md."""
    also = {name: [alias for alias, target in ALIASES.items() if target == name] for name in configs}
    rows = [
        "| name (also) | width | layers | heads | context | vocabulary | parameters | embedding | other | "
        "training FLOPs/token | bytes to train |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, config in configs.items():
        size = model_size(config)
        cells = [
            f"{name} ({', '.join(also[name])})" if also[name] else name,
            *(config.hidden_dim, config.n_layers, getattr(config, "n_heads", "–"), config.seq_len, config.vocab_size),
            *(f"{n:,}" for n in (size.parameters, size.embedding_parameters, size.non_embedding_parameters)),
            *(text.count(float(size.flops_per_token)), text.size(size.training_bytes)),
        ]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def as_text(name: str, config: ModelConfig) -> str:
    """One architecture for a person to read."""
    size = model_size(config)
    return "\n".join(
        [
            f"{name}: {json.dumps(config.to_dict())}",
            f"  parameters        {size.parameters:,} ({text.count(size.parameters)})",
            f"    embedding       {size.embedding_parameters:,}",
            f"    non-embedding   {size.non_embedding_parameters:,}",
            f"  FLOPs per token   {size.flops_per_token:,} (training, context {config.seq_len})",
            f"  memory to train   {text.size(size.training_bytes)} and activations "
            "(amp_bf16: fp32 weights, gradients, two AdamW moments)",
        ]
    )


def registered() -> dict[str, ModelConfig]:
    """Every registered architecture by name, smallest first."""
    configs = {name: resolve_architecture(ModelFlags(model=name)) for name in model_names()}
    return dict(sorted(configs.items(), key=lambda item: (item[1].hidden_dim ** 2 * item[1].n_layers, item[0])))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the size of one architecture, or of all."""
    parser = Parser(prog="openlm describe", description=__doc__)
    add_group(parser, DescribeFlags)
    add_group(parser, ModelFlags)
    args = parser.parse_args(argv)
    asked, flags = read_group(args, DescribeFlags), read_group(args, ModelFlags)
    configs = registered() if asked.all else {flags.model or "open_lm_1b": resolve_architecture(flags)}
    if asked.markdown:
        print(as_markdown(configs))
        return
    for name, config in configs.items():
        size = model_size(config)
        print(json.dumps({"model": name, **asdict(size)}) if asked.json else as_text(name, config))


if __name__ == "__main__":
    from open_lm.command import run

    run(main)
