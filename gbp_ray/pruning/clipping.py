"""The norm of a whole network's gradient, the same bits on any number of workers, and clipping.

A sum of squares depends on its order, and on how a kernel cuts it up. Here squares are added in
float64 by halving: the second half of a row is added to its first, element by element, until one
number is left. Element-wise addition has one result on any machine, whatever the shape. Rows are
summed one by one, so a rank that holds some rows of a layer gets the same sums for them as one that
holds all; the sums of rows are then put together on every rank and halved in turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gbp_ray.pruning.ranks import Ranks
from gbp_ray.pruning.sharding import is_shard, local
from gbp_ray.pruning.slices import cut_rows

__all__ = ["clip_gradients", "gradient_norm"]


@torch.no_grad()
def clip_gradients(gradients: Iterable[Tensor], max_norm: float, ranks: Ranks) -> float:
    """Scales gradients in place where their common norm exceeds `max_norm`; returns the norm.

    Communicates where they are shards.
    """
    gradients = list(gradients)
    norm = gradient_norm(gradients, ranks)
    if norm > max_norm:
        for gradient in gradients:
            local(gradient).mul_(max_norm / norm)
    return norm


@torch.no_grad()
def gradient_norm(gradients: Iterable[Tensor], ranks: Ranks) -> float:
    """Computes the Euclidean norm over all gradients. Communicates where they are shards."""
    sums = [_sums_of_rows(gradient, ranks) for gradient in gradients]
    return math.sqrt(_halve(torch.cat(sums).view(1, -1)).item()) if sums else 0.0


def _sums_of_rows(gradient: Tensor, ranks: Ranks) -> Tensor:
    """Sums the squares of each row, (rows,), on every rank."""
    rows = local(gradient)
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    num_rows = rows.shape[0] if rows.ndim else 1
    squares = rows.to(torch.float64, copy=True).square_()
    own = _halve(squares.view(num_rows, -1)) if rows.numel() else squares.new_zeros(num_rows)
    if not is_shard(gradient):
        return own
    piece = cut_rows("", gradient.shape, ranks.world_size)[ranks.rank]
    everywhere = own.new_zeros(gradient.shape[0])
    first = piece.start // max(1, math.prod(gradient.shape[1:]))
    everywhere[first : first + len(own)] = own
    return ranks.fill_in(everywhere)


def _halve(values: Tensor) -> Tensor:
    """Adds up along the second axis, in place: (R, C) -> (R,)."""
    while (width := values.shape[1]) > 1:
        half = (width + 1) // 2
        values[:, : width - half] += values[:, half:]
        values = values[:, :half]
    return values.reshape(-1)
