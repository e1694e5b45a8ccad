"""Tensor and sequence parallelism: the plans that modules declare, applied over one dimension of a device mesh.

Shapes: B batch, T positions, D model width, V vocabulary.

Weights become DTensors, so FSDP2, optimizers and checkpoints know how they are divided; each rank computes with its
part as plain tensors. In training the positions between the matrices are divided too (sequence parallel,
arXiv:2205.05198): entering a divided matrix gathers them, leaving it sums the partial results and scatters them. In
evaluation, where lengths are any, activations stay whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from open_lm.errors import ConfigError
from open_lm.model.attention import Attention
from open_lm.model.moe import Experts, MixtureOfExperts, Routing
from open_lm.model.norms import RMSNorm
from open_lm.model.split import Features, HiddenWidth, Split, SplitColumns, SplitRows, Tokens, Vocabulary
from open_lm.precision import as_multiplied
from open_lm.train.row_order import RowOrder

logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # on gathering over two dimensions


class TensorParallel:
    """The ranks that divide a model, and whether the current forward pass divides positions too."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.divides_positions = False

    @property
    def _between(self) -> Placement:
        """Placement of activations between divided matrices, (B, T, D)."""
        return Shard(1) if self.divides_positions else Replicate()

    def enter(self, x_BTD: Tensor) -> Tensor:
        """All positions, for a product with a part of a matrix; its gradients are summed over the ranks."""
        x = DTensor.from_local(x_BTD, self.mesh, [self._between], run_check=False)
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def leave(self, partial_BTD: Tensor) -> Tensor:
        """The sum of the ranks' partial results, at this rank's positions."""
        x = DTensor.from_local(partial_BTD, self.mesh, [Partial()], run_check=False)
        return x.redistribute(placements=[self._between]).to_local()

    def own(self, weight: Any) -> Any:
        """This rank's part of a weight; the gradient of one that all hold whole is summed over the ranks."""
        if weight is None:
            return None
        whole = weight.placements == (Replicate(),)
        return weight.to_local(grad_placements=[Partial()]) if whole and self.divides_positions else weight.to_local()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, of which every rank computes with the result."""
        return cast("Tensor", _Sum.apply(x, self.group))


def apply_tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Divide `model` over the ranks of the 1-D `mesh` as its modules' plans say; every rank has the same weights.

    Raises:
        ConfigError: it declares no plan, or its heads, widths or vocabulary do not divide.
    """
    require_parts(model, mesh.size())
    parallel = TensorParallel(mesh)
    for owner, name, split in list(_plans(model)):
        _divide(owner.get_submodule(name), split, parallel)
    for module in model.modules():
        if isinstance(module, Attention):
            module.keep_part(parallel.rank, parallel.size)
        if isinstance(module, MixtureOfExperts):
            module.__class__ = DividedMixture
            cast("DividedMixture", module).parallel = parallel
    model.__class__ = type("Divided" + type(model).__name__, (DividedModel, type(model)), {})
    model.parallel = parallel
    model.row_orders = dict(_row_orders(model))
    model.tie_weights()


def require_parts(model: Any, size: int) -> None:
    """Raise ConfigError where `model` has no plan, or something in it does not divide among `size` ranks."""
    if not hasattr(model, "tensor_plan"):
        raise ConfigError(f"--mesh tp={size}: {type(model).__name__} has no plan for it. Use fsdp instead.")
    for module in model.modules():
        if isinstance(module, Attention):
            module.require_parts(size)
    for owner, path, split in _plans(model):
        module = owner.get_submodule(path)
        placements, blocks = _KINDS[type(split)][1], _blocks(module, split)
        for name, parameter in module.named_parameters(recurse=False):
            placement = placements.get(name)
            for n in (blocks or (parameter.shape[placement.dim],)) if isinstance(placement, Shard) else ():
                if n % size:
                    where = f"{type(owner).__name__}.{path}"
                    raise ConfigError(
                        f"--mesh tp={size}: {where} has {n} rows or columns, which do not divide among {size} ranks. "
                        "Change the model's widths or tp."
                    )


