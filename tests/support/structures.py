"""Networks with structures written by hand, for tests of what is done with them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.pruning.structure import Axis, Group, Product, Slice, Structure

Part = tuple[str, int, np.ndarray]
"""(tensor, axis, positions of each unit (G, K))."""


def blocks(num_units: int, per_unit: int = 1, start: int = 0) -> np.ndarray:
    """Returns positions of units that lie one after another, (G, K)."""
    return np.arange(start, start + num_units * per_unit).reshape(num_units, per_unit)


def repeated(num_units: int, times: int, per_unit: int = 1) -> np.ndarray:
    """Returns positions of units that lie in each of several stretches, as those of gates do."""
    stretch = num_units * per_unit
    return np.concatenate([blocks(num_units, per_unit, i * stretch) for i in range(times)], axis=1)


def structure_of(model: nn.Module, *groups: Sequence[Part], kind: str = "channel") -> Structure:
    """Makes the structure of a network; costs count each weight once."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    made = []
    for parts in groups:
        slices = tuple(Slice(name, dim, at, "out" if dim == 0 else "in") for name, dim, at in parts)
        made.append(Group(parts[0][0], kind, len(parts[0][2]), slices))  # type: ignore[arg-type]
    products = []
    for name, parameter in model.named_parameters():
        axes = []
        for dim, length in enumerate(parameter.shape):
            each = [
                (number, part.positions.shape[1])
                for number, group in enumerate(made)
                for part in group.slices
                if (part.name, part.dim) == (name, dim)
            ]
            fixed = length - sum(n * made[number].num_units for number, n in each)
            axes.append(Axis(fixed, tuple(each)))
        products.append(Product(1, tuple(axes), name))
    return Structure(
        groups=tuple(made),
        macs=tuple(product for product in products if len(product.axes) > 1),
        weights=tuple(products),
        bytes_per_weight={n: p.element_size() for n, p in model.named_parameters()},
        shapes={part.name: tuple(tensors[part.name].shape) for g in made for part in g.slices},
    )


def kept(structure: Structure, *removed: Sequence[int]) -> np.ndarray:
    """Keeps all units but these, which are numbered within each group."""
    parts = []
    for group, gone in zip(structure.groups, removed, strict=True):
        parts.append(np.ones(group.num_units, dtype=bool))
        parts[-1][list(gone)] = False
    return np.concatenate(parts)


@torch.no_grad()
def mask(model: nn.Module, structure: Structure, kept_U: np.ndarray) -> dict[str, Tensor]:
    """Zeroes the removed units of a network; returns the masks of its parameters."""
    parameters = dict(model.named_parameters())
    masks = structure.masks(kept_U, parameters)
    for name, own in masks.items():
        parameters[name].masked_fill_(~own, 0)
    return masks


class Case(NamedTuple):
    """A network, a batch for it, its structure, and the units that stay.

    Attributes:
        expected: Some attributes of the smaller network by dotted path.
    """

    model: nn.Module
    inputs: Tensor
    structure: Structure
    kept_U: np.ndarray
    expected: Mapping[str, Any]


def randomize(model: nn.Module) -> nn.Module:
    """Draws all weights and statistics, so that no norm is the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def channels(name: str, width: int, *, norm: str = "", statistics: bool = False) -> list[Any]:
    """Lists what makes the channels of a layer: weight, bias, and a norm behind it."""
    names = [f"{name}.weight", f"{name}.bias"]
    if norm:
        names += [f"{norm}.weight", f"{norm}.bias"]
    if statistics:
        names += [f"{norm}.running_mean", f"{norm}.running_var"]
    return [(one, 0, blocks(width)) for one in names]


class Named(nn.Module):
    """Calls layers one after another; flattens before a linear one."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            if isinstance(layer, nn.Linear) and x.ndim > 3:
                x = x.flatten(1)
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Measures a difference against the greatest magnitude."""
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-9))


def train(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor, masks: Mapping[str, Tensor], steps: int
) -> None:
    """Trains towards fixed numbers; pruned weights stay zero, and so does what is kept for them."""
    model.train()
    for _ in range(steps):
        outputs = model(inputs)
        goal = torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)
        ((outputs - goal) ** 2).mean().backward()
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.grad.masked_fill_(~masks[name], 0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter.masked_fill_(~masks[name], 0)
                    for value in optimizer.state[parameter].values():
                        if isinstance(value, Tensor) and value.shape == parameter.shape:
                            value.masked_fill_(~masks[name], 0)


def linear() -> Case:
    """Two linear layers."""
    model = Named(a=nn.Linear(5, 7), act=nn.GELU(), b=nn.Linear(7, 3))
    structure = structure_of(model, [*channels("a", 7), ("b.weight", 1, blocks(7))])
    keep = kept(structure, [1, 4])
    return Case(
        model, torch.randn(6, 5), structure, keep, {"a.out_features": 5, "b.in_features": 5}
    )


def recurrent(kind: type[nn.RNNBase], gates: int) -> Case:
    """A stack of two recurrent layers on an embedding."""
    model = Named(table=nn.Embedding(9, 5), rnn=kind(5, 4, 2, batch_first=True), fc=nn.Linear(4, 3))
    rows = [f"rnn.{which}_{layer}" for which in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            for layer in ("l0", "l1")]  # fmt: skip
    parts = [(name, 0, repeated(4, gates)) for name in rows]
    parts += [(f"rnn.{name}", 1, blocks(4)) for name in ("weight_hh_l0", "weight_hh_l1")]
    parts += [("rnn.weight_ih_l1", 1, blocks(4)), ("fc.weight", 1, blocks(4))]
    inside = [("table.weight", 1, blocks(5)), ("rnn.weight_ih_l0", 1, blocks(5))]
    structure = structure_of(model, parts, inside)
    expected = {"rnn.hidden_size": 3, "rnn.input_size": 3, "fc.in_features": 3}
    keep = kept(structure, [1], [0, 1])
    return Case(model, torch.randint(9, (4, 6)), structure, keep, expected)


def compacted_twin(case: Case, **options: Any) -> nn.Module:
    """Copies a case's network without the removed units."""
    twin = copy.deepcopy(case.model)
    remove_units(twin, case.structure, case.kept_U, lambda model: model(case.inputs), **options)
    return twin


def check_compacts(
    model: nn.Module, structure: Structure, keep: np.ndarray, inputs: Tensor, **options: Any
) -> Mapping[str, Any]:
    """Draws a network's weights, removes units, and holds it against what it was when masked."""
    randomize(model)
    mask(model, structure, keep)
    expected = model.eval()(inputs)
    found = remove_units(model, structure, keep, lambda m: m(inputs), **options)
    assert largest_difference(expected, model(inputs)) <= 1e-6
    assert found.difference <= 1e-6
    return found.attributes
