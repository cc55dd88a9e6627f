"""Who owns which scores: each rank a stretch of the flat vector, and nobody all of them.

The flat vector of all prunable weights (name order, then C order) is cut into one stretch per rank,
at the start of a row wherever that is possible, so that n:m groups stay whole. A rank's stretch
crosses layers; what it has of one layer is a `Slice`. Ranks follow each other in flat order.

Shape suffixes: N = prunable weights, flat; L = weights of one slice, flat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gbp_ray.pruning.masks import Prunable
from gbp_ray.pruning.ranks import Ranks

__all__ = ["Slice", "SlicedScores", "cut_flat", "flat_stretch"]


@dataclass(frozen=True)
class Slice:
    """Weights `start` to `stop` of one layer, flat in C order; empty where they are equal."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SlicedScores:
    """This rank's share of the scores: for each layer a slice, possibly empty, and its values (L,).

    Over all ranks the slices of a layer cover it once, in rank order.
    """

    slices: tuple[Slice, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def whole(cls, scores: Mapping[str, Tensor]) -> SlicedScores:
        """Takes scores of all layers, shaped like the weights, as one rank's share."""
        names = sorted(scores)
        slices = tuple(
            Slice(name, tuple(scores[name].shape), 0, scores[name].numel()) for name in names
        )
        return cls(slices, tuple(scores[name].reshape(-1) for name in names))

    @classmethod
    def cut(cls, stretch: Tensor, units: Sequence[Prunable], start: int) -> SlicedScores:
        """Cuts a rank's stretch of the flat vector, which begins at `start`, into layers."""
        slices, values, offset = [], [], 0
        for unit in units:
            size = unit.parameter.numel()
            first = min(max(start - offset, 0), size)
            last = min(max(start + stretch.numel() - offset, first), size)
            slices.append(Slice(unit.name, tuple(unit.parameter.shape), first, last))
            values.append(stretch[offset + first - start : offset + last - start])
            offset += size
        return cls(tuple(slices), tuple(values))

    def gather(self, ranks: Ranks) -> dict[str, Tensor]:
        """Puts all scores together on every rank, for looking at them. Communicates."""
        parts = ranks.gather_objects([value.cpu() for value in self.values])
        return {
            piece.name: torch.cat([part[number] for part in parts]).view(piece.shape)
            for number, piece in enumerate(self.slices)
        }


def cut_flat(units: Sequence[Prunable], world_size: int) -> list[int]:
    """Cuts the flat vector into stretches of nearly equal size that end where a row ends.

    A row is all weights of one output; where the inputs come first (transposed convolutions), the
    layer stays whole, since its n:m groups run through all of it.

    Returns:
        W + 1 ascending positions: rank r owns those from the r-th up to the next.
    """
    total = sum(unit.parameter.numel() for unit in units)
    bounds = [0]
    offsets = []
    offset = 0
    for unit in units:
        size = unit.parameter.numel()
        row = size if unit.input_dim == 0 else max(1, math.prod(unit.parameter.shape[1:]))
        offsets.append((offset, offset + size, row))
        offset += size
    for rank in range(1, world_size):
        wanted = rank * total // world_size
        start, _, row = next(o for o in offsets if wanted < o[1] or o[1] == total)
        bounds.append(max(bounds[-1], start + round((wanted - start) / row) * row))
    return [*bounds, total]


def flat_stretch(tensors: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Copies positions start to stop of the tensors' flat concatenation, and no more of it."""
    pieces, offset = [tensors[0].new_empty(0)], 0
    for tensor in tensors:
        first, last = max(start - offset, 0), min(stop - offset, tensor.numel())
        if first < last:
            pieces.append(tensor.detach().reshape(-1)[first:last])
        offset += tensor.numel()
    return torch.cat(pieces)
