"""Networks whose weights are spread over the ranks by FSDP2 (`fully_shard`).

What the rest of the core must know of it is here: which tensor of this rank holds its shard
(`local`), which tensors autograd differentiates by (`leaves`), and how to see a network with all of
its weights for the few criteria that differentiate twice or example by example (`whole`). All of it
works on replicated networks, too, where the answers are the parameters and the network themselves.

FSDP2 gathers the weights of one group at a time, in the forward pass and again in the backward
pass. Its own reduction of gradients, an average in an order of its own, never runs: the gradients
are taken from the leaves as they arrive (`folding`), before FSDP2 sees them.

Every pass through a sharded network communicates, so all ranks must make the same passes.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

__all__ = [
    "PARTED",
    "RankSlice",
    "add_over_ranks",
    "copy_sharded",
    "cut_rows",
    "gather_bits",
    "gather_whole",
    "group_parameters",
    "is_shard",
    "is_sharded",
    "leaves",
    "like_shard",
    "listen_to_groups",
    "local",
    "local_slice",
    "only_requiring",
    "route_of",
    "shard_network",
    "unpack_pieces",
    "unsharded",
]

_LEAST_GROUP = 1024
"""Weights that are worth a gathering of their own; smaller modules join the group around them."""

_PORTION = 2**27
"""Elements of masks after which they are gathered, 16 MiB: an exchange for each layer would cost
more in waiting, and one for all of them more in memory."""


@dataclass(frozen=True)
class _Sharding:
    """What is known of a sharded network beside itself.

    Attributes:
        leaves: Parameter name to the tensor that holds the gathered weights while they are there.
        template: The network before it was sharded, on the meta device.
        route: Checksum of the names of the groups that passes went through, in their order.
    """

    leaves: dict[str, nn.Parameter]
    template: nn.Module
    route: list[int] = field(default_factory=lambda: [0])


PARTED = (
    "cluster.strategy = fsdp: some passes leave out layers that others go through, and workers "
    "gather the weights of a layer together; let every pass use all of them, or set "
    "cluster.strategy to replicated"
)

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


def add_over_ranks(counts: Sequence[int], spread: Iterable[Tensor]) -> list[int]:
    """Adds up what each rank counted in its rows, if the counted tensors are spread over ranks."""
    shard = next((tensor for tensor in spread if isinstance(tensor, DTensor)), None)
    if shard is None:
        return list(counts)
    total = torch.tensor(counts, dtype=torch.int64, device=shard.device)
    dist.all_reduce(total, group=shard.device_mesh.get_group())
    found: list[int] = total.tolist()
    return found


def gather_bits(masks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Puts bool tensors together on every rank, each flat; one bit an element on the wire.

    Communicates where they are sharded, small ones together. All are sharded, or none.
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
    group = masks[0].device_mesh.get_group()
    # Each rank's rows of each mask begin with a byte of their own.
    sizes = [[_num_elements_of(rank, mask) for mask in masks] for rank in range(group.size())]
    packed = np.concatenate(
        [np.packbits(local(mask.detach()).reshape(-1).cpu().numpy()) for mask in masks]
    )
    longest = max(sum(-(-size // 8) for size in of_rank) for of_rank in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=masks[0].device)
    padded[: packed.size] = torch.from_numpy(packed).to(padded.device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    pieces = unpack_pieces([part.cpu().numpy() for part in parts], sizes)
    for _ in masks:
        yield np.concatenate([next(pieces) for _ in sizes]).view(bool)


def unpack_pieces(
    packed: Sequence[np.ndarray], sizes: Sequence[Sequence[int]]
) -> Iterator[np.ndarray]:
    """Unpacks the bits that each rank has packed, each tensor's from a byte of its own on.

    Args:
        packed: Of each rank its bytes, as `numpy.packbits` makes them.
        sizes: Of each rank its elements of each tensor.

    Yields:
        The first tensor's pieces by rank, then those of the next.
    """
    taken = [0] * len(packed)
    for of_tensor in zip(*sizes, strict=True):
        for rank, size in enumerate(of_tensor):
            yield np.unpackbits(packed[rank][taken[rank] :], count=size)
            taken[rank] += -(-size // 8)


def _num_elements_of(rank: int, tensor: DTensor) -> int:
    """Counts what a rank holds: FSDP2 deals rows in equal runs, of which the last may be short."""
    num_rows = tensor.shape[0]
    run = -(-num_rows // tensor.device_mesh.size())
    return max(min((rank + 1) * run, num_rows) - rank * run, 0) * math.prod(tensor.shape[1:])


def leaves(model: nn.Module) -> dict[str, nn.Parameter]:
    """Lists what autograd differentiates by, under each parameter's first name."""
    if model in _SHARDINGS:
        return _SHARDINGS[model].leaves
    return dict(model.named_parameters())


