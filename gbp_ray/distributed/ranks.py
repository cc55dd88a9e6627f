"""One rank among W: deals items, exchanges small values, turns one failure into a failure of all.

Every method that communicates says so; all ranks must call those in the same order. A user's code
may fail on one rank only, so it runs under `run_collectively` or `OrderedSum.attempt`: both turn a
failure on one rank into a failure on all, which keeps that order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.config.job import JobConfig
from gbp_ray.errors import ConfigError, GbpError, PruneError, TrialError, in_one_line
from gbp_ray.workloads.data import seeded

__all__ = [
    "Ranks",
    "buffer_slots",
    "check_cuda",
    "check_devices",
    "checksum",
    "empty_vector",
    "fixed_kernels",
    "isolated",
    "own_device",
]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among the workers of a trial; one rank communicates nothing."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device | None = None) -> Ranks:
        """Reads rank and world size from torch.distributed; without it the world is one rank."""
        device = device or torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    @property
    def is_first(self) -> bool:
        """Returns True on rank 0, which writes for all."""
        return self.rank == 0

    def deal(self, num_items: int) -> Iterator[int | None]:
        """Deals items 0..num_items-1: rank r takes r, r+W, ...; None where it has none left.

        All ranks get equally many turns, so they can communicate after each.
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
            communicates: The action itself does, so others wait inside it: aborts and raises.

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
        """Returns True once this rank has called `abort`."""
        return self.world_size > 1 and not dist.is_initialized()

    def abort(self) -> None:
        """Closes the connection to the other ranks, which then fail instead of waiting.

        For a rank that fails between collectives, before it raises. Gloo does not always notify all
        others: of four processes one or two went on waiting after about one kill in a hundred
        (torch 2.13), until their timeout.
        """
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def raise_on_all(self, failure: Exception | None) -> None:
        """Raises on every rank what any rank failed with, so that none waits for one that is gone.

        If only the failing rank raised, the others would wait for the whole timeout, half an hour,
        as Ray Train keeps the process of a worker that returned a `GbpError`. The all-reduce of an
        integer takes 0.4 ms between two processes of one busy machine. Communicates.

        Raises:
            GbpError: The first one, by rank, on every rank.
            TrialError: Without one, the first other failure as text; the failing rank raises the
                original, and Ray may then restart the workers.
        """
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return
        has_failed = torch.tensor(failure is not None, dtype=torch.int32, device=self.device)
        dist.all_reduce(has_failed)
        if not has_failed.item():
            return
        known = [e for e in self.all_gather_objects(self.in_words(failure)) if e is not None]
        first = next((e for e in known if not isinstance(e, TrialError)), known[0])
        if isinstance(first, TrialError) and failure is not None:
            raise failure
        raise first

    def in_words(self, failure: Exception | None) -> GbpError | None:
        """Turns a failure that may not survive pickling into one that does."""
        if failure is None or isinstance(failure, GbpError):
            return failure
        cause = in_one_line(failure)
        return TrialError(
            f"worker {self.rank} failed with {cause}", trial_id="", rank=self.rank, cause=cause
        )

    def check_agreement(self, digest: str, what: str) -> None:
        """Checks that all ranks hold the same `what`. Communicates.

        Raises:
            PruneError: On every rank, naming the ranks that differ from rank 0.
        """
        digests = self.all_gather_objects(digest)
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
        """Gathers a small object from every rank, in rank order. Communicates."""
        if self.world_size == 1:
            return [value]
        values: list[Result | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def all_gather_vectors(self, vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Gathers a flat vector from every rank, in rank order. Communicates.

        Args:
            sizes: Of the vectors of all ranks.
        """
        if self.world_size == 1:
            return [vector]
        padded = vector.to(self.device)
        if len(padded) < max(sizes):
            padded = torch.cat([padded, padded.new_zeros(max(sizes) - len(padded))])
        whole = empty_vector(self.world_size * len(padded), padded.dtype, self.device)
        # torch 2.13 renamed the function and warns about the old name.
        if hasattr(dist, "all_gather_single"):
            dist.all_gather_single(whole, padded)
        else:
            dist.all_gather_into_tensor(whole, padded)
        rows = whole.view(self.world_size, -1)
        return [row[:size] for row, size in zip(rows, sizes, strict=True)]

    def broadcast_object(self, value: Result) -> Result:
        """Broadcasts a small object from rank 0. Communicates."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """Draws random numbers from `seed` in the block, and restores the model's buffers after it.

    Otherwise the results for one item would depend on the items that this rank computed before.
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
    """Lists (owning dict, name, buffer), as a forward pass may bind a new tensor to the name.

    A tied buffer is listed for each of its owners.
    """
    return [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def checksum(values: Tensor) -> int:
    """Sums the bits of a tensor, to detect writes."""
    values = values.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(values.contiguous().view(kinds[values.element_size()]).sum())


def empty_vector(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocates a flat tensor; on the host through NumPy, which asks for large pages."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size * dtype.itemsize, np.uint8)).view(dtype)


def check_cuda() -> None:
    """Raises ConfigError if this machine has no CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "cluster.use_gpu = true: this machine has no CUDA device; set it to false or give "
            "cluster.address"
        )


def check_devices(cluster: ClusterConfig) -> None:
    """Raises ConfigError if this machine has fewer CUDA devices than the job has workers."""
    check_cuda()
    num_devices = torch.cuda.device_count()
    if num_devices < cluster.min_workers:
        raise ConfigError(
            f"cluster.num_workers = {json.dumps(cluster.num_workers)}: each needs a CUDA "
            f"device, and this machine has {num_devices}; lower it or give cluster.address"
        )


def own_device(job: JobConfig) -> torch.device:
    """Returns the device that this process computes on; raises as `check_cuda`."""
    if not job.cluster.use_gpu:
        return torch.device("cpu")
    check_cuda()
    # Weights that a workload draws on the GPU follow the seed only once CUDA is initialised.
    torch.cuda.init()
    return torch.device("cuda")


@contextmanager
def fixed_kernels(num_threads: int) -> Iterator[None]:
    """Fixes the number of threads and the kernels of cuDNN, which decide the order of additions.

    Some other kernels on a GPU, such as the backward passes of fused attention and of adaptive
    pooling to sizes that do not divide, still add in any order.
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
