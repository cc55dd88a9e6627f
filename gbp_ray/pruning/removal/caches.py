"""Tensors that modules keep beside their parameters and buffers, and make anew when they are gone.

Such as timm's attention biases, which eval mode gathers once and keeps in a plain dict. They are
made of weights, so that after a cut they are stale, and in a graph they would pass for constants.
Whether a tensor is one of them is tried: it is taken away, and a pass through the network must put
one like it in its place. What a pass does not bring back was set by hand, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gbp_ray.distributed.ranks import isolated
from gbp_ray.workloads.contract import in_mode

__all__ = ["Cache", "Run", "drop_caches", "find_caches"]

Run = Callable[[nn.Module], Any]
"""Passes one batch, always the same, through a network; returns its outputs."""

_OWN = frozenset({"_parameters", "_buffers", "_modules"})


@dataclass(frozen=True)
class Cache:
    """A place in a module that a pass fills.

    Attributes:
        path: Of the module.
        name: Of the attribute; the tensor itself, or a dict or list of tensors.
    """

    path: str
    name: str


def find_caches(model: nn.Module, run: Run) -> tuple[Cache, ...]:
    """Finds the places that passes in eval mode leave alone, and fill once they are emptied.

    What every pass writes anew, as states are, needs no care.

    Args:
        model: After a pass, which has filled the places.
        run: Passes a batch through it.

    Returns:
        Those places, empty now. All others hold what they held.
    """
    held = list(_held(model))
    if not held:
        return ()
    before = [_tensors_in(_value_of(model, cache)) for cache in held]
    try:
        _pass(model, run)
    except Exception:  # noqa: BLE001 - what cannot pass, as on the meta device, shows nothing
        return ()
    held = [
        cache
        for cache, tensors in zip(held, before, strict=True)
        if list(map(id, tensors)) == list(map(id, _tensors_in(_value_of(model, cache))))
    ]
    caches = _try(model, run, held)
    if len(caches) < len(held):
        # One that cannot be empty may have kept others from being made.
        kinds: dict[tuple[type, str], list[Cache]] = {}
        for cache in held:
            if cache not in caches:
                kind = type(model.get_submodule(cache.path)), cache.name
                kinds.setdefault(kind, []).append(cache)
        if len(kinds) > 1:
            caches += tuple(c for some in kinds.values() for c in _try(model, run, some))
    drop_caches(model, caches)
    return caches


def drop_caches(model: nn.Module, caches: Iterable[Cache]) -> None:
    """Empties such places, so that the next pass fills them."""
    for cache in caches:
        own = vars(model.get_submodule(cache.path))
        if cache.name in own:
            own[cache.name] = _emptied(own[cache.name])


def _held(model: nn.Module) -> Iterator[Cache]:
    """Yields the attributes that hold tensors which are no parameters or buffers."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.modules."):
            continue
        for name, value in vars(module).items():
            tensors = [] if name in _OWN else _tensors_in(value)
            if tensors and not any(id(tensor) in known for tensor in tensors):
                yield Cache(path, name)


def _tensors_in(value: Any) -> list[Tensor]:
    """Lists the tensors of an attribute that holds nothing else; lists and dicts one level deep."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) is dict:
        value = list(value.values())
    if type(value) is list and value and all(isinstance(inner, Tensor) for inner in value):
        return value
    return []


def _emptied(value: Any) -> Any:
    return type(value)() if isinstance(value, dict | list) else None


def _value_of(model: nn.Module, cache: Cache) -> Any:
    return vars(model.get_submodule(cache.path)).get(cache.name)


def _pass(model: nn.Module, run: Run) -> None:
    with in_mode(model, is_training=False), isolated(model, 0), torch.no_grad():
        run(model)


def _try(model: nn.Module, run: Run, held: Sequence[Cache]) -> tuple[Cache, ...]:
    """Empties some places and passes; returns those that are filled alike, restores the others."""
    before = [_value_of(model, cache) for cache in held]
    drop_caches(model, held)
    try:
        _pass(model, run)
        found = [
            cache
            for cache, old in zip(held, before, strict=True)
            if _is_like(old, _value_of(model, cache))
        ]
    except Exception:  # noqa: BLE001 - a network may raise anything without what it needs
        found = []
    for cache, old in zip(held, before, strict=True):
        if cache not in found:
            vars(model.get_submodule(cache.path))[cache.name] = old
    return tuple(found)


def _is_like(old: Any, new: Any) -> bool:
    mine, theirs = _tensors_in(old), _tensors_in(new)
    if type(old) is not type(new) or len(mine) != len(theirs):
        return False
    return all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        for a, b in zip(mine, theirs, strict=True)
    )