@contextmanager
def only_requiring(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Has the named parameters alone take a gradient in the block."""
    # FSDP2 sets a leaf as its parameter is set, whenever it gathers into it.
    tensors = [*model.named_parameters(), *leaves(model).items()]
    required = [tensor.requires_grad for _, tensor in tensors]
    for name, tensor in tensors:
        tensor.requires_grad_(name in names)
    try:
        yield
    finally:
        for (_, tensor), was_required in zip(tensors, required, strict=True):
            tensor.requires_grad_(was_required)


def shard_network(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Spreads a network's weights over the ranks, in place. Communicates.

    A group that FSDP2 gathers at once is a member of an `nn.Sequential` or `nn.ModuleList`, as
    blocks usually are, with at least `_LEAST_GROUP` weights of its own; the rest is one group. A
    module that shares a weight with another joins the group around both.

    Args:
        model: On the meta device it gets memory for this rank's rows alone, still to be filled.
    """
    template = _blank_copy(model)
    mesh = init_device_mesh(device.type, (world_size,))
    # The outermost group, too, gives its weights back after the forward pass.
    for module in (*_groups(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    sharding = _SHARDINGS[model] = _Sharding(_find_leaves(model), template)
    listen_to_groups(
        model, lambda path: sharding.route.append(zlib.crc32(path.encode(), sharding.route.pop()))
    )


def listen_to_groups(model: nn.Module, tell: Callable[[str], object]) -> None:
    """Has the name of each group told whenever a pass comes to it."""
    for path, module in model.named_modules():
        if isinstance(module, FSDPModule):
            group = model.get_submodule(path)
            group.register_forward_pre_hook(lambda *_, path=path: tell(path))


def route_of(model: nn.Module) -> int:
    """Sums up which groups passes went through, and when; ranks that differ have mixed them up."""
    return _SHARDINGS[model].route[0] if is_sharded(model) else 0


def _blank_copy(model: nn.Module) -> nn.Module:
    """Copies a network onto the meta device, where tied weights stay tied."""
    blanks: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        blank = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            blank = nn.Parameter(blank, requires_grad=tensor.requires_grad)
        blanks[id(tensor)] = blank
    return copy.deepcopy(model, blanks)


@torch.no_grad()
def copy_sharded(model: nn.Module) -> nn.Module:
    """Copies a sharded network, each rank its rows. Communicates."""
    sharding = _SHARDINGS[model]
    twin = copy.deepcopy(sharding.template)
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
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
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


@dataclass(frozen=True)
class RankSlice:
    """Weights `start` to `stop` of one layer, flat in C order; empty where they are equal."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many weights it holds."""
        return self.stop - self.start


def cut_rows(
    name: str, shape: Sequence[int], world_size: int, *, is_whole: bool = False
) -> list[RankSlice]:
    """Cuts a layer into a slice for each rank, in rank order.

    Args:
        is_whole: Leaves it to rank 0.
    """
    shape = tuple(shape)
    num_rows = 1 if is_whole or not shape else shape[0]
    row = math.prod(shape) // max(num_rows, 1)
    chunk = -(-num_rows // world_size)
    ends = [min(rank * chunk, num_rows) * row for rank in range(world_size + 1)]
    return [RankSlice(name, shape, start, stop) for start, stop in pairwise(ends)]


def local_slice(tensor: Tensor, piece: RankSlice) -> Tensor:
    """Looks at what a slice covers of a whole layer or of this rank's shard of it; flat, (L,)."""
    tensor = tensor.detach()
    if is_shard(tensor):
        return local(tensor).reshape(-1)
    return tensor.reshape(-1)[piece.start : piece.stop]
