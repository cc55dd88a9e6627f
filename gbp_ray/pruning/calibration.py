"""The batches that scores are computed on: calibration examples, or what each rank is given.

Either way they are items 0, 1, ... of one sequence, which is the same on any number of ranks, and
each knows how many items of the loss (examples, tokens, ...) it is a mean over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import leaves
from gbp_ray.errors import WorkloadError
from gbp_ray.pruning.units import Prunable
from gbp_ray.training.loss import counts_of
from gbp_ray.workloads.batch import Batch, size_of
from gbp_ray.workloads.checks import blaming_batch, blaming_labels
from gbp_ray.workloads.contract import Workload, in_mode, num_examples
from gbp_ray.workloads.data import cut_batches, derive_seed, shuffled_indices, take_batch
from gbp_ray.workloads.losses import count_items

__all__ = ["Calibration", "Given", "scoring_mode", "take_calibration"]


def take_calibration(
    workload: Workload,
    config: PruneConfig,
    seed: int,
    ranks: Ranks,
    batches: Sequence[Batch] | None = None,
) -> Calibration | Given:
    """Cuts the calibration examples into batches, or takes this rank's `batches`. Communicates.

    Raises:
        WorkloadError: No example has a label that counts, or ranks give unequally many batches.
    """
    if batches is None:
        return Calibration(workload, config, seed, ranks)
    return Given(workload, batches, seed, ranks)


class Calibration:
    """The calibration examples, cut into batches that depend only on the job."""

    def __init__(self, workload: Workload, config: PruneConfig, seed: int, ranks: Ranks) -> None:
        self.workload, self.config, self.seed = workload, config, seed
        available = num_examples(workload.train)
        self.num_examples = min(config.calibration_examples, available)
        order = shuffled_indices(available, derive_seed(seed, "calibration"))
        cuts = cut_batches(self.num_examples, config.calibration_batch_size)
        self.batches = [order[cut.start : cut.stop] for cut in cuts]
        counts = counts_of(workload, order[: self.num_examples], ranks)
        self.counts = None if counts is None else counts.split([len(cut) for cut in cuts])
        # The number of items that the loss of each batch is a mean over.
        self.items = [
            len(cut) if self.counts is None else self.counts[number].sum().item()
            for number, cut in enumerate(cuts)
        ]
        if sum(self.items) == 0:
            raise WorkloadError(
                f"workload.train: none of {self.num_examples} calibration examples has a label "
                "that counts; raise prune.calibration_examples, or leave such examples out"
            )

    def draws(self, item: int) -> int:
        """Returns the seed of a batch's draws."""
        return derive_seed(self.seed, "calibration", "augment", item)

    def counts_in(self, item: int) -> Tensor | None:
        """Returns the items of each example of a batch, (B,); None where all are equal."""
        return None if self.counts is None else self.counts[item]

    @contextmanager
    def batch(self, model: nn.Module, item: int, device: torch.device) -> Iterator[Batch]:
        """Yields a batch; errors in the block that it may be to blame for name it."""
        indices = self.batches[item]
        with blaming_labels(self.workload, model, "train", indices):
            yield self._take(item, indices, device)

    @contextmanager
    def few(
        self, model: nn.Module, item: int, device: torch.device, rows: Sequence[int]
    ) -> Iterator[tuple[Batch, Sequence[int]]]:
        """Yields some examples of a batch as a batch, and which they are; blames as `batch`."""
        indices = self.batches[item][list(rows)]
        with blaming_labels(self.workload, model, "train", indices):
            yield self._take(item, indices, device), rows

    def single(self, item: int, device: torch.device, row: int) -> Batch:
        """Reads one example of a batch by itself."""
        return self._take(item, self.batches[item][row : row + 1], device)

    def _take(self, item: int, indices: Tensor, device: torch.device) -> Batch:
        return take_batch(
            self.workload,
            self.workload.train,
            indices,
            device=device,
            augment_seed=self.draws(item) if self.config.calibration_augment else None,
        )


class Given:
    """Batches that each rank has of its own, as calibration examples cut into batches.

    With W ranks, item k * W + r is the k-th batch of rank r.
    """

    def __init__(self, workload: Workload, given: Sequence[Batch], seed: int, ranks: Ranks) -> None:
        self.given, self.seed, self.world_size = given, seed, ranks.world_size
        sizes = [size_of(batch.targets) for batch in given]
        self.own_counts = ranks.run_collectively(
            lambda: [count_items(workload, batch.targets) for batch in given]
        )
        items = [
            float(size if counts is None else counts.sum())
            for size, counts in zip(sizes, self.own_counts, strict=True)
        ]
        everyone = ranks.all_gather_objects(list(zip(sizes, items, strict=True)))
        numbers = [len(of_rank) for of_rank in everyone]
        if len(set(numbers)) > 1 or not numbers[0]:
            raise WorkloadError(
                f"workload.train: the ranks give {', '.join(map(str, numbers))} batches; each must "
                "give as many as the others, and at least one"
            )
        in_turn = [of_rank[k] for k in range(numbers[0]) for of_rank in everyone]
        self.batches = [torch.arange(size) for size, _ in in_turn]
        self.items = [number for _, number in in_turn]
        if sum(self.items) == 0:
            raise WorkloadError("workload.train: holds no label that counts; give one that does")

    def draws(self, item: int) -> int:
        """Returns the seed of a batch's draws."""
        return derive_seed(self.seed, "given", item)

    def counts_in(self, item: int) -> Tensor | None:
        """Returns the items of each example of a batch, (B,); None where all are equal."""
        return self.own_counts[item // self.world_size]

    @contextmanager
    def few(
        self, model: nn.Module, item: int, device: torch.device, rows: Sequence[int]
    ) -> Iterator[tuple[Batch, Sequence[int]]]:
        """Yields some examples of a batch, from the first on, or all where they are packed."""
        size = len(self.batches[item])
        with self.batch(model, item, device) as batch:
            if size_of(batch.inputs) != size:
                yield batch, range(size)
            else:
                stop = max(rows) + 1
                yield batch.part(slice(0, stop), size), range(stop)

    def single(self, item: int, device: torch.device, row: int) -> Batch:
        """Takes one example of a batch by itself."""
        batch, size = self.given[item // self.world_size], len(self.batches[item])
        if size_of(batch.inputs) != size:
            raise WorkloadError(
                f"workload.train: {size} examples have {size_of(batch.inputs)} rows of inputs, and "
                "this criterion takes them one by one; choose one that reads gradients"
            )
        return batch.part(slice(row, row + 1), size).map(lambda tensor: tensor.to(device))

    @contextmanager
    def batch(self, model: nn.Module, item: int, device: torch.device) -> Iterator[Batch]:
        """Yields a batch; errors in the block that it may be to blame for name it."""
        batch = self.given[item // self.world_size].map(lambda tensor: tensor.to(device))
        with blaming_batch(batch):
            yield batch


@contextmanager
def scoring_mode(model: nn.Module, units: list[Prunable]) -> Iterator[None]:
    """Sets eval mode and kernels that can be differentiated twice in the block.

    Frozen weights are scored like the others, so they get a gradient here.
    """
    differentiated = leaves(model)
    scored = [tensor for unit in units for tensor in (unit.parameter, differentiated[unit.name])]
    frozen = [parameter for parameter in scored if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with in_mode(model, is_training=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
