"""Sums over items, added in item order: the same bits on any number of ranks.

An item (a calibration batch, a microbatch) is computed whole on one rank. `OrderedSum` adds one
flat vector per item. `GradientReducer` takes each gradient of a backward pass the moment it is
complete, sends it to the ranks that own its rows and frees it, so that no rank holds the gradients
of a whole network in addition to the sum. The owner adds the rows of each turn's items one after
another, in item order, for replicated and sharded networks alike.

Gradients travel in buckets of a fixed order (parameters from last to first, as the last layers'
gradients come first), never in the order of their arrival. So every rank calls the same
collectives, whatever a network does with an example.

Shape suffixes: N = elements of a flat vector, W = ranks, S = elements of the longest slice of one,
L = weights of one layer in one rank's slice, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import RankSlice, cut_rows, local, local_slice, shard_from_rows
from gbp_ray.errors import PruneError

__all__ = ["Fold", "GradientReducer", "OrderedSum", "in_blocks", "largest_exchange"]

_BUCKET_BYTES = 2**22
"""Gradients below this travel together; above it, in blocks of as much."""

_CACHED = 2**16
"""Elements of a block whose intermediate results stay in a core's cache."""

Fold = Callable[[Tensor, Tensor, float], Tensor]
"""(gradient_L, weight_L, factor of the item) -> what the item adds, (L,), element by element."""


def in_blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields vectors of one length block by block, for chains of operations element by element.

    With 65 million weights, three operations on whole vectors take three times as long as on
    blocks: each writes new memory, which the next one reads back. On a GPU starting an operation
    would take longer than the block, so there it is one.
    """
    if len(vectors[0]) <= _CACHED or vectors[0].device.type != "cpu":
        yield vectors
    else:
        yield from zip(*(vector.split(_CACHED) for vector in vectors), strict=True)


class _Turns:
    """The turns of a sum, in each of which every rank takes one item; holds back failures."""

    def __init__(self, ranks: Ranks, num_items: int) -> None:
        self._ranks, self._num_items = ranks, num_items
        self._next_item = 0
        self._failure: Exception | None = None

    @contextmanager
    def attempt(self, *, communicates: bool = False) -> Iterator[None]:
        """Holds back a failure in the block until the sum is taken, which all ranks reach.

        Args:
            communicates: The block itself does, so others wait inside it: aborts and raises.
        """
        try:
            yield
        except Exception as error:
            if communicates:
                self._ranks.abort()
            if communicates or self._ranks.world_size == 1:
                raise
            self._failure = self._failure or error

    def _take_items(self) -> range:
        """Starts a turn; returns its items, rank 0's first."""
        first = self._next_item
        self._next_item = min(first + self._ranks.world_size, self._num_items)
        assert first < self._next_item, "more turns than items"
        return range(first, self._next_item)

    def _finish(self) -> None:
        self._ranks.raise_on_all(self._failure)
        assert self._next_item == self._num_items, "fewer turns than items"


