"""Builds the network of a trial under the job's seed, and loads it.

A network that `build_model` returns with its weights starts from those. One on the meta device
(built under `torch.device("meta")`) gets its weights layer by layer from each layer's own
`reset_parameters`, under a seed of the layer's name; its tensors that are not on the meta device
keep their values. So a sharded network larger than one worker never exists as a whole, and a
replicated one built the same way starts from the same bits.

Ranks compare digests of what they have built instead of broadcasting weights: where a process
differs in the weights, it also differs in what they do not hold.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from gbp_ray.distributed.agreement import (
    check_on_record,
    check_same_start,
    check_same_weights,
    digest_tensor,
    digest_weights,
    fingerprints_of_data,
    fingerprints_of_network,
)
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import (
    copy_blank,
    copy_network,
    copy_sharded,
    is_shard,
    is_sharded,
    local,
    shard_like,
    shard_network,
)
from gbp_ray.errors import StoreError, WorkloadError
from gbp_ray.training.passes import Macs, count_macs, find_unused
from gbp_ray.workloads.batch import forward
from gbp_ray.workloads.contract import WEIGHT_LAYERS, Workload, num_examples
from gbp_ray.workloads.data import derive_seed, first_example, seeded, take_batch
from gbp_ray.workloads.loading import build_network
from gbp_ray.workloads.losses import loss_of
from gbp_ray.workloads.weights import tensor_state

__all__ = [
    "Start",
    "build_start",
    "copy_frozen",
    "load_rows",
    "load_weights",
    "network_of_seed",
    "rebuild_network",
    "unused_layers",
    "unused_on_all",
]


class Start(NamedTuple):
    """This rank's network as a trial starts with it, with fingerprints of network and data.

    Attributes:
        unused: Of `unused_layers`.
        examined: What the caller's function found.
    """

    model: nn.Module
    macs: Macs
    fingerprints: dict[str, str]
    unused: frozenset[str]
    examined: Any = None


_STARTS: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
"""Digests of each layer when it was built, to recognise one that is returned again."""


def network_of_seed(
    workload: Workload, seed: int, *, is_changed: bool = False
) -> tuple[nn.Module, bool]:
    """Builds the unsharded network with the weights that every rank starts from.

    Args:
        is_changed: True if it will be trained or loaded.

    Returns:
        The network, and True if the workload built it without weights.

    Raises:
        WorkloadError: It cannot be built, or a layer cannot initialise its weights.
    """
    model, _ = _build(workload, seed, is_changed=is_changed)
    if not _is_blank(model):
        return model, False
    blank = copy.deepcopy(model)
    _give_memory(model, torch.device("cpu"))
    _fill(model, blank, seed)
    return model, True


def build_start(
    workload: Workload,
    seed: int,
    ranks: Ranks,
    strategy: str,
    stored: Mapping[str, str] | None = None,
    source: str = "",
    examine: Callable[[nn.Module], Any] = lambda model: None,
) -> Start:
    """Builds this rank's network, the same one on all ranks. Communicates.

    Args:
        strategy: "fsdp" shards it.
        stored: Fingerprints on record of a trial that is resumed.
        source: Name of that record in errors.
        examine: Looks at the network before it is sharded.

    Raises:
        WorkloadError: As `network_of_seed`; or network or data differ between ranks, or from what
            is on record.
    """
    model, macs, digests, found = ranks.run_collectively(lambda: _build_here(workload, seed))
    check_same_start(ranks, found)
    # One rank decides, for all.
    unused = unused_on_all(workload, model, ranks)
    ranks.run_collectively(lambda: check_on_record(found, stored or {}, source))
    examined = ranks.run_collectively(partial(examine, model))
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
        digests = ranks.run_collectively(lambda: _fill(model, layers, seed))
        check_same_weights(ranks, digests)
    return Start(model, macs, found, unused, examined)


def unused_layers(
    workload: Workload, model: nn.Module, *, is_blank: bool = False
) -> frozenset[str]:
    """Names the weights of layers that no pass in eval mode uses, looking at training examples.

    One example shows that all are used, most often; up to `_MOST_PASSED` do where layers are
    chosen by the data. So the answer depends on the workload and the seed only.

    Args:
        model: As it was built, unsharded.
        is_blank: It was built without weights; the passes are then made without them.
    """
    layers = [module for module in model.modules() if isinstance(module, WEIGHT_LAYERS)]
    weights = {layer._parameters.get("weight") for layer in layers}
    names = [name for name, parameter in model.named_parameters() if parameter in weights]
    if is_blank or _is_blank(model):
        model = copy_blank(model)
    some = next(model.parameters())
    total = num_examples(workload.train)
    few = torch.linspace(0, total - 1, min(total, _MOST_PASSED)).long()

    def passes() -> Iterator[Callable[[nn.Module], Tensor]]:
        for indices in (few[:1], *few.split(_BATCH_PASSED)):
            batch = take_batch(workload, workload.train, indices, device=some.device)
            yield lambda plain, batch=batch: loss_of(  # type: ignore[misc]
                workload, forward(plain, workload, batch), batch.targets
            )

    return frozenset(find_unused(model, passes(), names))


def unused_on_all(workload: Workload, model: nn.Module, ranks: Ranks) -> frozenset[str]:
    """Returns `unused_layers` as the first rank finds them. Communicates."""
    return ranks.broadcast_object(
        ranks.run_collectively(
            lambda: unused_layers(workload, model) if ranks.is_first else frozenset()
        )
    )


_MOST_PASSED, _BATCH_PASSED = 128, 8


def _build_here(
    workload: Workload, seed: int
) -> tuple[nn.Module, Macs, dict[str, str], dict[str, str]]:
    model, digests = _build(workload, seed, is_changed=True)
    macs = count_macs(
        model, first_example(workload), lambda plain, batch: forward(plain, workload, batch)
    )
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
        names = {f"{path}.{name}".lstrip(".") for name, _ in tensors}
        own = {name: digests[name] for name in names & digests.keys()}
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
    """Copies a network for evaluation only. Communicates where it is sharded."""
    twin = copy_sharded(model) if is_sharded(model) else copy_network(model)
    return twin.eval().requires_grad_(False)


def _is_blank(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Moves a network off the meta device; tied weights, which torch would untie, stay tied."""
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
def _fill(model: nn.Module, blank: nn.Module, seed: int) -> dict[str, str]:
    """Initialises the weights layer by layer, each rank keeping its rows; returns their digests.

    The first layer initialises a tied weight.

    Args:
        blank: The same network on the meta device, unsharded.
    """
    filled: set[nn.Parameter] = set()
    digests = {}
    for path, module in model.named_modules():
        drawn = _draw_layer(path, blank.get_submodule(path), derive_seed(seed, "layer", path))
        for name, values in drawn.items():
            tensor = module.get_parameter(name) if name in module._parameters else None
            if tensor is not None and tensor in filled:
                continue
            if tensor is not None:
                filled.add(tensor)
            digests[f"{path}.{name}"] = digest_tensor(values)
            target = module.get_buffer(name) if tensor is None else tensor.detach()
            local(target).copy_(local(shard_like(values, target)))
    return digests


