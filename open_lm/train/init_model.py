"""The model a run starts with: built, given the weights of its seed, and wrapped for the ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.model import create_model, random_weights
from open_lm.model.hf_config import HFConfig
from open_lm.model.init import initialises
from open_lm.train.config import ParallelConfig
from open_lm.train.parallel import shards, wrap
from open_lm.train.row_order import RowOrder, row_orders
from open_lm.train.weight_shares import fill_share


def build_wrapped(
    config: Any,
    world: World,
    parallel: ParallelConfig,
    seed: int,
    dtype: torch.dtype,
    add: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """The model of `config` with the weights of `seed`, in `dtype`, as `train_step` calls it.

    `add` gives it what a task adds to a model, adapters or a value head, before it is wrapped for the ranks.
    The weights do not depend on the ranks, nor on whether --experimental-meta-device builds them part by part.
    """
    torch.manual_seed(seed)
    if parallel.experimental_meta_device and isinstance(config, HFConfig):
        logging.warning("--experimental-meta-device is ignored: published weights are loaded as a whole.")
    elif parallel.experimental_meta_device and shards(world, parallel):
        if add is not None:
            raise ConfigError("--experimental-meta-device: not with adapters or value heads. Leave it out.")
        return _filled_in_parts(config, world, parallel, dtype)
    model = create_model(config).to(world.device, dtype)
    if add is not None:
        add(model)
    return wrap(model, world, parallel)


def _filled_in_parts(config: Any, world: World, parallel: ParallelConfig, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        plain, sharded = create_model(config), create_model(config).to(dtype)
    sharded = wrap(sharded, world, parallel)
    sharded.to_empty(device="cpu" if parallel.fsdp_cpu_offload else world.device)
    orders = {id(sharded.get_parameter(name)): order for name, order in row_orders(sharded).items()}
    for source, target in zip(plain.modules(), sharded.modules(), strict=True):
        if initialises(source):
            _fill(source, target, orders)
    return sharded


def _fill(source: nn.Module, target: nn.Module, orders: Mapping[int, RowOrder]) -> None:
    """Give `target` this rank's share of what `source`, on the meta device, starts with.

    Of large weights of our own modules the share alone is made; others are whole meanwhile.
    """
    places = list(_own_tensors(source, target))
    random_state = torch.get_rng_state()
    before = {id(getattr(holder, name)): getattr(holder, name)._version for holder, _, name in places}
    ours = type(source).__module__.startswith("open_lm.")
    _reset(source, places, lambda tensor: ours and tensor.numel() >= random_weights.LARGE)
    if any(_is_unknown(getattr(holder, name), before) for holder, _, name in places):
        torch.set_rng_state(random_state)
        _reset(source, places, lambda tensor: False)
    for holder, taker, name in places:
        first, share = getattr(holder, name), getattr(taker, name)
        order = orders.get(id(share))
        if first.is_meta:
            fill_share(first.first_values, tuple(first.shape), share, order)
        else:
            _copy(order.in_memory(first.detach()) if order else first.detach(), share)
    for holder, _, name in places:
        if not getattr(holder, name).is_meta:
            getattr(holder, name).data = torch.empty(0)


def _reset(source: nn.Module, places: list[tuple[nn.Module, nn.Module, str]], stays: Callable[[Tensor], bool]) -> None:
    """Give `source` its first values; tensors that `stays` says stay on the meta device, where they are noted."""
    wholes: dict[int, Tensor] = {}
    for holder, _, name in places:
        empty: Any = holder._parameters.get(name, holder._buffers.get(name))
        if empty.is_meta and not stays(empty):
            setattr(holder, name, wholes.setdefault(id(empty), _on_cpu(empty)))  # tied weights are one
    reset: Any = source.reset_parameters
    reset()


def _is_unknown(tensor: Tensor, before: Mapping[int, int]) -> bool:
    """Whether a tensor on the meta device got other values than `scaled_normal_` notes: it writes nothing there."""
    return tensor.is_meta and (not hasattr(tensor, "first_values") or tensor._version != before[id(tensor)])


def _on_cpu(empty: Any) -> Any:
    whole = torch.empty(empty.shape, dtype=empty.dtype, device="cpu")
    return nn.Parameter(whole) if isinstance(empty, nn.Parameter) else whole


def _own_tensors(source: nn.Module, target: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """`(module, its sharded twin, name)` of what one `reset_parameters` fills: not what further ones below it do."""
    for names in (source._parameters, source._buffers):
        yield from ((source, target, name) for name, value in names.items() if value is not None)
    for name, child in source.named_children():
        if not initialises(child):
            yield from _own_tensors(child, target.get_submodule(name))


def _copy(whole: Tensor, share: Tensor) -> None:
    with torch.no_grad():
        if not isinstance(share, DTensor):
            share.copy_(whole)
            return
        whole = whole.to(share.to_local().device, share.dtype)
        # every rank has the same whole and takes its own part: nothing is sent
        part = distribute_tensor(whole, share.device_mesh, share.placements, src_data_rank=None)
        share.to_local().copy_(part.to_local())
