"""Networks whose weights FSDP2 (`fully_shard`) spreads over the ranks.

The rest of the package sees of it: which tensor of this rank holds its shard (`local`), which
tensors autograd differentiates by (`leaves`), and the network with all of its weights, for the few
criteria that differentiate twice or example by example (`gathering`). For replicated networks these
are the parameters and the network themselves.

FSDP2 gathers the weights of one group at a time, in the forward pass and again in the backward
pass. Its gradient reduction, which averages in an order of its own, never runs: `GradientReducer`
takes the gradients from the leaves before FSDP2 sees them.

Every pass through a sharded network communicates, so all ranks must make the same passes.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import PruneError, WorkloadError

__all__ = [
    "PARTED",
    "RankSlice",
    "add_over_ranks",
    "adopt_sharded",
    "copy_blank",
    "copy_computed",
    "copy_network",
    "copy_sharded",
    "cut_rows",
    "differentiating",
    "gather_bits",
    "gather_packed",
    "gather_whole",
    "group_parameters",
    "is_shard",
    "is_sharded",
    "leaves",
    "let_go",
    "listen_to_groups",
    "local",
    "local_slice",
    "only_requiring",
    "route_of",
    "shard_from_rows",
    "shard_like",
    "shard_network",
    "shard_rows",
    "template_of",
]

_LEAST_GROUP = 1024
"""Weights that a module needs to be a group; smaller ones join the group around them."""

_PORTION = 2**27
"""Elements of masks gathered at a time, 16 MiB: one exchange per layer would cost more latency, one
for all layers more memory."""


@dataclass(frozen=True)
class _Sharding:
    """Facts about a module that `fully_shard`, which changes it in place, does not keep.

    Attributes:
        leaves: Parameter name to the tensor that FSDP2 gathers its weights into.
        template: The network before it was sharded, on the meta device; None where that was done
            elsewhere.
        route: Checksum of the names of the groups that passes went through, in order.
    """

    leaves: dict[str, nn.Parameter]
    template: nn.Module | None
    route: list[int] = field(default_factory=lambda: [0])


PARTED = (
    "cluster.strategy = fsdp: some passes leave out layers that others go through, and workers "
    "gather the weights of a layer together; let every pass use all of them, or set "
    "cluster.strategy to replicated"
)

_SHARDINGS: WeakKeyDictionary[nn.Module, _Sharding] = WeakKeyDictionary()


def is_shard(tensor: Tensor) -> bool:
    """Returns True for a tensor that is spread over the ranks."""
    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Returns True for a network that `shard_network` or `adopt_sharded` has seen."""
    return model in _SHARDINGS


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's rows of a tensor, sharing its memory; all rows of a replicated one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_from_rows(rows: Tensor, pattern: Tensor) -> Tensor:
    """Makes this rank's rows a tensor sharded like `pattern`; returns them if it is replicated."""
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


