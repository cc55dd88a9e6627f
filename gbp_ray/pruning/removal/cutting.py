"""Cuts tensors to the units that are kept, and lays them out in their dense shapes again.

The files of a round have dense shapes, whatever the network in memory has: masks stay comparable
between rounds, and a resumed trial cuts what it reads to the same bits.

Shape suffixes as in `structure`: U = units of the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gbp_ray.errors import PruneError
from gbp_ray.pruning.structure import Group, Slice, Structure

__all__ = [
    "Axes",
    "cut_state",
    "cut_tensor",
    "expand_optimizer",
    "expand_state",
    "is_moment",
    "removed_axes",
    "shrink_structure",
]

Axes = Mapping[int, np.ndarray]
"""Which positions of some axes of a tensor stay, bool."""


def removed_axes(structure: Structure, kept_U: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
    """Returns `kept_positions` of the tensors and axes that lose any.

    Raises:
        PruneError: Nothing is left of a group or an axis, or a kept unit shares a position with
            one that is removed.
    """
    if kept_U.shape != (structure.num_units,) or kept_U.dtype != np.bool_:
        raise PruneError(
            f"kept units: are {kept_U.dtype} of shape {kept_U.shape}, and must be bool of shape "
            f"({structure.num_units},)"
        )
    by_group = structure.split(kept_U)
    for group, kept_G in zip(structure.groups, by_group, strict=True):
        if not kept_G.any():
            raise PruneError(
                f"'{group.name}': all of its {group.num_units} units are removed, and a layer "
                "needs one; keep a unit of each group"
            )
    stays = structure.kept_positions(kept_U)
    for number, part in structure.slices():
        if not stays[part.name][part.dim][part.positions[by_group[number]]].all():
            raise PruneError(
                f"'{part.name}[{part.dim}]': a kept unit of '{structure.groups[number].name}' has "
                "positions of a removed one; such units cannot be removed apart, keep both as zeros"
            )
    lost = {
        name: {dim: kept for dim, kept in sorted(axes.items()) if not kept.all()}
        for name, axes in stays.items()
    }
    return {name: axes for name, axes in lost.items() if axes}


def shrink_structure(structure: Structure, kept_U: np.ndarray) -> Structure:
    """Returns the structure of the network without the removed units.

    Groups keep order and names, so lengths and costs hold as they are: with all units of the new
    structure they are those of the old one with its kept units.

    Raises:
        PruneError: As `removed_axes`.
    """
    lost = removed_axes(structure, kept_U)
    groups = []
    for group, kept_G in zip(structure.groups, structure.split(kept_U), strict=True):
        slices = tuple(_renumber(part, kept_G, lost.get(part.name, {})) for part in group.slices)
        groups.append(Group(group.name, group.kind, int(kept_G.sum()), slices))
    shapes = {
        name: _cut_shape(shape, lost.get(name, {})) for name, shape in structure.shapes.items()
    }
    return replace(structure, groups=tuple(groups), shapes=shapes)


def _renumber(part: Slice, kept_G: np.ndarray, axes: Axes) -> Slice:
    positions = part.positions[kept_G]
    if part.dim in axes:
        positions = (np.cumsum(axes[part.dim]) - 1)[positions]
    return replace(part, positions=positions)


def _cut_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    return tuple(
        int(axes[dim].sum()) if dim in axes else length for dim, length in enumerate(shape)
    )


@torch.no_grad()
def cut_tensor(tensor: Tensor, axes: Axes) -> Tensor:
    """Copies what stays of a tensor, in its memory format."""
    cut = tensor.detach()
    for dim, kept in axes.items():
        cut = cut.index_select(dim, torch.from_numpy(np.flatnonzero(kept)).to(cut.device))
    return _formatted(cut, tensor)


def _formatted(made: Tensor, like: Tensor) -> Tensor:
    for format_, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        is_plain = like.is_contiguous()
        if like.ndim == ndim and not is_plain and like.is_contiguous(memory_format=format_):
            return made.contiguous(memory_format=format_)
    return made.contiguous()


def cut_state(
    structure: Structure, kept_U: np.ndarray, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Cuts tensors of dense shapes; the inverse of `expand_state` where units are kept.

    Args:
        state: Tensors by the first names of parameters and buffers: weights, movement, or one kind
            of the optimizer's moments. What no unit lies in stays the same object.

    Raises:
        PruneError: A tensor has another shape; or as `removed_axes`.
    """
    lost = removed_axes(structure, kept_U)
    cut = {}
    for name, tensor in state.items():
        if name in structure.shapes:
            _check_shape(name, tensor, structure.shapes[name])
        cut[name] = cut_tensor(tensor, lost[name]) if name in lost else tensor
    return cut


def expand_state(
    structure: Structure, kept_U: np.ndarray, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Lays tensors of the network without the removed units out in dense shapes.

    Parameters, and what belongs to them by name, are zero where pruned. Buffers have there the
    values of the first kept position: what a network with these masks computes from them is
    multiplied by zero, and so must be finite, which a variance of zero might not make it.

    Args:
        structure: The dense one.
        state: As of `cut_state`.

    Raises:
        PruneError: A tensor has another shape than the network without the removed units; or as
            `removed_axes`.
    """
    lost = removed_axes(structure, kept_U)
    expanded = {}
    for name, tensor in state.items():
        axes = lost.get(name, {})
        if name in structure.shapes:
            _check_shape(name, tensor, _cut_shape(structure.shapes[name], axes))
        is_parameter = name in structure.bytes_per_weight
        expanded[name] = _expand(tensor, axes, is_parameter=is_parameter) if axes else tensor
    return expanded


@torch.no_grad()
def _expand(tensor: Tensor, axes: Axes, *, is_parameter: bool) -> Tensor:
    wide = tensor.detach()
    for dim, kept in axes.items():
        source = np.where(kept, np.cumsum(kept) - 1, 0)
        wide = wide.index_select(dim, torch.from_numpy(source).to(wide.device))
        if is_parameter:
            pruned = torch.from_numpy(np.flatnonzero(~kept)).to(wide.device)
            wide.index_fill_(dim, pruned, 0)
    return _formatted(wide, tensor)


def expand_optimizer(
    structure: Structure, kept_U: np.ndarray, model: nn.Module, optimizer: Optimizer
) -> dict[str, Any]:
    """Returns an optimizer's state dict with its moments in dense shapes, zero where pruned.

    An optimizer of the dense network loads it.

    Args:
        structure: The dense one.
        model: The network without the removed units, which the optimizer trains.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    # A state dict numbers parameters through all groups.
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {}
    for number, own in state["state"].items():
        parameter = ordered[number]
        moments[number] = {
            key: expand_state(structure, kept_U, {names[parameter]: value})[names[parameter]]
            if isinstance(value, Tensor) and is_moment(value, parameter)
            else value
            for key, value in own.items()
        }
    return {**state, "state": moments}


def is_moment(value: Tensor, parameter: Tensor) -> bool:
    """Returns True if a tensor of an optimizer's state belongs to the weights one by one."""
    return value.shape == parameter.shape and value.ndim > 0


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise PruneError(
            f"'{name}': has {math.prod(tensor.shape)} values of shape {tuple(tensor.shape)}, and "
            f"these units need shape {shape}; give the tensors of the same network and units"
        )