class GradientReducer(_Turns):
    """One sum per parameter, each rank keeping its slice of it.

    Args:
        leaves: Tensors that autograd differentiates by, by parameter name (`sharding.leaves`).
        slices: For each parameter its slices, in rank order.
        factors: One for each item, handed to `fold`.
        fold: Computes what an item adds.
        dtype: Of the sums; None takes each parameter's own.
        is_sharded: Others wait for the weights of a rank that fails, so it raises at once.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: Mapping[str, nn.Parameter],
        leaves: Mapping[str, nn.Parameter],
        slices: Mapping[str, Sequence[RankSlice]],
        factors: Sequence[float],
        fold: Fold,
        dtype: torch.dtype | None = None,
        *,
        is_sharded: bool = False,
    ) -> None:
        super().__init__(ranks, len(factors))
        self._fold, self._factors = fold, factors
        self._parameters, self._leaves, self._slices = parameters, leaves, slices
        self._is_sharded = is_sharded
        self._weights = {
            name: local_slice(parameter, slices[name][ranks.rank])
            for name, parameter in parameters.items()
        }
        self._totals = {
            name: torch.zeros_like(weights_L, dtype=dtype or weights_L.dtype)
            for name, weights_L in self._weights.items()
        }
        self._buckets = _make_buckets(parameters)
        self._bucket_of = {n: number for number, names in enumerate(self._buckets) for n in names}
        # How many items had a gradient, by bucket and parameter.
        self._counts = [
            self._weights[names[0]].new_zeros(len(names), dtype=torch.float32)
            for names in self._buckets
        ]
        self._arrived: dict[str, Tensor] = {}
        self._next_bucket = 0
        self._items = range(0)

    @contextmanager
    def listening(self) -> Iterator[GradientReducer]:
        """Takes the gradients of all backward passes in the block."""
        for leaf in self._leaves.values():
            leaf.grad = None
        hooks = [
            self._leaves[name].register_post_accumulate_grad_hook(self._make_hook(name))
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

        A failure in the block is handled as by `attempt`.
        """
        self._items = self._take_items()
        self._next_bucket, self._arrived = 0, {}
        with self.attempt(communicates=self._is_sharded):
            yield
        self._send_ready(is_last=True)

    def so_far(self) -> dict[str, Tensor]:
        """Copies this rank's slices of the sums over the items of all turns so far."""
        return {name: total_L.clone() for name, total_L in self._totals.items()}

    def owned(self) -> dict[str, Tensor]:
        """Returns this rank's slices of the sums, (L,) by name. Communicates.

        Raises:
            Exception: What a turn failed with on any rank, as `Ranks.raise_on_all` says.
        """
        self._finish()
        return self._totals

    def totals(self) -> dict[str, Tensor]:
        """Returns the sums shaped and sharded like the parameters; fails as `owned`. Communicates.

        Of a replicated network every rank gets all of every sum.
        """
        totals = self.owned()
        if self._is_sharded:
            return {
                name: shard_from_rows(totals[name].view_as(local(parameter.detach())), parameter)
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

    def _make_hook(self, name: str) -> Callable[[Tensor], None]:
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
            if gradient is None:
                gradient = torch.zeros_like(self._weights[name])
            self._add(name, 0, gradient.reshape(-1), self._factors[self._items.start])

    def _add(self, name: str, start: int, gradient_L: Tensor, factor: float) -> None:
        stop = start + gradient_L.numel()
        weight_L = self._weights[name][start:stop]
        for total, gradient, weight in in_blocks(
            self._totals[name][start:stop], gradient_L, weight_L
        ):
            total += self._fold(gradient, weight, factor)

    @torch.no_grad()
    def _exchange(self, gradients: dict[str, Tensor | None], arrived: Tensor) -> None:
        """Sends each owner its rows, block by block, and folds what the others send.

        The first block carries marks of the gradients that exist, which are added to `arrived`.
        """
        world, rank = self._ranks.world_size, self._ranks.rank
        some = self._weights[next(iter(gradients))]
        block = max(1, _BUCKET_BYTES // (some.element_size() * world))
        longest = {name: max(s.size for s in self._slices[name]) for name in gradients}
        marks = some.new_tensor([gradient is not None for gradient in gradients.values()])
        for start in range(0, max(longest.values()), block):
            # All send and receive alike, padded to the longest slice.
            widths = {name: min(max(n - start, 0), block) for name, n in longest.items()}
            size = sum(widths.values())
            outgoing = some.new_zeros(world, size + (len(marks) if start == 0 else 0))
            outgoing[:, size:] = marks[: outgoing.shape[1] - size]
            for owner, row in enumerate(outgoing):
                for name, first, place_L in self._places(row[:size], widths, owner, start):
                    gradient = gradients[name]
                    if gradient is not None:
                        place_L[:] = gradient.reshape(-1)[first : first + place_L.numel()]
            incoming = torch.empty_like(outgoing)
            dist.all_to_all_single(incoming, outgoing)
            del outgoing
            for item, row in zip(self._items, incoming, strict=False):
                if start == 0:
                    arrived += row[size:].abs()
                for name, _, place_L in self._places(row[:size], widths, rank, start):
                    self._add(name, start, place_L, self._factors[item])

    def _places(
        self, row: Tensor, widths: Mapping[str, int], owner: int, start: int
    ) -> Iterator[tuple[str, int, Tensor]]:
        """Yields, of one rank's row of a block: name, position of its first weight, its values."""
        for name, place in zip(widths, row.split(list(widths.values())), strict=True):
            rank_slice = self._slices[name][owner]
            count = min(max(rank_slice.size - start, 0), widths[name])
            if count:
                yield name, rank_slice.start + start, place[:count]

    @torch.no_grad()
    def _gather(self, bucket: Sequence[str]) -> None:
        """Replaces this rank's slices of a bucket's sums by the whole sums."""
        sizes = [
            [self._slices[n][rank].size for n in bucket] for rank in range(self._ranks.world_size)
        ]
        own = torch.cat([self._totals[name] for name in bucket])
        gathered = self._ranks.all_gather_vectors(own, [sum(of_rank) for of_rank in sizes])
        rows = [row.split(of_rank) for row, of_rank in zip(gathered, sizes, strict=True)]
        for number, name in enumerate(bucket):
            self._totals[name] = torch.cat([row[number] for row in rows])


def largest_exchange(parameters: Mapping[str, nn.Parameter], world_size: int) -> tuple[int, int]:
    """Computes the bytes of the largest bucket, and of the largest exchange, sent and received."""
    largest = sent = 0
    for bucket in _make_buckets(parameters):
        size = parameters[bucket[0]].element_size()
        block = max(1, _BUCKET_BYTES // (size * world_size))
        rows = [cut_rows(name, parameters[name].shape, world_size)[0].size for name in bucket]
        largest = max(largest, size * sum(parameters[name].numel() for name in bucket))
        sent = max(sent, size * world_size * sum(min(row, block) for row in rows))
    return largest, 2 * sent if world_size > 1 else 0


def _make_buckets(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Groups neighbours of one dtype into buckets, last parameters first."""
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


class OrderedSum(_Turns):
    """Adds one vector per item, in item order, each rank keeping the slice it owns.

    Args:
        num_elements: N.
        dtype: Of the running sum.
        wire_dtype: Of the vectors as they are added and sent.
        bounds: W + 1 ascending positions; rank r owns those from the r-th up to the next. Equal
            slices by default.
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
        super().__init__(ranks, num_items)
        self._wire_dtype = wire_dtype
        size = -(-num_elements // ranks.world_size)
        self._bounds = bounds or [
            min(rank * size, num_elements) for rank in range(ranks.world_size + 1)
        ]
        assert self._bounds[-1] == num_elements
        self._sizes = [stop - start for start, stop in pairwise(self._bounds)]
        self._total = torch.zeros(self._sizes[ranks.rank], dtype=dtype, device=ranks.device)

    def add(self, vector_N: Tensor | None) -> None:
        """Adds this turn's items; a rank that has none, or failed, passes None. Communicates."""
        items = self._take_items()
        if self._ranks.world_size == 1:
            assert vector_N is not None
            self._total += vector_N.to(self._wire_dtype)
            return
        # All send and receive alike, padded to the longest slice: row r goes to rank r.
        shape = self._ranks.world_size, max(self._sizes)
        outgoing = torch.zeros(shape, dtype=self._wire_dtype, device=self._ranks.device)
        if vector_N is not None:
            for row_S, (start, stop) in zip(outgoing, pairwise(self._bounds), strict=True):
                row_S[: stop - start] = vector_N[start:stop]
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing)
        for row_S in incoming[: len(items)]:
            self._total += row_S[: self._total.numel()]

    def so_far(self) -> Tensor:
        """Copies this rank's slice of the sum over the items that were added."""
        return self._total.clone()

    def owned(self) -> Tensor:
        """Returns this rank's slice of the sum. Communicates.

        Raises:
            Exception: What an attempt failed with on any rank, as `Ranks.raise_on_all` says.
        """
        self._finish()
        return self._total

    def result(self) -> Tensor:
        """Returns the whole sum, shape (N,), on every rank; fails as `owned`. Communicates."""
        slices = self._ranks.all_gather_vectors(self.owned(), self._sizes)
        return torch.cat(slices) if len(slices) > 1 else slices[0]
