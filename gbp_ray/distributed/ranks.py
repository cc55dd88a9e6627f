"""One rank among W: who takes which item, and sums whose bits do not depend on W.

A floating-point sum depends on its order, and an all-reduce adds in an order of its own. Here an
item (a calibration batch, a part of a training batch) is computed whole on one rank, and the items'
vectors are added one after another in item order, each rank adding for its own slice of the vector.
So 1, 2, 3 or 4 ranks give the same bits, and each rank sends what a reduce-scatter would send.

Shape suffixes: N = elements of a flat vector, W = ranks, S = elements of the longest share.

Every method that communicates says so; all ranks must call those in the same order. What runs a
user's code may fail on one rank alone, so it runs as `run_collectively` or as an `OrderedSum.attempt`: both
turn a failure on one rank into a failure on all, which keeps that order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.errors import ConfigError, GbpError, PruneError, TrialError, in_one_line
from gbp_ray.workloads.data import seeded

__all__ = [
    "Ranks",
    "all_gather",
    "buffer_slots",
    "checksum",
    "fixed_kernels",
    "isolated",
    "own_device",
]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the workers of a trial; with one rank nothing is communicated."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device | None = None) -> Ranks:
        """Reads rank and world size from torch.distributed, or stands alone without it."""
        device = device or torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def deal(self, num_items: int) -> Iterator[int | None]:
        """Deals items 0..num_items-1: rank r takes r, r+W, ...; None where a rank runs out.

        Every rank gets the same number of turns, so a collective after each turn lines up.
        """
        for start in range(0, num_items, self.world_size):
            item = start + self.rank
            yield item if item < num_items else None

    def all_reduce_disjoint(self, values: Tensor) -> Tensor:
        """Combines vectors in which each element was filled by one rank and is zero on the others.

        Exact: every sum has one non-zero term. Communicates.
        """
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def run_collectively(
        self, action: Callable[[], Result], *, communicates: bool = False
    ) -> Result:
        """Runs `action` on this rank; if it fails on any rank, all raise as `raise_on_all` says.

        Args:
            communicates: The action itself does, so a failure leaves others inside it: see `abort`.

        Communicates.
        """
        failure: Exception | None = None
        result: Result | None = None
        try:
            result = action()
        except Exception as error:
            if communicates:
                self.abort()
                raise
            failure = error
        self.raise_on_all(failure)
        return result  # type: ignore[return-value]

    @property
    def has_left(self) -> bool:
        """Whether this rank has hung up on the others; see `abort`."""
        return self.world_size > 1 and not dist.is_initialized()

    def abort(self) -> None:
        """Hangs up on the other ranks, which then fail instead of waiting for this one.

        For a rank that cannot go on in the middle of what all do together, before it raises. Gloo
        does not tell everybody always: of four processes one or two went on waiting after about one
        kill in a hundred (torch 2.13), until their time limit.
        """
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def raise_on_all(self, failure: Exception | None) -> None:
        """Raises on every rank what any rank failed with, so that none waits for one that is gone.

        A rank that fails alone cannot simply raise. Between two gloo processes the other one is
        told within 0.3 s of an exit, but where the process stays, it waits for the whole timeout.
        Ray Train keeps the process of a worker that returned its `GbpError`, and sets half an hour.
        Agreeing costs one all-reduce of an integer, 0.4 ms between two processes of one busy
        machine. Communicates.

        Raises:
            GbpError: The first one, by rank, on every rank.
            TrialError: Without one, the first other failure in words; the rank itself raises what
                it met, which Ray may answer by starting the workers again.
        """
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return
        has_failed = torch.tensor(failure is not None, dtype=torch.int32, device=self.device)
        dist.all_reduce(has_failed)
        if not has_failed.item():
            return
        told: list[GbpError | None] = [None] * self.world_size
        dist.all_gather_object(told, self.in_words(failure))
        known = [error for error in told if error is not None]
        first = next((e for e in known if not isinstance(e, TrialError)), known[0])
        if isinstance(first, TrialError) and failure is not None:
            raise failure
        raise first

    def in_words(self, failure: Exception | None) -> GbpError | None:
        """Turns what may not survive pickling into an error that does."""
        if failure is None or isinstance(failure, GbpError):
            return failure
        cause = in_one_line(failure)
        return TrialError(
            f"worker {self.rank} failed with {cause}", trial_id="", rank=self.rank, cause=cause
        )

    def check_agreement(self, digest: str, what: str) -> None:
        """Makes sure that all ranks hold the same `what`. Communicates.

        Raises:
            PruneError: On every rank, naming the ranks that differ from rank 0.
        """
        if self.world_size == 1:
            return
        digests: list[str] = [""] * self.world_size
        dist.all_gather_object(digests, digest)
        strays = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if strays:
            raise PruneError(
                f"{what} differs between workers: ranks {strays} disagree with rank 0; "
                "the workers run different code, data or hardware"
            )

    def all_reduce_counts(self, counts: Tensor) -> Tensor:
        """Adds integer counts of all ranks, in place; exact in any order. Communicates."""
        assert counts.dtype is torch.int64
        if self.world_size > 1:
            on_device = counts.to(self.device)
            dist.all_reduce(on_device)
            counts.copy_(on_device)
        return counts

    def all_gather_objects(self, value: Result) -> list[Result]:
        """Hands every rank's small object to all, in rank order. Communicates."""
        if self.world_size == 1:
            return [value]
        values: list[Result | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def gather_bytes(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Hands every rank's uint8 vector to all, in rank order, as it is. Communicates.

        Args:
            sizes: Of the vectors of all ranks.
        """
        if self.world_size == 1:
            return [part]
        longest = max(sizes)
        padded = part.to(self.device)
        if part.numel() < longest:
            padded = torch.cat([padded, padded.new_zeros(longest - part.numel())])
        # NumPy asks for large pages, which are sooner there than many small ones.
        whole = torch.from_numpy(np.empty(self.world_size * longest, np.uint8)).to(self.device)
        all_gather(whole, padded)
        rows = whole.view(self.world_size, -1).cpu()
        return [row[:size] for row, size in zip(rows, sizes, strict=True)]

    def broadcast_object(self, value: Result) -> Result:
        """Hands rank 0's small object to all ranks. Communicates."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """Makes what a model does in the block depend on nothing that ran before it on this rank.

    Random numbers are drawn from `seed`, and buffers that a forward pass changes (running
    statistics, counters) are put back. Without this an item would depend on the rank's other items.
    """
    slots = buffer_slots(model)
    before = [buffer.clone() for _, _, buffer in slots]
    try:
        with seeded(seed):
            yield
    finally:
        with torch.no_grad():
            for (owner, name, buffer), value in zip(slots, before, strict=True):
                owner[name] = buffer
                if buffer.shape != value.shape:
                    buffer.resize_(value.shape)
                buffer.copy_(value)


def buffer_slots(model: nn.Module) -> list[tuple[dict[str, Tensor | None], str, Tensor]]:
    """Lists (where it is kept, its name there, the buffer): a forward pass may bind a new tensor.

    A tied buffer is listed at each of its places.
    """
    return [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def checksum(values: Tensor) -> int:
    """Adds up the bits of a tensor, to see whether it was written to."""
    values = values.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(values.contiguous().view(kinds[values.element_size()]).sum())


@functools.cache
def _all_gather_function() -> Callable[[Tensor, Tensor], object]:
    # torch 2.13 renamed the call and warns about the old name.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    function: Callable[[Tensor, Tensor], object] = getattr(dist, name)
    return function


def all_gather(whole: Tensor, part: Tensor) -> None:
    """Fills `whole`, (W * S,), with every rank's `part`, (S,), in rank order. Communicates."""
    _all_gather_function()(whole, part)


def check_cuda() -> None:
    """Refuses a GPU that this machine does not have.

    Raises:
        ConfigError: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "cluster.use_gpu = true: this machine has no CUDA device; set it to false or give "
            "cluster.address"
        )


def own_device(job: JobConfig) -> torch.device:
    """Finds where this process computes.

    Raises:
        ConfigError: The job wants a GPU, and there is none.
    """
    if not job.cluster.use_gpu:
        return torch.device("cpu")
    check_cuda()
    # Started now: weights that a workload draws on it before would know nothing of the seed.
    torch.cuda.init()
    return torch.device("cuda")


@contextmanager
def fixed_kernels(num_threads: int) -> Iterator[None]:
    """Pins what changes the order of additions inside a kernel, and puts it back.

    On a GPU the kernels of cuDNN; some others of torch's, such as the backward passes of fused
    attention and of adaptive pooling to sizes that do not divide, add in any order there.
    """
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    before = cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(num_threads)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = before