def _draw_layer(path: str, blank: nn.Module, seed: int) -> dict[str, Tensor]:
    """Resets a layer's own parameters and buffers, not those of its submodules.

    Tensors that are not on the meta device keep their values.
    """
    layer = copy.deepcopy(blank)
    drawn: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    owners: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
    for owner in owners:
        for name, tensor in owner.items():
            if tensor is not None and tensor.is_meta:
                unset = math.nan if tensor.is_floating_point() else 0
                values = torch.full(tensor.shape, unset, dtype=tensor.dtype)
                drawn[name] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values
                owner[name] = drawn[name]
            elif tensor is not None:
                given[name] = tensor.detach().clone()
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


def rebuild_network(
    workload: Workload,
    seed: int,
    weights: bytes,
    source: str,
    stored: Mapping[str, str] | None = None,
) -> nn.Module:
    """Builds the network of a workload with stored weights, in eval mode.

    Args:
        seed: Decides the values that the weights file does not hold.
        weights: weights.safetensors of a round.
        source: Name of the file in errors.
        stored: Fingerprints of round 0 of the trial, which the network must match.

    Raises:
        StoreError: The weights are damaged or do not fit.
        WorkloadError: The network cannot be built, or has changed.
    """
    model, is_blank = network_of_seed(workload, seed, is_changed=True)
    load_weights(model, weights, source)
    check_on_record(fingerprints_of_network(model, is_blank=is_blank), stored or {}, source)
    return model.eval()


def load_weights(model: nn.Module, data: bytes, source: str) -> None:
    """Loads a round's weights into a network, in place; a sharded one takes its rows.

    Raises:
        StoreError: The bytes are not safetensors, or do not fit the model.
    """
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        # KeyError: a dtype that torch does not have.
        raise StoreError(f"{source}: is not a readable safetensors file: {error}") from None
    own = tensor_state(model)
    fitting = {
        name: shard_like(tensor, own[name])
        for name, tensor in tensors.items()
        if name in own and (own[name].shape, own[name].dtype) == (tensor.shape, tensor.dtype)
    }
    missing, _ = model.load_state_dict(fitting, strict=False)
    present = {_identity(own[name]) for name in tensors if name in own}
    missing = [n for n in missing if n in own and _identity(own[n]) not in present]
    misfits = [name for name in tensors if name not in fitting]
    if missing or misfits:
        name = (missing or misfits)[0]
        raise StoreError(f"{source}: does not fit the model at '{name}'; was the workload changed?")


def load_rows(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads whole tensors that fit into a network, in place; a sharded one takes its rows."""
    own = tensor_state(model)
    rows = {name: shard_like(t.to(own[name].dtype), own[name]) for name, t in tensors.items()}
    model.load_state_dict(rows, strict=False)


def distinct_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict with tied tensors, which safetensors refuses, under one name only."""
    seen: set[tuple[int, ...]] = set()
    distinct: dict[str, Tensor] = {}
    for name, tensor in tensor_state(model).items():
        key = _identity(tensor)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        distinct[name] = tensor.detach()
    return distinct


def _identity(tensor: Tensor) -> tuple[int, ...]:
    """Returns a key that is equal for tied tensors, on all ranks alike."""
    if is_shard(tensor):
        # A rank may have no rows, and then no address.
        return (id(tensor),)
    return (tensor.data_ptr(), *tensor.shape)
