"""Networks whose weights are spread over the ranks by FSDP2 (`fully_shard`).

What the rest of the core must know of it is here: which tensor of this rank holds its shard
(`local`), which tensors autograd differentiates by (`leaves`), and how to see a network with all of
its weights for the few criteria that differentiate twice or example by example (`whole`). All of it
works on replicated networks, too, where the answers are the parameters and the network themselves.

FSDP2 gathers the weights of one group at a time, in the forward pass and again in the backward
pass. Its own reduction of gradients, an average in an order of its own, never runs: the gradients
are taken from the leaves as they arrive (`gradients`), before FSDP2 sees them.

Every pass through a sharded network communicates, so all ranks must make the same passes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

__all__ = [
    "gather_whole",
    "is_shard",
    "is_sharded",
    "leaves",
    "like_shard",
    "local",
    "shard_network",
    "whole",
]

_LEAST_GROUP = 1024
"""Weights that are worth a gathering of their own; smaller modules join the group around them."""


@dataclass(frozen=True)
class _Sharding:
    """What is known of a sharded network beside itself.

    Attributes:
        leaves: Parameter name to the tensor that holds the gathered weights while they are there.
        template: The network before it was sharded, on the meta device.
    """

    leaves: dict[str, nn.Parameter]
    template: nn.Module


_SHARDINGS: WeakKeyDictionary[nn.Module, _Sharding] = WeakKeyDictionary()
# fully_shard changes a module in place, so what goes with it is kept beside it.


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is spread over the ranks."""
    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether a network's weights are spread over the ranks."""
    return model in _SHARDINGS


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's rows of a tensor, sharing its memory; a replicated tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_shard(rows: Tensor, pattern: Tensor) -> Tensor:
    """Makes this rank's rows a tensor spread as `pattern` is; the rows themselves if it is not."""
    if not isinstance(pattern, DTensor):
        return rows
    return DTensor.from_local(
        rows,
        pattern.device_mesh,
        pattern.placements,
        run_check=False,
        shape=pattern.shape,
        stride=pattern.stride(),
    )


def gather_whole(tensor: Tensor) -> Tensor:
    """Puts a tensor together on every rank, to export it. Communicates where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def leaves(model: nn.Module) -> dict[str, nn.Parameter]:
    """Lists what autograd differentiates by, under each parameter's first name."""
    if model in _SHARDINGS:
        return _SHARDINGS[model].leaves
    return dict(model.named_parameters())


def shard_network(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Spreads a network's weights over the ranks, in place. Communicates.

    A group that FSDP2 gathers at once is a member of an `nn.Sequential` or `nn.ModuleList`, as
    blocks usually are, with at least `_LEAST_GROUP` weights of its own; the rest is one group. A
    module that shares a weight with another joins the group around both.
    """
    template = copy.deepcopy(model).to("meta")
    mesh = init_device_mesh(device.type, (world_size,))
    for module in _groups(model):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _SHARDINGS[model] = _Sharding(_find_leaves(model), template)


def _groups(model: nn.Module) -> list[nn.Module]:
    """Lists the modules that become groups, inner ones first."""
    uses: dict[nn.Parameter, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[parameter] = uses.get(parameter, 0) + 1
    found: list[nn.Module] = []
    for container in model.modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        for member in container.children():
            if isinstance(member, (nn.ModuleList, nn.ModuleDict)) or member in found:
                continue
            within: dict[nn.Parameter, int] = {}
            for _, parameter in member.named_parameters(remove_duplicate=False):
                within[parameter] = within.get(parameter, 0) + 1
            is_worth_it = sum(p.numel() for p in within) >= _LEAST_GROUP
            if is_worth_it and all(uses[p] == count for p, count in within.items()):
                found.append(member)
    # modules() lists outer ones first, and FSDP2 wants to meet the inner ones before.
    return found[::-1]


def _find_leaves(model: nn.Module) -> dict[str, nn.Parameter]:
    """Finds the tensors that FSDP2 gathers into; they stay the same ones from pass to pass."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            for name, parameter in model.get_submodule(path).named_parameters():
                if not is_shard(parameter):
                    found[f"{path}.{name}".lstrip(".")] = parameter
            module.reshard()
    # In the order of the parameters, as on a replicated network.
    return {name: found[name] for name, _ in model.named_parameters()}


@contextmanager
def whole(model: nn.Module) -> Iterator[nn.Module]:
    """Lends the network with all weights gathered and without FSDP2's hooks. Communicates.

    It shares its buffers with the sharded one. While the block runs each rank holds all weights.
    """
    sharding = _SHARDINGS.get(model)
    if sharding is None:
        yield model
        return
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.unshard()
    plain = sharding.template
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            twin = plain.get_submodule(path)
            twin.training = module.training
            lent: list[tuple[dict[str, Any], Mapping[str, Any]]] = [
                (twin._parameters, module._parameters),
                (twin._buffers, module._buffers),
            ]
            for own, theirs in lent:
                for name, value in theirs.items():
                    kept.append((own, name, own[name]))
                    own[name] = value
        yield plain
    finally:
        for own, name, value in kept:
            own[name] = value
        for group in groups:
            group.reshard()
