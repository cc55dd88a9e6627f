"""BatchNorm's running statistics, re-estimated after pruning, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gbp_ray.config.job import JobConfig
from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import is_sharded
from gbp_ray.distributed.sums import OrderedSum
from gbp_ray.workloads.batch import forward
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import cut_batches, derive_seed, shuffled_indices, take_batch

__all__ = [
    "keeping_statistics",
    "norm_batch_size",
    "recalibrate_as_asked",
    "recalibrate_batchnorm",
    "running_statistics",
]


def norm_batch_size(prune: PruneConfig) -> int:
    """Returns the examples per batch: as many as in scoring, but at least 32."""
    return max(prune.calibration_batch_size, 32)


def recalibrate_as_asked(job: JobConfig, model: nn.Module, workload: Workload, ranks: Ranks) -> int:
    """Re-estimates running statistics as a job configures it. Communicates.

    Returns:
        Examples used; 0 where the job asks for none, or the model has no running statistics.
    """
    if not job.prune.norm_examples:
        return 0
    return recalibrate_batchnorm(
        model,
        workload,
        ranks,
        examples=job.prune.norm_examples,
        batch_size=norm_batch_size(job.prune),
        seed=job.seed,
    )


@contextmanager
def keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Restores running statistics after the block, bit for bit."""
    before = [(statistic, statistic.clone()) for statistic in running_statistics(model)]
    try:
        yield
    finally:
        for statistic, value in before:
            statistic.copy_(value)


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    *,
    examples: int,
    batch_size: int,
    seed: int,
) -> int:
    """Re-estimates BatchNorm's running statistics on training examples, augmented as in training.

    Pruning shifts the inputs of each layer, and stale statistics by themselves can cost most of the
    accuracy. Statistics of clean images cost some as well: 2.5 points for a CIFAR-10 ResNet-20,
    whose weights were trained with those of augmented ones. Running mean and variance become the
    means of the batch statistics over batches and over a module's calls. Communicates.

    Returns:
        Examples used; 0 where the model has no running statistics.
    """
    norms = _find_norms(model)
    available = num_examples(workload.train)
    examples = min(examples, available)
    # One example has no variance over a batch.
    batches = [b for b in cut_batches(examples, batch_size) if len(b) > 1]
    if not norms or not batches:
        return 0
    chosen = shuffled_indices(available, derive_seed(seed, "batchnorm"))[:examples]
    statistics = _statistics(norms)
    momenta = [norm.momentum for norm in norms]
    wire_dtype = torch.promote_types(statistics[0].dtype, torch.float32)
    sums = OrderedSum(
        ranks, sum(s.numel() for s in statistics), len(batches), torch.float64, wire_dtype
    )
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the statistics of the last batch only
    for item in ranks.deal(len(batches)):
        vector: Tensor | None = None
        number = 0 if item is None and is_sharded(model) else item
        if number is not None:
            batch = batches[number]
            indices = chosen[batch.start : batch.stop]
            draws = derive_seed(seed, "batchnorm", number)
            with sums.attempt(communicates=is_sharded(model)):
                seen = take_batch(
                    workload, workload.train, indices, device=ranks.device, augment_seed=draws
                )
                with isolated(model, derive_seed(draws, "forward")), _averaged_over_calls(norms):
                    forward(model, workload, seen)
                    vector = torch.cat([s.reshape(-1) for s in statistics]) * len(batch)
        sums.add(None if item is None else vector)
    total = sum(len(batch) for batch in batches)
    means = (sums.result() / total).split([s.numel() for s in statistics])
    for statistic, mean in zip(statistics, means, strict=True):
        statistic.copy_(mean.view_as(statistic))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    return total


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Lists the running means and variances of a network."""
    return _statistics(_find_norms(model))


def _find_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _statistics(norms: Iterable[_BatchNorm]) -> list[Tensor]:
    return [s for n in norms for s in (n.running_mean, n.running_var) if s is not None]


@contextmanager
def _averaged_over_calls(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Averages the running statistics over a module's calls in the block.

    With a momentum of 1 they would be those of the last call. A single call keeps its bits.
    """
    means: dict[_BatchNorm, tuple[int, list[Tensor]]] = {}

    def note(norm: nn.Module, inputs: object, outputs: object) -> None:
        assert isinstance(norm, _BatchNorm)
        own = _statistics([norm])
        calls, earlier = means.get(norm, (0, own))
        if calls:
            for statistic, mean in zip(own, earlier, strict=True):
                statistic.lerp_(mean, calls / (calls + 1))
        means[norm] = calls + 1, [statistic.clone() for statistic in own]

    hooks = [norm.register_forward_hook(note) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