def shard_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Shards a whole tensor like `pattern`, each rank keeping its rows."""
    if not is_shard(pattern) or is_shard(tensor):
        return tensor
    ranks = Ranks.current()
    rank_slice = cut_rows("", pattern.shape, ranks.world_size)[ranks.rank]
    rows = local_slice(tensor, rank_slice).clone().view(local(pattern.detach()).shape)
    return shard_from_rows(rows.to(pattern.device), pattern)


def shard_rows(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Shards a whole tensor over the ranks of `pattern`, which may have another shape."""
    assert isinstance(pattern, DTensor)
    mesh = pattern.device_mesh
    rank_slice = cut_rows("", tensor.shape, mesh.size())[mesh.get_local_rank()]
    row = max(math.prod(tensor.shape[1:]), 1)
    number = rank_slice.size // row
    rows = local_slice(tensor, rank_slice).clone().view(number, *tensor.shape[1:])
    whole = torch.empty_like(tensor, device="meta").contiguous()
    return DTensor.from_local(
        rows.to(pattern.device),
        mesh,
        pattern.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def gather_whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor on every rank. Communicates where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add_over_ranks(counts: Sequence[int], spread: Iterable[Tensor]) -> list[int]:
    """Sums counts over the ranks if the counted tensors are sharded. Then communicates."""
    shard = next((tensor for tensor in spread if isinstance(tensor, DTensor)), None)
    if shard is None:
        return list(counts)
    ranks = Ranks.current(shard.device)
    return ranks.all_reduce_counts(torch.tensor(counts, dtype=torch.int64)).tolist()


def gather_bits(masks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Gathers bool tensors on every rank, each flat; one bit an element on the wire.

    Communicates where they are sharded, several tensors at a time. All are sharded, or none.
    """
    portion: list[DTensor] = []
    num_elements = 0
    for mask in masks:
        if not isinstance(mask, DTensor):
            assert not portion
            yield mask.detach().reshape(-1).cpu().numpy()
            continue
        portion.append(mask)
        num_elements += mask.numel()
        if num_elements >= _PORTION:
            yield from _gather_portion(portion)
            portion, num_elements = [], 0
    if portion:
        yield from _gather_portion(portion)


def _gather_portion(masks: list[DTensor]) -> Iterator[np.ndarray]:
    ranks = Ranks.current(masks[0].device)
    by_mask = [cut_rows("", mask.shape, ranks.world_size) for mask in masks]
    sizes = [[cut[rank].size for cut in by_mask] for rank in range(ranks.world_size)]
    packed = [np.packbits(local(mask.detach()).reshape(-1).cpu().numpy()) for mask in masks]
    slices = gather_packed(np.concatenate(packed), sizes, ranks)
    for _ in masks:
        yield np.concatenate([next(slices) for _ in sizes]).view(bool)


def gather_packed(
    packed: np.ndarray, sizes: Sequence[Sequence[int]], ranks: Ranks
) -> Iterator[np.ndarray]:
    """Gathers bits that each rank has packed, each tensor's from a byte of its own on.

    Communicates when the first is asked for.

    Args:
        packed: This rank's bytes, as `numpy.packbits` makes them.
        sizes: Each rank's elements of each tensor.

    Yields:
        The first tensor's slices by rank, then those of the next.
    """
    num_bytes = [sum(-(-size // 8) for size in of_rank) for of_rank in sizes]
    gathered = ranks.all_gather_vectors(torch.from_numpy(packed), num_bytes)
    by_rank = [row.cpu().numpy() for row in gathered]
    taken = [0] * len(by_rank)
    for of_tensor in zip(*sizes, strict=True):
        for rank, size in enumerate(of_tensor):
            yield np.unpackbits(by_rank[rank][taken[rank] :], count=size)
            taken[rank] += -(-size // 8)


def leaves(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the tensors that autograd differentiates by, by first parameter name."""
    if model in _SHARDINGS:
        return _SHARDINGS[model].leaves
    return dict(model.named_parameters())


@contextmanager
def only_requiring(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Restricts gradients in the block to the named parameters."""
    # FSDP2 copies requires_grad from a parameter to its leaf whenever it gathers.
    tensors = [*model.named_parameters(), *leaves(model).items()]
    required = [tensor.requires_grad for _, tensor in tensors]
    for name, tensor in tensors:
        tensor.requires_grad_(name in names)
    try:
        yield
    finally:
        for (_, tensor), was_required in zip(tensors, required, strict=True):
            tensor.requires_grad_(was_required)


@contextmanager
def differentiating(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Keeps the gradients of the named parameters only; those of others are let go at once.

    Matrices that come after the first named one go on requiring a gradient: without that, torch
    multiplies the transposed inputs of attention row by row, at twice the cost.
    """
    differentiated = leaves(model)
    parameters = dict(model.named_parameters())
    order = list(parameters)
    first = min((order.index(name) for name in names), default=len(order))
    others = {
        name
        for name in order[first:]
        if name not in names and parameters[name].requires_grad and parameters[name].ndim > 1
    }
    with only_requiring(model, others.union(names)), ExitStack() as stack:
        for name in others:
            hook = differentiated[name].register_post_accumulate_grad_hook(let_go)
            stack.callback(hook.remove)
        yield


def let_go(leaf: Tensor) -> None:
    """Frees the gradient of a tensor; a hook for when it is complete."""
    leaf.grad = None


def shard_network(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Spreads a network's weights over the ranks, in place. Communicates.

    Each member of an `nn.Sequential` or `nn.ModuleList` with at least `_LEAST_GROUP` weights is a
    group that FSDP2 gathers at once; the rest is one group. A module that shares a weight with
    another joins the group around both.

    Args:
        model: On the meta device it gets memory for this rank's rows only, still to be filled.
    """
    template = copy_blank(model)
    mesh = init_device_mesh(device.type, (world_size,))
    # By default FSDP2 keeps the outermost group gathered after the forward pass.
    for module in (*_groups(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    sharding = _SHARDINGS[model] = _Sharding(_find_leaves(model), template)
    listen_to_groups(
        model, lambda path: sharding.route.append(zlib.crc32(path.encode(), sharding.route.pop()))
    )


def adopt_sharded(model: nn.Module) -> None:
    """Gets a network ready that `fully_shard` was called on elsewhere; no other is touched.

    Groups that a pass left gathered are let go. Communicates if it is sharded.

    Raises:
        WorkloadError: It is sharded otherwise than by rows over all ranks.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.reshard()
    parameters = dict(model.named_parameters())
    if model in _SHARDINGS or not (groups or any(is_shard(p) for p in parameters.values())):
        return
    everyone = list(range(Ranks.current().world_size))
    for name, parameter in parameters.items():
        is_by_rows = (
            isinstance(parameter, DTensor)
            and parameter.placements == (Shard(0),)
            and parameter.device_mesh.mesh.tolist() == everyone
        )
        if not (groups and is_by_rows):
            raise WorkloadError(
                f"model: '{name}' is not sharded by rows over all {len(everyone)} ranks; call "
                "fully_shard on the whole model, over a mesh of one axis, or do not shard it"
            )
    _SHARDINGS[model] = _Sharding(_find_leaves(model), None)


def listen_to_groups(model: nn.Module, tell: Callable[[str], object]) -> None:
    """Calls `tell` with the name of each group whenever a pass comes to it."""
    for path, module in model.named_modules():
        if isinstance(module, FSDPModule):
            group = model.get_submodule(path)
            group.register_forward_pre_hook(lambda *_, path=path: tell(path))


def template_of(model: nn.Module) -> nn.Module:
    """Returns a sharded network as it was before, on the meta device.

    Raises:
        PruneError: It was sharded elsewhere.
    """
    if (template := _SHARDINGS[model].template) is None:
        raise PruneError(
            "prune.criterion: takes passes of its own, which need a network that is not sharded; "
            "choose one that reads weights or gradients, or do not shard it"
        )
    return template


def route_of(model: nn.Module) -> int:
    """Returns a checksum of the groups that passes went through; it must agree on all ranks."""
    return _SHARDINGS[model].route[0] if is_sharded(model) else 0


def copy_network(model: nn.Module) -> nn.Module:
    """Copies a network that is not sharded."""
    return copy.deepcopy(model, copy_computed(model))


def copy_computed(model: nn.Module) -> dict[int, Any]:
    """Copies the weights that hooks have computed from others, which torch does not copy."""
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for held in vars(module).values()
        # Recurrent layers list their weights.
        for value in (held if isinstance(held, list) else [held])
        if isinstance(value, Tensor) and not value.is_leaf
    }


def copy_blank(model: nn.Module) -> nn.Module:
    """Copies a network onto the meta device, where tied weights stay tied."""
    blanks = copy_computed(model)
    for tensor in (*model.parameters(), *model.buffers()):
        blank = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            blank = nn.Parameter(blank, requires_grad=tensor.requires_grad)
        blanks[id(tensor)] = blank
    return copy.deepcopy(model, blanks)


@torch.no_grad()
def copy_sharded(model: nn.Module) -> nn.Module:
    """Copies a sharded network. Communicates."""
    template = _SHARDINGS[model].template
    assert template is not None
    twin = copy.deepcopy(template)
    some = next(model.parameters())
    assert isinstance(some, DTensor)
    shard_network(twin, some.device, some.device_mesh.size())
    for (_, own), (_, other) in zip(
        (*twin.named_parameters(), *twin.named_buffers()),
        (*model.named_parameters(), *model.named_buffers()),
        strict=True,
    ):
        local(own.detach()).copy_(local(other.detach()))
    return twin


def group_parameters(model: nn.Module) -> list[list[nn.Parameter]]:
    """Lists the parameters of each group that `shard_network` would make, the outermost last."""
    taken: set[nn.Parameter] = set()
    groups = []
    for module in (*_groups(model), model):
        groups.append([p for p in module.parameters() if p not in taken])
        taken.update(groups[-1])
    return groups


def _groups(model: nn.Module) -> list[nn.Module]:
    """Lists the modules that become groups, inner ones first."""
    uses = _count_uses(model)
    found: list[nn.Module] = []
    for container in model.modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        for member in container.children():
            if isinstance(member, (nn.ModuleList, nn.ModuleDict)) or member in found:
                continue
            within = _count_uses(member)
            is_worth_it = sum(p.numel() for p in within) >= _LEAST_GROUP
            if is_worth_it and all(uses[p] == count for p, count in within.items()):
                found.append(member)
    # modules() lists outer ones first; FSDP2 must get the inner ones first.
    return found[::-1]


def _count_uses(module: nn.Module) -> Counter[nn.Parameter]:
    return Counter(p for _, p in module.named_parameters(remove_duplicate=False))


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


@dataclass(frozen=True)
class RankSlice:
    """One rank's weights of a layer: `start` up to `stop`, flat in C order; possibly none."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Counts its weights."""
        return self.stop - self.start


def cut_rows(
    name: str, shape: Sequence[int], world_size: int, *, is_whole: bool = False
) -> list[RankSlice]:
    """Cuts a layer where rows end into a slice for each rank, as FSDP2 does.

    Args:
        is_whole: Gives all of it to rank 0.
    """
    shape = tuple(shape)
    num_rows = 1 if is_whole or not shape else shape[0]
    row = math.prod(shape) // max(num_rows, 1)
    chunk = -(-num_rows // world_size)
    ends = [min(rank * chunk, num_rows) * row for rank in range(world_size + 1)]
    return [RankSlice(name, shape, start, stop) for start, stop in pairwise(ends)]


def local_slice(tensor: Tensor, rank_slice: RankSlice) -> Tensor:
    """Returns this rank's slice of a whole layer, or its shard of one, flat: a view, (L,)."""
    tensor = tensor.detach()
    if is_shard(tensor):
        return local(tensor).reshape(-1)
    return tensor.reshape(-1)[rank_slice.start : rank_slice.stop]
