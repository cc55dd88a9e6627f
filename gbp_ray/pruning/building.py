"""The network of a trial as it starts: built under the job's seed, on its device, sharded if asked.

A workload decides how. A network that `build_model` returns with its weights starts from those; one
returned on the meta device (built under `torch.device("meta")`) has none yet, and gets them layer
by layer from each layer's own `reset_parameters`, under a seed of the layer's name; those of its
tensors that are not on the meta device keep their values. So a sharded network that is larger than
one worker never exists in one piece, and a replicated one built the same way starts from the same
bits.

Ranks send each other digests of what they have built, not weights: what differs between processes
in the weights differs in what the weights do not hold as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gbp_ray.errors import WorkloadError
from gbp_ray.pruning.agreement import (
    check_on_record,
    check_same_start,
    check_same_weights,
    digest_tensor,
    digest_weights,
    fingerprints_of_data,
    fingerprints_of_network,
)
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

__all__ = ["Start", "build_start", "copy_frozen", "network_of_seed"]


class Start(NamedTuple):
    """This rank's network as a trial starts with it.

    Attributes:
        macs: Its multiply-adds.
        fingerprints: Of the network and the data, for the record; see `agreement`.
    """

    model: nn.Module
    macs: Macs
    fingerprints: dict[str, str]


_STARTS: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
"""Digests of what each layer held when it was built, for those that come a second time."""


def network_of_seed(
    workload: Workload, seed: int, *, is_changed: bool = False
) -> tuple[nn.Module, bool]:
    """Builds the network in one piece, with the weights that every rank starts from.

    Args:
        is_changed: Whether it will get other weights.

    Returns:
        The network, and whether the workload built it without weights.

    Raises:
        WorkloadError: It cannot be built, or has no way to get its first weights.
    """
    model, _ = _build(workload, seed, is_changed=is_changed)
    if not _is_blank(model):
        return model, False
    blank = copy.deepcopy(model)
    _give_memory(model, torch.device("cpu"))
    _fill(model, blank, seed, Ranks())
    return model, True


def build_start(
    workload: Workload,
    seed: int,
    ranks: Ranks,
    strategy: str,
    stored: Mapping[str, str] | None = None,
    source: str = "",
) -> Start:
    """Builds this rank's network, the same one on all ranks. Communicates.

    Args:
        strategy: "fsdp" spreads it over the ranks.
        stored: Fingerprints on record of a trial that goes on.
        source: What their record is called.

    Raises:
        WorkloadError: It cannot be built, has no way to get its first weights, or ranks differ in
            it or in their data, or these differ from what is on record.
    """
    model, macs, digests, found = ranks.together(lambda: _build_here(workload, seed))
    check_same_start(ranks, found)
    ranks.together(lambda: check_on_record(found, stored or {}, source))
    blank = copy.deepcopy(model) if _is_blank(model) else None
    if blank is None:
        check_same_weights(ranks, digests)
        model = model.to(ranks.device)
    elif strategy != "fsdp":
        _give_memory(model, ranks.device)
    if strategy == "fsdp":
        shard_network(model, ranks.device, ranks.world_size)
    if blank is not None:
        layers = blank
        digests = ranks.together(lambda: _fill(model, layers, seed, ranks))
        check_same_weights(ranks, digests)
    return Start(model, macs, found)


def _build_here(
    workload: Workload, seed: int
) -> tuple[nn.Module, Macs, dict[str, str], dict[str, str]]:
    model, digests = _build(workload, seed, is_changed=True)
    example, _ = take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))
    macs = count_macs(model, example)
    found = fingerprints_of_network(model, is_blank=_is_blank(model))
    found |= fingerprints_of_data(workload)
    return model, macs, digests, found


def _build(workload: Workload, seed: int, *, is_changed: bool) -> tuple[nn.Module, dict[str, str]]:
    """Builds the network; returns it with the digests of its tensors.

    Raises:
        WorkloadError: It cannot be built, or was changed since it was built before.
    """
    with seeded(derive_seed(seed, "model")):
        model = build_network(workload)
    digests = digest_weights(model)
    for path, module in model.named_modules():
        # Asked for by methods, which modules of TorchScript have, too.
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        names = [f"{path}.{name}".lstrip(".") for name, _ in tensors]
        own = {name: digests[name] for name in names if name in digests}
        if _STARTS.get(module, own) != own:
            raise WorkloadError(
                f"workload.build_model: returned '{path or type(module).__name__}' again, which "
                "this process has trained since; make the network in build_model or in "
                "workload.factory, not once for all trials of a process"
            )
        if own and is_changed:
            _STARTS[module] = own
    return model, digests


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
def _fill(model: nn.Module, blank: nn.Module, seed: int, ranks: Ranks) -> dict[str, str]:
    """Draws the first weights of one layer after the other, each rank keeping its rows.

    A tied weight is the first layer's. Returns digests of what was drawn.

    Args:
        blank: The same network on the meta device, in one piece.
    """
    filled: set[nn.Parameter] = set()
    digests = {}
    for path, module in model.named_modules():
        drawn = _draw_layer(path, blank.get_submodule(path), derive_seed(seed, "layer", path))
        for name, values in drawn.items():
            tensor = module.get_parameter(name) if name in module._parameters else None
            if tensor is not None and tensor in filled:
                continue
            filled.update(() if tensor is None else (tensor,))
            digests[f"{path}.{name}"] = digest_tensor(values)
            target = module.get_buffer(name) if tensor is None else tensor.detach()
            piece = cut_rows(name, target.shape, ranks.world_size)[ranks.rank]
            rows = owned(values, piece) if is_shard(target) else values
            local(target).copy_(rows.view(local(target).shape))
    return digests


def _draw_layer(path: str, blank: nn.Module, seed: int) -> dict[str, Tensor]:
    """Lets a layer set its own parameters and buffers, not those of the layers in it.

    What has values keeps them.
    """
    layer = copy.deepcopy(blank)
    drawn: dict[str, Tensor] = {}
    owners: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
    given = {
        name: tensor.detach().clone()
        for owner in owners
        for name, tensor in owner.items()
        if tensor is not None and not tensor.is_meta
    }
    for owner in owners:
        for name, tensor in owner.items():
            if tensor is not None and tensor.is_meta:
                unset = math.nan if tensor.is_floating_point() else 0
                values = torch.full(tensor.shape, unset, dtype=tensor.dtype)
                drawn[name] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values
                owner[name] = drawn[name]
    if not drawn:
        return given
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
    return {name: values.detach() for name, values in drawn.items()} | given