def _plans(model: nn.Module) -> Iterator[tuple[nn.Module, str, Split]]:
    """Each plan: the module that declares it, the path from there to what it divides, and how."""
    for owner in model.modules():
        declared: Any = getattr(owner, "tensor_plan", dict)
        for name, split in declared().items():
            yield owner, name, split


def _blocks(module: nn.Module, split: Split) -> tuple[int, ...]:
    """The rows of each matrix that the weight packs; none where it is one matrix."""
    if isinstance(split, HiddenWidth):
        return (module.width, module.width) if module.gated else ()  # type: ignore[return-value]
    return split.blocks if isinstance(split, SplitRows) else ()


def _divide(module: nn.Module, split: Split, parallel: TensorParallel) -> None:
    """Make the weights of `module` DTensors and let it compute with this rank's part."""
    kind, placements = _KINDS[type(split)]
    if isinstance(module, nn.Linear):
        kind = {Tokens: RouterOf, Vocabulary: OutputOf}.get(type(split), kind)
    blocks = _blocks(module, split)
    for name, parameter in list(module.named_parameters(recurse=False)):
        placement = placements.get(name, Replicate())
        if isinstance(parameter, DTensor):  # tied to one that is divided already
            continue
        packs = blocks if isinstance(placement, Shard) and name in ("weight", "bias", "w12") else ()
        divided = _divided(parameter, placement, packs, parallel)
        setattr(module, name, nn.Parameter(divided, requires_grad=parameter.requires_grad))
    bases = (kind, type(module)) if not issubclass(kind, type(module)) else (kind,)
    module.__class__ = type(kind.__name__ + type(module).__name__, bases, {})
    module.parallel, module.blocks = parallel, blocks  # type: ignore[assignment]


def _divided(parameter: Tensor, placement: Placement, blocks: tuple[int, ...], parallel: TensorParallel) -> DTensor:
    whole = parameter.detach()
    if blocks:
        assert isinstance(placement, Shard)
        whole = RowOrder(blocks, parallel.size, placement.dim).in_memory(whole)
    return distribute_tensor(whole, parallel.mesh, [placement], src_data_rank=None)


def _row_orders(model: nn.Module) -> Iterator[tuple[str, RowOrder]]:
    """Of each parameter that packs several matrices: the order of its rows in memory."""
    for prefix, module in model.named_modules():
        blocks: Any = getattr(module, "blocks", ())
        for name, parameter in module.named_parameters(recurse=False) if blocks else ():
            placement = parameter.placements[0] if isinstance(parameter, DTensor) else None
            if isinstance(placement, Shard) and name != "w3":
                yield f"{prefix}.{name}", RowOrder(blocks, parameter.device_mesh.size(), placement.dim)


class DividedModel(nn.Module):
    """A Transformer of which this rank holds a part."""

    parallel: TensorParallel

    def forward(self, input_ids_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.parallel.divides_positions = self.training and input_ids_BT.shape[1] % self.parallel.size == 0
        assert self.parallel.divides_positions or not (self.training and torch.is_grad_enabled()), input_ids_BT.shape
        return super().forward(input_ids_BT, *args, **kwargs)

    def output_weight(self) -> Tensor:
        """In training the divided matrix, over which the loss is computed; else all of it, for any head."""
        weight: Any = self.output.weight  # type: ignore[union-attr]
        return weight if self.training else weight.full_tensor()

    def _hidden(self, *args: Any) -> Any:
        hidden_BTD, routings = super()._hidden(*args)  # type: ignore[misc]
        return (self.parallel.enter(hidden_BTD) if self.training else hidden_BTD), routings


class RowsOf(nn.Linear):
    """A linear layer with a part of the output features."""

    parallel: TensorParallel
    product: Any = staticmethod(F.linear)

    def forward(self, x_BTD: Tensor) -> Tensor:
        own = self.parallel.own
        return self.product(self.parallel.enter(as_multiplied(x_BTD)), own(self.weight), own(self.bias))


class ColumnsOf(nn.Linear):
    """A linear layer with a part of the input features."""

    parallel: TensorParallel
    product: Any = staticmethod(F.linear)

    def forward(self, x_BTF: Tensor) -> Tensor:
        own = self.parallel.own
        out = self.parallel.leave(self.product(x_BTF, own(self.weight)))
        return out if self.bias is None else out + own(self.bias).type_as(out)


class WithTokens(nn.Module):
    """A norm at this rank's positions, or a layer with whole weights."""

    parallel: TensorParallel

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.parallel.own(self.weight), self.parallel.own(getattr(self, "bias", None))


class RouterOf(nn.Linear):
    """A router, computed alike on all ranks, with a part of the gradients on each."""

    parallel: TensorParallel

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.parallel.own(self.weight))


