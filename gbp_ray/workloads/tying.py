"""Layers that share one weight: a job ties layers of an existing network by name.

Names are those of the network itself, without what wraps it.

The weights of the layers of a group become one parameter, that of the first of them in the
network's order, under its name. From there on it is one weight like any other: differentiated
through all its uses, scored, masked, stored and counted once; only its multiply-adds count for each
use. Biases and norms stay each layer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gbp_ray.config.schema import match_names, nearest_glob
from gbp_ray.errors import ConfigError
from gbp_ray.workloads.contract import TRANSPOSED, WEIGHT_LAYERS

__all__ = [
    "find_shared_memory",
    "tie_weights",
    "unwrapped",
    "with_tied_weights",
    "without_wrappers",
]


def with_tied_weights(
    build_model: Callable[[], nn.Module], groups: Sequence[Sequence[str]]
) -> Callable[[], nn.Module]:
    """Returns a builder whose every model has its layers tied; without groups the builder itself.

    Args:
        groups: As for `tie_weights`.
    """
    if not groups:
        return build_model

    def build_tied() -> nn.Module:
        model = build_model()
        # Whoever builds checks first that this is a network.
        if isinstance(model, nn.Module):
            tie_weights(model, groups)
        return model

    return build_tied


def without_wrappers(build_model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Returns a builder whose models have no wrappers of `torch.compile` or data-parallelism.

    Wrappers put parts of their own into every name, and hide the network from what takes it apart.
    A module that was compiled in place (`module.compile()`) has its own names and stays compiled.
    """

    def build_plain() -> nn.Module:
        model = unwrapped(build_model())
        for module in list(model.modules()) if isinstance(model, nn.Module) else ():
            for name, child in module._modules.items():
                module._modules[name] = unwrapped(child)
        return model

    return build_plain


def unwrapped(module: Any) -> Any:
    """Returns the module inside wrappers of `torch.compile` and data-parallelism."""
    while isinstance(module, nn.Module):
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]
        elif isinstance(module, (DataParallel, DistributedDataParallel)):
            module = module.module
        else:
            break
    return module


def find_shared_memory(model: nn.Module) -> tuple[str, str] | None:
    """Finds two parameters of which some numbers lie in the same place, by name."""
    spans = []
    for name, parameter in model.named_parameters():
        if parameter.layout is not torch.strided or parameter.is_meta or not parameter.numel():
            continue
        sides = zip(parameter.shape, parameter.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in sides) * parameter.element_size()
        # What wraps other tensors has no memory of its own.
        if start := parameter.data_ptr():
            spans.append((start, start + last, name, parameter))
    spans.sort(key=lambda span: span[:2])
    group: list[tuple[str, nn.Parameter]] = []
    end = -1
    for start, last, name, parameter in spans:
        if start > end:
            group = []
        # Columns of one matrix lie between each other and do not meet.
        for other, earlier in group:
            if parameter.dtype != earlier.dtype or _meet(parameter, earlier):
                return other, name
        group.append((name, parameter))
        end = max(end, last)
    return None


def _meet(one: nn.Parameter, other: nn.Parameter) -> bool:
    return bool(torch.isin(_places(one), _places(other)).any())


def _places(parameter: nn.Parameter) -> Tensor:
    places = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(parameter.shape, parameter.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(size) * stride
    start = parameter.data_ptr() // parameter.element_size()
    return places.flatten() + start


def tie_weights(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Gives the layers of each group one weight, in place.

    Args:
        groups: Each the names of convolutions and linear layers, such as "layer1.0.conv2", or globs
            of them.

    Raises:
        ConfigError: A name or a glob matches no layer, a group has one layer alone, a layer is in
            two groups, or the weights of a group differ in shape or meaning. Nothing is tied.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, WEIGHT_LAYERS)}
    group_of: dict[str, Sequence[str]] = {}
    tied: list[list[str]] = []
    for group in groups:
        chosen: set[str] = set()
        for pattern in group:
            found = match_names(pattern, layers)
            if not found:
                raise _fault(
                    group,
                    f"'{pattern}' matches no convolution or linear layer"
                    f"{nearest_glob(pattern, layers)}",
                )
            chosen.update(found)
        names = [name for name in layers if name in chosen]
        if len(names) < 2:
            raise _fault(group, f"'{names[0]}' is alone; name two layers or more")
        for name in names:
            if name in group_of:
                raise _fault(group, f"'{name}' is in {list(group_of[name])}, too; join the two")
            group_of[name] = group
        _check_alike(group, {name: layers[name] for name in names})
        tied.append(names)
    for first, *others in tied:
        for name in others:
            layers[name].weight = layers[first].weight


def _check_alike(group: Sequence[str], layers: dict[str, nn.Module]) -> None:
    (first, pattern), *_ = layers.items()
    for name, layer in layers.items():
        if not isinstance(layer.weight, nn.Parameter):
            raise _fault(
                group,
                f"the weight of '{name}' is computed from other tensors (by torch.nn.utils.prune "
                "or a parametrization); make it a plain parameter first",
            )
        assert isinstance(pattern.weight, nn.Parameter)
        if isinstance(layer, TRANSPOSED) != isinstance(pattern, TRANSPOSED):
            raise _fault(
                group, f"one of '{first}' and '{name}' is a transposed convolution; leave it out"
            )
        own, other = tuple(pattern.weight.shape), tuple(layer.weight.shape)
        if own != other:
            raise _fault(group, f"'{first}' has shape {own} and '{name}' {other}; leave one out")


def _fault(group: Sequence[str], what: str) -> ConfigError:
    return ConfigError(f"workload.tie: in {list(group)} {what}")
