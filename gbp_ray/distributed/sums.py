"""Sums over items of what is made of each item's gradients, folded in as the gradients arrive.

An item (a calibration batch, a part of a training batch) is computed whole on one rank. In its
backward pass each gradient is taken the moment it is complete, sent to the ranks that own its rows,
and freed, so that no rank holds the gradients of a whole network beside the sum. The owner folds
the rows of the turn's items one after another, in item order: the same bits on any number of ranks,
and on replicated and sharded networks (`slices` says who owns what).

Gradients travel in buckets of a fixed order (that of the parameters, turned round, since the last
layers' come first), never in the order of their arrival: which collectives come when is the same on
every rank, whatever a network does with an example.

Shape suffixes: L = weights of one slice, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gbp_ray.distributed.ranks import Ranks, all_gather
from gbp_ray.distributed.sharding import RankSlice, cut_rows, like_shard, local, local_slice
from gbp_ray.errors import PruneError

__all__ = [
    "Fold",
    "GradientReducer",
    "OrderedSum",
    "largest_exchange",
]

_BUCKET_BYTES = 2**22
"""Gradients below this travel together; above it, in blocks of as much."""

Fold = Callable[[Tensor, Tensor, float], Tensor]
"""(gradient_L, weight_L, factor of the item) -> what the item adds, (L,), element by element."""


class GradientReducer:
    """One sum per parameter, each rank keeping its slice of it.

    Args:
        parameters: What is summed over, by name.
        leaves: What autograd differentiates by, for each of the parameters (`sharding.leaves`).
        pieces: For each parameter its slices, in rank order.
        factors: One for each item, handed to `fold`.
        fold: What an item adds.
        dtype: Of the sums; None takes each parameter's own.
        is_sharded: A rank that fails then cannot go on alone, since others wait for its weights.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: Mapping[str, nn.Parameter],
        leaves: Mapping[str, nn.Parameter],
        pieces: Mapping[str, Sequence[RankSlice]],
        factors: Sequence[float],
        fold: Fold,
        dtype: torch.dtype | None = None,
        *,
        is_sharded: bool = False,
    ) -> None:
        self._ranks, self._fold, self._factors = ranks, fold, factors
        self._parameters, self._leaves, self._pieces = parameters, leaves, pieces
        self._is_sharded = is_sharded
        self._weights = {
            name: local_slice(parameter, pieces[name][ranks.rank])
            for name, parameter in parameters.items()
        }
        self._totals = {
            name: torch.zeros_like(weights_L, dtype=dtype or weights_L.dtype)
            for name, weights_L in self._weights.items()
        }
        self._buckets = _make_buckets(parameters)
        self._bucket_of = {n: number for number, names in enumerate(self._buckets) for n in names}
        self._next_item = 0
        self._failure: Exception | None = None
        self._counts = [
            self._weights[names[0]].new_zeros(len(names), dtype=torch.float32)
            for names in self._buckets
        ]
        self._arrived: dict[str, Tensor] = {}
        self._next_bucket = 0
        self._present = range(0)

    @contextmanager
    def listening(self) -> Iterator[GradientReducer]:
        """Takes the gradients of all backward passes in the block."""
        for leaf in self._leaves.values():
            leaf.grad = None
        hooks = [
            self._leaves[name].register_post_accumulate_grad_hook(self._taker(name))
            for name in self._parameters
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Adds one item of each rank; one without an item does nothing in the block. Communicates.

        A failure in the block is held back until the sum is taken, which all ranks reach; where the
        network is sharded, this rank hangs up and raises at once, as others wait inside the block.
        """
        num_present = min(self._ranks.world_size, len(self._factors) - self._next_item)
        assert num_present > 0, "more turns than items"
        self._present = range(self._next_item, self._next_item + num_present)
        self._next_item += num_present
        self._next_bucket, self._arrived = 0, {}
        try:
            yield
        except Exception as error:
            if self._is_sharded:
                self._ranks.abort()
            if self._is_sharded or self._ranks.world_size == 1:
                raise
            self._failure = self._failure or error
        self._send_ready(is_last=True)

    def so_far(self) -> dict[str, Tensor]:
        """Copies this rank's slices of the sums over the items whose turn has been."""
        return {name: total_L.clone() for name, total_L in self._totals.items()}

    def owned(self) -> dict[str, Tensor]:
        """Returns this rank's slices of the sums, (L,) by name. Communicates.

        Raises:
            Exception: What a turn failed with on any rank, as `Ranks.raise_on_all` says.
        """
        self._ranks.raise_on_all(self._failure)
        assert self._next_item == len(self._factors), "fewer turns than items"
        return self._totals

    def totals(self) -> dict[str, Tensor]:
        """Returns the sums shaped and spread like the parameters; fails as `owned`. Communicates.

        Of a replicated network every rank gets all of every sum.
        """
        totals = self.owned()
        if self._is_sharded:
            return {
                name: like_shard(totals[name].view_as(local(parameter.detach())), parameter)
                for name, parameter in self._parameters.items()
            }
        if self._ranks.world_size > 1:
            for bucket in self._buckets:
                self._gather(bucket)
        return {name: totals[name].view_as(self._parameters[name]) for name in self._parameters}

    def reached(self) -> set[str]:
        """Names the parameters that some item so far has had a gradient for, on any rank."""
        counts = torch.cat(self._counts).tolist()
        names = [name for bucket in self._buckets for name in bucket]
        return {name for name, count in zip(names, counts, strict=True) if count > 0}

    # -- one turn --------------------------------------------------------------------------------

    def _taker(self, name: str) -> Callable[[Tensor], None]:
        def take(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            if name in self._arrived or self._bucket_of[name] < self._next_bucket:
                raise PruneError(
                    f"the gradient of '{name}' comes in several pieces, as re-entrant "
                    "checkpointing makes it; use torch.utils.checkpoint with use_reentrant=False"
                )
            self._arrived[name] = gradient.detach()
            self._send_ready()

        return take

    def _send_ready(self, *, is_last: bool = False) -> None:
        """Sends the buckets that are complete, in their order; at the end all that are left."""
        while self._next_bucket < len(self._buckets):
            bucket = self._buckets[self._next_bucket]
            if not is_last and not all(name in self._arrived for name in bucket):
                return
            self._next_bucket += 1
            gradients = {name: self._arrived.pop(name, None) for name in bucket}
            arrived = self._counts[self._next_bucket - 1]
            if self._ranks.world_size == 1:
                arrived += arrived.new_tensor([g is not None for g in gradients.values()])
                self._add_own(gradients)
            else:
                self._exchange(gradients, arrived)

    @torch.no_grad()
    def _add_own(self, gradients: dict[str, Tensor | None]) -> None:
        for name, gradient in gradients.items():
            gradient_L = (
                torch.zeros_like(self._weights[name]) if gradient is None else gradient.reshape(-1)
            )
            self._add(name, 0, gradient_L, self._factors[self._present.start])

    def _add(self, name: str, start: int, gradient_L: Tensor, factor: float) -> None:
        stop = start + gradient_L.numel()
        weight_L = self._weights[name][start:stop]
        self._totals[name][start:stop] += self._fold(gradient_L, weight_L, factor)

    @torch.no_grad()
    def _exchange(self, gradients: dict[str, Tensor | None], arrived: Tensor) -> None:
        """Sends each owner its rows, block by block, and folds what the others send.

        With the first block go marks of the gradients that are there, added to `arrived`.
        """
        world, rank = self._ranks.world_size, self._ranks.rank
        pieces = {name: self._pieces[name] for name in gradients}
        some = self._weights[next(iter(gradients))]
        block = max(1, _BUCKET_BYTES // (some.element_size() * world))
        longest = {name: max(piece.size for piece in pieces[name]) for name in gradients}
        marks = some.new_tensor([gradient is not None for gradient in gradients.values()])
        for start in range(0, max(longest.values()), block):
            widths = {name: min(max(n - start, 0), block) for name, n in longest.items()}
            # All send and receive alike, padded to the longest slice.
            size = sum(widths.values())
            outgoing = some.new_zeros(world, size + (len(marks) if start == 0 else 0))
            outgoing[:, size:] = marks[: outgoing.shape[1] - size]
            for row, owner in zip(outgoing, range(world), strict=True):
                for (name, gradient), place in zip(
                    gradients.items(), row[:size].split(list(widths.values())), strict=True
                ):
                    piece = pieces[name][owner]
                    count = min(max(piece.size - start, 0), block)
                    if gradient is not None and count:
                        first = piece.start + start
                        place[:count] = gradient.reshape(-1)[first : first + count]
            incoming = torch.empty_like(outgoing)
            dist.all_to_all_single(incoming, outgoing)
            del outgoing
            for item, row in zip(self._present, incoming, strict=False):
                if start == 0:
                    arrived += row[size:].abs()
                for name, place in zip(
                    gradients, row[:size].split(list(widths.values())), strict=True
                ):
                    count = min(max(pieces[name][rank].size - start, 0), block)
                    if count:
                        self._add(name, start, place[:count], self._factors[item])

    @torch.no_grad()
    def _gather(self, bucket: Sequence[str]) -> None:
        """Replaces this rank's slices of a bucket's sums by the whole sums."""
        widths = [max(piece.size for piece in self._pieces[name]) for name in bucket]
        padded = self._totals[bucket[0]].new_zeros(sum(widths))
        for name, place in zip(bucket, padded.split(widths), strict=True):
            place[: self._totals[name].numel()] = self._totals[name]
        everywhere = padded.new_empty(self._ranks.world_size * padded.numel())
        all_gather(everywhere, padded)
        rows = [row.split(widths) for row in everywhere.view(self._ranks.world_size, -1)]
        for number, name in enumerate(bucket):
            self._totals[name] = torch.cat(
                [
                    row[number][: piece.size]
                    for row, piece in zip(rows, self._pieces[name], strict=True)
                ]
            )


def largest_exchange(parameters: Mapping[str, nn.Parameter], world_size: int) -> tuple[int, int]:
    """Computes, in bytes, what the largest bucket holds and what of it is on its way at a time.

    The latter is sent and received: twice a block, padded to the longest rows.
    """
    largest = sent = 0
    for bucket in _make_buckets(parameters):
        size = parameters[bucket[0]].element_size()
        block = max(1, _BUCKET_BYTES // (size * world_size))
        rows = [cut_rows(name, parameters[name].shape, world_size)[0].size for name in bucket]
        largest = max(largest, size * sum(parameters[name].numel() for name in bucket))
        sent = max(sent, size * world_size * sum(min(row, block) for row in rows))
    return largest, 2 * sent if world_size > 1 else 0


def _make_buckets(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Joins neighbours of one dtype into buckets, last parameters first."""
    buckets: list[list[str]] = []
    num_bytes, dtype = 0, None
    for name, parameter in reversed(list(parameters.items())):
        size = parameter.numel() * parameter.element_size()
        if not buckets or parameter.dtype is not dtype or num_bytes + size > _BUCKET_BYTES:
            buckets.append([])
            num_bytes, dtype = 0, parameter.dtype
        buckets[-1].append(name)
        num_bytes += size
    return buckets


class OrderedSum:
    """Adds one vector per item, in item order, each rank keeping the slice it owns.

    Attributes:
        num_items: How many items will be added over all ranks.

    Args:
        num_elements: N.
        dtype: Of the running sum.
        wire_dtype: Of the vectors as they are added and sent.
        bounds: W + 1 ascending positions; rank r owns those from the r-th up to the next. Equal
            shares by default.
    """

    def __init__(
        self,
        ranks: Ranks,
        num_elements: int,
        num_items: int,
        dtype: torch.dtype,
        wire_dtype: torch.dtype = torch.float32,
        bounds: list[int] | None = None,
    ) -> None:
        self._ranks = ranks
        self._wire_dtype = wire_dtype
        share = -(-num_elements // ranks.world_size)
        self._bounds = bounds or [
            min(rank * share, num_elements) for rank in range(ranks.world_size + 1)
        ]
        assert self._bounds[-1] == num_elements
        # All send and receive alike, padded to the longest share.
        self._slice_size = max(stop - start for start, stop in pairwise(self._bounds))
        self.num_items = num_items
        self._next_item = 0
        self._failure: Exception | None = None
        self._total_S = torch.zeros(self._slice_size, dtype=dtype, device=ranks.device)

    @contextmanager
    def attempt(self, *, communicates: bool = False) -> Iterator[None]:
        """Holds back a failure of this turn's work until the sum is taken, which all ranks reach.

        The rank adds nothing in its place: `add(None)`.

        Args:
            communicates: The work itself does, so a failure leaves others inside it.
        """
        try:
            yield
        except Exception as error:
            if communicates:
                self._ranks.abort()
            if communicates or self._ranks.world_size == 1:
                raise
            self._failure = self._failure or error

    def add(self, vector_N: Tensor | None) -> None:
        """Adds this turn's items; a rank without an item passes None. Communicates."""
        num_present = min(self._ranks.world_size, self.num_items - self._next_item)
        assert num_present > 0, "more turns than items"
        self._next_item += num_present
        if self._ranks.world_size == 1:
            assert vector_N is not None
            self._total_S += vector_N.to(self._wire_dtype)
            return
        for row_S in self._exchange(vector_N)[:num_present]:
            self._total_S += row_S

    def so_far(self) -> Tensor:
        """Copies this rank's share of the sum over the items that were added, shape (S,)."""
        start, stop = self._bounds[self._ranks.rank : self._ranks.rank + 2]
        return self._total_S[: stop - start].clone()

    def owned(self) -> Tensor:
        """Returns this rank's share of the sum, shape (S,). Communicates.

        Raises:
            Exception: What an attempt failed with on any rank, as `Ranks.raise_on_all` says.
        """
        self._ranks.raise_on_all(self._failure)
        assert self._next_item == self.num_items, "fewer turns than items"
        start, stop = self._bounds[self._ranks.rank : self._ranks.rank + 2]
        return self._total_S[: stop - start]

    def result(self) -> Tensor:
        """Returns the whole sum, shape (N,), on every rank; fails as `owned`. Communicates."""
        own = self.owned()
        if self._ranks.world_size == 1:
            return own
        whole = self._total_S.new_empty(self._slice_size * self._ranks.world_size)
        all_gather(whole, self._total_S)
        rows = whole.view(self._ranks.world_size, -1)
        sizes = [stop - start for start, stop in pairwise(self._bounds)]
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    def _exchange(self, vector_N: Tensor | None) -> Tensor:
        """Sends slice s of this rank's vector to rank s; returns (W, S), row r from rank r."""
        world = self._ranks.world_size
        outgoing = torch.zeros(
            world, self._slice_size, dtype=self._wire_dtype, device=self._ranks.device
        )
        if vector_N is not None:
            for row, (start, stop) in zip(outgoing, pairwise(self._bounds), strict=True):
                row[: stop - start] = vector_N[start:stop]
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing)
        return incoming