class WithFeatures(nn.Module):
    """A norm over features that ranks divide."""

    parallel: TensorParallel

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.parallel.own(self.weight), self.parallel.own(getattr(self, "bias", None))

    def forward(self, x: Tensor) -> Tensor:
        module, total = cast("Any", self), self.parallel.sum
        y, (weight, bias) = x.float(), self.affine()
        if not isinstance(self, RMSNorm):
            y = y - total(y.sum(-1, keepdim=True)) / module.dim
        y = y * (total(y.square().sum(-1, keepdim=True)) / module.dim + module.eps).rsqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


class EmbeddingOf(nn.Embedding):
    """A token embedding with a part of the vocabulary."""

    parallel: TensorParallel

    def forward(self, ids_BT: Tensor) -> Tensor:
        weight = self.parallel.own(self.weight)
        local_BT = ids_BT - self.parallel.rank * len(weight)
        is_here_BT = (local_BT >= 0) & (local_BT < len(weight))
        found_BTD = F.embedding(local_BT.clamp(0, len(weight) - 1), weight)
        return self.parallel.leave(found_BTD * is_here_BT[..., None])


class OutputOf(nn.Linear):
    """An output layer with a part of the vocabulary; called, it gives all logits."""

    parallel: TensorParallel

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight: Any = self.weight
        return F.linear(x_BTD, weight.full_tensor())


class ExpertsOf(Experts):
    """Experts with a part of their hidden width."""

    parallel: TensorParallel

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.parallel.own(self.w12), self.parallel.own(self.w3)


class DividedMixture(MixtureOfExperts):
    """A mixture of experts: all ranks route all tokens alike, and sum what their parts of the experts give."""

    parallel: TensorParallel

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        out_BTD, routing = super().forward(self.parallel.enter(x_BTD))
        balance_loss = _Scaled.apply(routing.balance_loss, 1 / self.parallel.size)
        return self.parallel.leave(out_BTD), routing._replace(balance_loss=balance_loss)


class _Sum(torch.autograd.Function):
    """The sum over ranks that each compute with all of it: their gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


def _summed(x: Tensor, group: Any) -> Tensor:
    return cast("Tensor", collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group)))


class _Scaled(torch.autograd.Function):
    """The same value with a scaled gradient: every rank computes all of it, and the gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


_KINDS: dict[type, tuple[type[nn.Module], dict[str, Placement]]] = {
    SplitRows: (RowsOf, {"weight": Shard(0), "bias": Shard(0)}),
    SplitColumns: (ColumnsOf, {"weight": Shard(1)}),
    Features: (WithFeatures, {"weight": Shard(0), "bias": Shard(0)}),
    Tokens: (WithTokens, {}),
    Vocabulary: (EmbeddingOf, {"weight": Shard(0)}),
    HiddenWidth: (ExpertsOf, {"w12": Shard(1), "w3": Shard(2)}),
}
"""The class that a divided module becomes, and the placement of each of its weights; whole where none is named."""
