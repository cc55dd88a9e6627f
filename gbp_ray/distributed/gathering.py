"""Sharded networks with their weights gathered: all at once, or a group at a time.

FSDP2 gathers a group's weights for its own passes. Passes that it knows nothing of, such as second
derivatives or several that stand side by side, go through a twin of the network without its hooks.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gbp_ray.distributed.sharding import (
    copy_computed,
    is_sharded,
    local,
    shard_like,
    template_of,
)

__all__ = [
    "copy_unsharded",
    "unsharded",
    "unsharded_in_turn",
]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the network with all weights gathered and without FSDP2's hooks. Communicates.

    It shares its buffers with the sharded one. In the block each rank holds all weights.
    """
    if not is_sharded(model):
        yield model
        return
    twin = _PlainTwin(model)
    try:
        for path in twin.groups:
            twin.gather(path)
        yield twin.network
    finally:
        twin.close()


@contextmanager
def unsharded_in_turn(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the network without FSDP2's hooks, a group's weights gathered while passes are in it.

    What is written to them meanwhile is written to the sharded network as well when the last pass
    leaves the group, several side by side being counted. Every pass communicates.
    """
    if not is_sharded(model):
        yield model
        return
    twin = _PlainTwin(model)
    inside = Counter[str]()

    def enter(path: str, *_: object) -> None:
        inside[path] += 1
        if inside[path] == 1:
            twin.gather(path)

    def leave(path: str, *_: object) -> None:
        inside[path] -= 1
        if inside[path] == 0:
            twin.write_back(path)
            twin.let_go(path)

    hooks = []
    for path in twin.groups:
        group = twin.network.get_submodule(path)
        # A group is gathered before any other hook sees it, and let go after all of them.
        hooks.append(group.register_forward_pre_hook(partial(enter, path), prepend=True))
        hooks.append(group.register_forward_hook(partial(leave, path)))
    try:
        yield twin.network
    finally:
        for hook in hooks:
            hook.remove()
        twin.close()


@dataclass(frozen=True)
class _Slot:
    """Where a sharded network and its plain twin hold one weight.

    Attributes:
        shard: This rank's rows.
        blank: What the twin holds while the weight is not gathered.
    """

    module: nn.Module
    twin: nn.Module
    name: str
    shard: nn.Parameter
    blank: nn.Parameter | None


class _PlainTwin:
    """A sharded network without FSDP2's hooks, its groups gathered and let go one by one.

    Attributes:
        network: It shares the buffers of the sharded one; weights that are not gathered are on the
            meta device.
        groups: Names of the groups, the outermost first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.network = template_of(model)
        self.groups: dict[str, list[_Slot]] = {}
        self._modules: dict[str, FSDPModule] = {}
        self._gathered: set[str] = set()
        self._buffers: list[tuple[dict[str, Any], str, Any]] = []
        owners: dict[nn.Module, str] = {}
        for path, module in model.named_modules():
            if isinstance(module, FSDPModule):
                self.groups[path], self._modules[path] = [], module
                # Inner groups come later and take over what is theirs.
                owners.update(dict.fromkeys(model.get_submodule(path).modules(), path))
        for path, module in model.named_modules():
            twin = self.network.get_submodule(path)
            twin.training = module.training
            for name, value in module._buffers.items():
                self._buffers.append((twin._buffers, name, twin._buffers[name]))
                twin._buffers[name] = value
            for name, shard in module._parameters.items():
                if shard is not None:
                    blank = twin._parameters[name]
                    self.groups[owners[module]].append(_Slot(module, twin, name, shard, blank))

    def gather(self, path: str) -> None:
        """Gathers a group's weights. Communicates."""
        self._modules[path].unshard()
        self._gathered.add(path)
        for slot in self.groups[path]:
            slot.twin._parameters[slot.name] = slot.module._parameters[slot.name]
        self._list_weights(path)

    @torch.no_grad()
    def write_back(self, path: str) -> None:
        """Takes over gathered weights into the sharded network."""
        for slot in self.groups[path]:
            whole = slot.twin._parameters[slot.name]
            assert whole is not None
            local(slot.shard.detach()).copy_(local(shard_like(whole.detach(), slot.shard)))

    def let_go(self, path: str) -> None:
        """Frees a group's weights; does nothing where they are not gathered."""
        if path in self._gathered:
            self._gathered.remove(path)
            for slot in self.groups[path]:
                slot.twin._parameters[slot.name] = slot.blank
            self._list_weights(path)
            self._modules[path].reshard()

    def close(self) -> None:
        """Frees all weights and gives the buffers back."""
        for path in self.groups:
            self.let_go(path)
        for own, name, value in self._buffers:
            own[name] = value

    def _list_weights(self, path: str) -> None:
        """Recurrent layers list their weights."""
        for twin in {slot.twin for slot in self.groups[path]}:
            if isinstance(twin, nn.RNNBase):
                twin._flat_weights = [getattr(twin, n, None) for n in twin._flat_weights_names]


@torch.no_grad()
def copy_unsharded(model: nn.Module, device: torch.device) -> nn.Module:
    """Copies a sharded network as one that is not, on every rank. Communicates."""
    with unsharded(model) as plain:
        copies = copy_computed(plain)
        for tensor in (*plain.parameters(), *plain.buffers()):
            copied = tensor.detach().to(device, copy=True)
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = copied
        twin = copy.deepcopy(plain, copies)
    for module in twin.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # its list still holds the sharded weights
    return twin
