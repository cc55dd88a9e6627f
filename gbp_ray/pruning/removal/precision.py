"""A network in float64 for a while, its own tensors untouched.

Two networks that compute the same may differ in float32 by what their layers make of its rounding.
In float64 that is gone, or far smaller where code of the network falls back to float32, as norms of
language models do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gbp_ray.pruning.removal.caches import Run

__all__ = ["in_float64"]


@contextmanager
def in_float64(model: nn.Module, run: Run) -> Iterator[Run]:
    """Holds the float32 weights and buffers of a network in float64 in the block.

    Yields:
        `run` with inputs in float64 and outputs in float32. What the block puts in the place of
        parameters and buffers is float32 after it, and they themselves have the values that they
        had.
    """
    before = dict(_tensors_of(model))
    own = {t: t.data for t in before.values() if t.dtype == torch.float32}
    wide = {name for name, tensor in before.items() if tensor.dtype == torch.float64}
    del before

    def widened(network: nn.Module) -> Any:
        hook = network.register_forward_pre_hook(
            lambda _, given, named: _converted((given, named), torch.float32, torch.float64),
            with_kwargs=True,
        )
        try:
            return _converted(run(network), torch.float64, torch.float32)
        finally:
            hook.remove()

    try:
        for tensor, values in own.items():
            tensor.data = values.double()
        yield widened
    finally:
        for tensor, values in own.items():
            tensor.data = values
        for name, tensor in _tensors_of(model):
            if tensor.dtype == torch.float64 and name not in wide:
                tensor.data = tensor.data.float()


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _converted(tree: Any, before: torch.dtype, after: torch.dtype) -> Any:
    def convert(leaf: Any) -> Any:
        is_one = isinstance(leaf, Tensor) and leaf.dtype == before
        return leaf.to(after) if is_one else leaf

    return tree_map(convert, tree)
