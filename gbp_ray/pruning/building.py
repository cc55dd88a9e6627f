"""The network of a trial as it starts: built under the job's seed, on its device, sharded if asked.

A workload decides how. A network that `build_model` returns with its weights starts from those; one
returned on the meta device (built under `torch.device("meta")`) has none yet, and gets them layer
by layer from each layer's own `reset_parameters`, under a seed of the layer's name. So a sharded
network that is larger than one worker never exists in one piece, and a replicated one built the
same way starts from the same bits.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from gbp_ray.errors import WorkloadError
from gbp_ray.pruning.metrics import Macs, count_macs
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.pruning.sharding import (
    copy_sharded,
    is_shard,
    is_sharded,
    local,
    shard_network,
)
from gbp_ray.pruning.slices import cut_rows, owned
from gbp_ray.workload import Workload, build_network, derive_seed, seeded, take_batch

__all__ = ["build_start", "copy_frozen", "network_of_seed"]


def network_of_seed(workload: Workload, seed: int) -> tuple[nn.Module, bool]:
    """Builds the network in one piece, with the weights that every rank starts from.

    Returns:
        The network, and whether the workload built it without weights.

    Raises:
        WorkloadError: It cannot be built, or has no way to get its first weights.
    """
    with seeded(derive_seed(seed, "model")):
        model = build_network(workload)
    if not _is_blank(model):
        return model, False
    blank = copy.deepcopy(model)
    _give_memory(model, torch.device("cpu"))
    _fill(model, blank, seed, Ranks())
    return model, True


def build_start(
    workload: Workload, seed: int, ranks: Ranks, strategy: str
) -> tuple[nn.Module, Macs]:
    """Builds this rank's network; returns it with its multiply-adds.

    Args:
        strategy: "fsdp" spreads it over the ranks, and communicates.

    Raises:
        WorkloadError: It cannot be built, or has no way to get its first weights.
    """
    model, macs = ranks.together(lambda: _build_here(workload, seed))
    blank = copy.deepcopy(model) if _is_blank(model) else None
    if blank is None:
        model = model.to(ranks.device)
    elif strategy != "fsdp":
        _give_memory(model, ranks.device)
    if strategy == "fsdp":
        shard_network(model, ranks.device, ranks.world_size)
    if blank is not None:
        layers = blank
        ranks.together(lambda: _fill(model, layers, seed, ranks))
    return model, macs


def _build_here(workload: Workload, seed: int) -> tuple[nn.Module, Macs]:
    with seeded(derive_seed(seed, "model")):
        model = build_network(workload)
    example, _ = take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))
    return model, count_macs(model, example)


def copy_frozen(model: nn.Module) -> nn.Module:
    """Copies a network to look at, never to train. Communicates where it is sharded."""
    twin = copy_sharded(model) if is_sharded(model) else copy.deepcopy(model)
    return twin.eval().requires_grad_(False)


def _is_blank(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Moves a network off the meta device; tied weights, which torch would part, stay tied."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)
    for (owner, key), *others in places.values():
        for module, name in others:
            module._parameters[name] = owner._parameters[key]


@torch.no_grad()
def _fill(model: nn.Module, blank: nn.Module, seed: int, ranks: Ranks) -> None:
    """Draws the first weights of one layer after the other, each rank keeping its rows.

    A tied weight is the first layer's.

    Args:
        blank: The same network on the meta device, in one piece.
    """
    filled: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        drawn = _draw_layer(path, blank.get_submodule(path), derive_seed(seed, "layer", path))
        for name, values in drawn.items():
            tensor = module.get_parameter(name) if name in module._parameters else None
            if tensor is not None and tensor in filled:
                continue
            filled.update(() if tensor is None else (tensor,))
            target = module.get_buffer(name) if tensor is None else tensor.detach()
            piece = cut_rows(name, target.shape, ranks.world_size)[ranks.rank]
            rows = owned(values, piece) if is_shard(target) else values
            local(target).copy_(rows.view(local(target).shape))


def _draw_layer(path: str, blank: nn.Module, seed: int) -> dict[str, Tensor]:
    """Lets a layer set its own parameters and buffers, not those of the layers in it."""
    layer = copy.deepcopy(blank)
    drawn: dict[str, Tensor] = {}
    owners: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
    for owner in owners:
        for name, tensor in owner.items():
            if tensor is not None:
                unset = math.nan if tensor.is_floating_point() else 0
                values = torch.full(tensor.shape, unset, dtype=tensor.dtype)
                drawn[name] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values
                owner[name] = drawn[name]
    if not drawn:
        return {}
    reset = getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))
    if callable(reset):
        with seeded(seed):
            reset()
    unset_names = [
        name
        for name, values in drawn.items()
        if values.is_floating_point() and bool(values.isnan().any())
    ]
    if unset_names or not callable(reset):
        name = f"{path}.{(unset_names or list(drawn))[0]}".lstrip(".")
        raise WorkloadError(
            f"workload.build_model: '{name}' is on the meta device and {type(blank).__name__} has "
            "no reset_parameters() that sets it; give it one, or build the network with its weights"
        )
    return {name: values.detach() for name, values in drawn.items()}
