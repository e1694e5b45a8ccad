"""How the weights are updated: the optimizers by name and which parameters decay."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Optimizer

from open_lm.train.config import OPTIMIZERS, OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, lr: float) -> Optimizer:
    """The optimizer named in `config` over the trainable parameters of `model`."""
    return OPTIMIZERS.load(config.optimizer)(model, config, lr)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: on matrices, not on embeddings, norms or biases."""
    return parameter.ndim >= 2 and "embeddings" not in name


def build_adamw(model: nn.Module, config: OptimizerConfig, lr: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter, 2019), updating all parameters in one fused pass."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if config.wd_all or decays(name, p)]
    kept = [p for name, p in named if not (config.wd_all or decays(name, p))]
    groups = [{"params": decayed, "weight_decay": config.wd}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_lr(optimizer: Optimizer, lr: float) -> float:
    """Give every parameter group the learning rate `lr`, a plain float so that checkpoints stay plain."""
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
    return lr
