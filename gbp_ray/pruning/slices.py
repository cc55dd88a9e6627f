"""Which weights a rank owns: of every layer a stretch of whole rows, cut as FSDP2 cuts it.

Row i of a layer is all that belongs to its output i. Rank r owns the r-th of W equal chunks of the
rows (the last may be short, or empty), so what a rank owns of a layer is one `Slice`, n:m groups
stay whole, and a replicated network and a sharded one are decided over alike. Where the inputs come
first (transposed convolutions) n:m groups run through all rows: such a layer of a replicated
network is owned whole, by rank 0.

Shape suffixes: N = weights of all layers, flat, in name order and C order; L = weights of one
slice, flat; S = all that a rank owns, flat, layer after layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gbp_ray.pruning.masks import Prunable
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.pruning.sharding import is_shard, local

__all__ = ["Layout", "Slice", "SlicedScores", "cut_rows", "owned"]


@dataclass(frozen=True)
class Slice:
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
) -> list[Slice]:
    """Cuts a layer into a slice for each rank, in rank order.

    Args:
        is_whole: Leaves it to rank 0.
    """
    shape = tuple(shape)
    num_rows = 1 if is_whole or not shape else shape[0]
    row = math.prod(shape) // max(num_rows, 1)
    chunk = -(-num_rows // world_size)
    ends = [min(rank * chunk, num_rows) * row for rank in range(world_size + 1)]
    return [Slice(name, shape, start, stop) for start, stop in pairwise(ends)]


def owned(tensor: Tensor, piece: Slice) -> Tensor:
    """Looks at what a slice covers of a whole layer or of this rank's shard of it; flat, (L,)."""
    tensor = tensor.detach()
    if is_shard(tensor):
        return local(tensor).reshape(-1)
    return tensor.reshape(-1)[piece.start : piece.stop]


class Layout:
    """Who owns what of all prunable weights.

    Args:
        units: In flat order.

    Attributes:
        by_rank: For each rank its slices, one of each layer.
    """

    def __init__(self, units: Sequence[Prunable], ranks: Ranks) -> None:
        cuts = [
            cut_rows(
                unit.name,
                unit.parameter.shape,
                ranks.world_size,
                is_whole=unit.input_dim == 0 and not is_shard(unit.parameter),
            )
            for unit in units
        ]
        self.by_rank = [tuple(cut[rank] for cut in cuts) for rank in range(ranks.world_size)]
        self._rank = ranks.rank
        self._sizes = [unit.parameter.numel() for unit in units]

    @property
    def own(self) -> tuple[Slice, ...]:
        """This rank's slices."""
        return self.by_rank[self._rank]

    @property
    def num_weights(self) -> int:
        """N, over all ranks."""
        return sum(self._sizes)

    @property
    def bounds(self) -> list[int]:
        """W + 1 positions: where each rank's weights begin in a vector that goes rank by rank."""
        ends = [0]
        for pieces in self.by_rank:
            ends.append(ends[-1] + sum(piece.size for piece in pieces))
        return ends

    def by_owner(self, vector_N: Tensor) -> Tensor:
        """Puts a flat vector into rank order: all that rank 0 owns, then rank 1, and so on."""
        if len(self.by_rank) == 1:
            return vector_N
        layers = vector_N.split(self._sizes)
        return torch.cat(
            [
                layer[piece.start : piece.stop]
                for pieces in self.by_rank
                for layer, piece in zip(layers, pieces, strict=True)
            ]
        )

    def by_layer(self, vector_N: Tensor) -> Tensor:
        """Undoes `by_owner`."""
        if len(self.by_rank) == 1:
            return vector_N
        parts = [
            stretch.split([piece.size for piece in pieces])
            for stretch, pieces in zip(
                vector_N.split([sum(p.size for p in pieces) for pieces in self.by_rank]),
                self.by_rank,
                strict=True,
            )
        ]
        return torch.cat([part[layer] for layer in range(len(self._sizes)) for part in parts])

    def split_own(self, vector_S: Tensor) -> dict[str, Tensor]:
        """Cuts what this rank owns into layers, by name."""
        pieces = vector_S.split([piece.size for piece in self.own])
        return {piece.name: values for piece, values in zip(self.own, pieces, strict=True)}


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

    def gather(self, ranks: Ranks) -> dict[str, Tensor]:
        """Puts all scores together on every rank, for looking at them. Communicates."""
        parts = ranks.gather_objects([value.cpu() for value in self.values])
        return {
            piece.name: torch.cat([part[number] for part in parts]).view(piece.shape)
            for number, piece in enumerate(self.slices)
        }
