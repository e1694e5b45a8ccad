"""Optimizers by name, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adafactor, AdamW, Optimizer

from open_lm.errors import ConfigError
from open_lm.model.architecture import ModelConfig
from open_lm.model.lora import NF4LoraLinear
from open_lm.model.parametrization import scale_of
from open_lm.train.config import OPTIMIZERS, OptimizerConfig
from open_lm.train.muon import Muon, Packing, Packings, local
from open_lm.train.row_order import row_orders

Named = list[tuple[str, nn.Parameter]]
SCALABLE = ("adamw", "lion")
"""Optimizers whose steps are as large as their learning rate says, as parametrizations suppose."""


def build_optimizers(model: nn.Module, config: OptimizerConfig, lr: float, architecture: Any = None) -> list[Optimizer]:
    """The optimizers that `config` names, each over its share of the trainable parameters of `model`.

    The parametrization of `architecture` scales the learning rate and epsilon of each parameter.

    Raises:
        ConfigError: the optimizer has no such scales.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not isinstance(architecture, ModelConfig) or architecture.parametrization == "standard":
        optimizers = OPTIMIZERS.load(config.optimizer)(named, config, lr, packings(model))
        for optimizer in optimizers if isinstance(model, DistributedDataParallel) else ():
            if isinstance(optimizer, Muon):
                optimizer.ranks = cast(Any, model).process_group
        return optimizers
    if config.optimizer not in SCALABLE:
        raise ConfigError(
            f"--parametrization {architecture.parametrization} scales the steps of {' and '.join(SCALABLE)}, found "
            f"--optimizer {config.optimizer}. Take one of those."
        )
    optimizers = OPTIMIZERS.load(config.optimizer)(named, config, lr, packings(model))
    for optimizer in optimizers:
        scale_groups(optimizer, dict(named), architecture)
    return optimizers


def scale_groups(optimizer: Optimizer, named: dict[str, nn.Parameter], architecture: ModelConfig) -> None:
    """Split the groups of `optimizer` by the scales that the parametrization gives their parameters."""
    scales = {id(p): scale_of(architecture, name, p.ndim) for name, p in named.items()}
    split = []
    for group in optimizer.param_groups:
        for scale in dict.fromkeys(scales[id(p)] for p in group["params"]):
            part = {**group, "params": [p for p in group["params"] if scales[id(p)] == scale], "lr_scale": scale.lr}
            part |= {"lr": group["lr"] * scale.lr, "weight_decay": group["weight_decay"] / scale.lr}
            part |= {"eps": group["eps"] * scale.eps} if "eps" in group else {}
            split.append(part)
    optimizer.param_groups = split


def packings(model: nn.Module) -> Packings:
    """By id of a parameter the matrices that it packs, as the modules that own them say, and how ranks order them."""
    orders = {id(model.get_parameter(name)): order for name, order in row_orders(model).items()}
    rows = {
        id(module.get_parameter(name)): rows
        for module in model.modules()
        if hasattr(module, "fused_rows")
        for name, rows in cast("Any", module).fused_rows().items()
        if not isinstance(module.get_submodule(name.rpartition(".")[0]), NF4LoraLinear)  # it has no such parameter
    }
    whole = {key: order.blocks for key, order in orders.items()}  # a module under --mesh tp knows its part only
    return {key: Packing(found, orders.get(key)) for key, found in (rows | whole).items()}


def decays(name: str, parameter: nn.Parameter, rule: str = "matrices") -> bool:
    """Whether weight decay acts on a parameter. `matrices` excludes embeddings, norms, biases and a Mamba's A."""
    if rule == "all":
        return True
    is_embedding = "embedding" in name and name.endswith(".weight") and parameter.ndim == 2
    if rule == "all-but-embedding":
        return not is_embedding
    return parameter.ndim >= 2 and "embedding" not in name and not name.endswith("A_log")


def decay_groups(named: Named, config: OptimizerConfig) -> list[dict]:
    """Parameter groups with and without weight decay, empty groups dropped."""
    rule = "all" if config.wd_all else config.wd_rule
    decayed = [p for name, p in named if decays(name, p, rule)]
    kept = [p for name, p in named if not decays(name, p, rule)]
    groups = [{"params": decayed, "weight_decay": config.wd}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adamw(named: Named, config: OptimizerConfig, lr: float, packings: Packings | None = None) -> list[Optimizer]:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), updating all parameters in one fused pass."""
    groups = decay_groups(named, config)
    return [AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)]


def build_muon(named: Named, config: OptimizerConfig, lr: float, packings: Packings) -> list[Optimizer]:
    """Muon for the matrices of the blocks, those of experts included; AdamW for embeddings, output, norms and biases.

    Muon's updates are scaled to the size of AdamW's, so one learning rate and decay serve both.
    """
    inner = {name for name, p in named if ".layers." in f".{name}" and is_matrix(name, p, packings)}
    matrices = [p for name, p in named if name in inner]
    rest = [(name, p) for name, p in named if name not in inner]
    muon = Muon(
        matrices,
        lr=lr,
        weight_decay=config.wd,
        momentum=config.muon_momentum,
        ns_steps=config.muon_ns_steps,
        ns_dtype=torch.float32 if config.muon_ns_precision == "fp32" else torch.bfloat16,
        packings=packings,
    )
    return [muon, *(build_adamw(rest, config, lr) if rest else [])]


def is_matrix(name: str, parameter: nn.Parameter, packings: Packings) -> bool:
    """Whether a parameter is a matrix, or a stack of them whose module says so."""
    if parameter.ndim > 2:
        return id(parameter) in packings
    return parameter.ndim == 2 and decays(name, parameter)


def build_adafactor(named: Named, config: OptimizerConfig, lr: float, packings: Packings) -> list[Optimizer]:
    """Adafactor (arXiv:1804.04235): squared gradients kept as means of rows and columns only.

    Raises:
        ConfigError: with --fsdp, which torch's Adafactor does not know.
    """
    if any(isinstance(p, DTensor) for _, p in named):
        raise ConfigError(
            "--optimizer adafactor: torch's does not work with --fsdp. Leave --fsdp out, or take another."
        )
    return [Adafactor(decay_groups(named, config), lr=lr)]


def build_lion(named: Named, config: OptimizerConfig, lr: float, packings: Packings) -> list[Optimizer]:
    """Lion; use a learning rate 3 to 10 times below AdamW's and a weight decay as much above."""
    return [Lion(decay_groups(named, config), lr=lr, betas=(config.beta1, config.beta2))]


class Lion(Optimizer):
    """Steps by the sign of an interpolated momentum (arXiv:2302.06675); one moment instead of AdamW's two."""

    def __init__(
        self, params: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step with the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            weights, gradients = [local(p) for p in parameters], [local(p.grad) for p in parameters]
            momenta = [local(self.state[p]["exp_avg"]) for p in parameters]
            updates = torch._foreach_lerp(gradients, momenta, beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
        return None


def set_lr(optimizers: Iterable[Optimizer], lr: float) -> float:
    """Give every parameter group `lr` times its scale, as plain floats so that checkpoints stay plain."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = float(lr * group.get("lr_scale", 1.0))
    return lr
