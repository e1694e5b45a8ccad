"""Optimizers by name, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Muon, Optimizer

from open_lm.train.config import OPTIMIZERS, OptimizerConfig

Named = list[tuple[str, nn.Parameter]]


def build_optimizers(model: nn.Module, config: OptimizerConfig, lr: float) -> list[Optimizer]:
    """The optimizers that `config` names, each over its share of the trainable parameters of `model`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return OPTIMIZERS.load(config.optimizer)(named, config, lr)


def decays(name: str, parameter: nn.Parameter, rule: str = "matrices") -> bool:
    """Whether weight decay acts on a parameter. `matrices` excludes embeddings, norms, biases and a Mamba's A."""
    if rule == "all":
        return True
    is_embedding = "embedding" in name and name.endswith(".weight") and parameter.ndim == 2
    if rule == "all-but-embedding":
        return not is_embedding
    return parameter.ndim >= 2 and "embedding" not in name and not name.endswith("A_log")


def decay_groups(named: Named, config: OptimizerConfig) -> list[dict]:
    """Parameter groups with and without weight decay, neither of them empty."""
    rule = "all" if config.wd_all else config.wd_rule
    decayed = [p for name, p in named if decays(name, p, rule)]
    kept = [p for name, p in named if not decays(name, p, rule)]
    groups = [{"params": decayed, "weight_decay": config.wd}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adamw(named: Named, config: OptimizerConfig, lr: float) -> list[Optimizer]:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), updating all parameters in one fused pass."""
    groups = decay_groups(named, config)
    return [AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)]


def build_muon(named: Named, config: OptimizerConfig, lr: float) -> list[Optimizer]:
    """Muon (torch's own) for the matrices of the blocks, AdamW for embeddings, output, norms and biases.

    Muon's updates are scaled to the size of AdamW's (arXiv:2502.16982), so one learning rate and decay serve both.
    """
    inner = {name for name, p in named if p.ndim == 2 and ".layers." in f".{name}"}
    matrices = [p for name, p in named if name in inner]
    rest = [(name, p) for name, p in named if name not in inner]
    muon = Muon(matrices, lr=lr, weight_decay=config.wd, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, *build_adamw(rest, config, lr)]


def build_adafactor(named: Named, config: OptimizerConfig, lr: float) -> list[Optimizer]:
    """Adafactor (arXiv:1804.04235): squared gradients kept as means of rows and columns only."""
    return [Adafactor(decay_groups(named, config), lr=lr)]


def build_lion(named: Named, config: OptimizerConfig, lr: float) -> list[Optimizer]:
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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                update = torch.lerp(parameter.grad, momentum, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)
        return None


def set_lr(optimizers: Iterable[Optimizer], lr: float) -> float:
    """Give every parameter group the learning rate `lr`, a plain float so that checkpoints stay plain."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
    return lr
