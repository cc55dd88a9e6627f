"""A network in float64 for a while, and back to the bits that it had.

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

    Gradients of its parameters stay float32. After the block they all have the values that they
    had, and what was put in their places is float32.

    Yields:
        `run`, with the tensors that the network is given in float64.
    """
    before = dict(_tensors_of(model))
    own = {t: t.data for t in before.values() if t.dtype == torch.float32}
    wide = {name for name, tensor in before.items() if tensor.dtype == torch.float64}

    def widened(network: nn.Module) -> Any:
        hook = network.register_forward_pre_hook(
            lambda _, given, named: tree_map(_widen, (given, named)), with_kwargs=True
        )
        try:
            return run(network)
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
                gradient, tensor.grad = tensor.grad, None
                tensor.data = tensor.data.float()
                tensor.grad = None if gradient is None else gradient.float()


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _widen(leaf: Any) -> Any:
    is_one = isinstance(leaf, Tensor) and leaf.dtype == torch.float32
    return leaf.double() if is_one else leaf
