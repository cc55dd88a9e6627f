"""How far a mask depends on the examples that it was scored on.

One dense network is scored on several samples of calibration examples, each sample at growing
sizes, and a mask is made of each at once, without fine-tuning. Where two samples of a size lead to
the same mask, more examples would not change it. Samples are drawn by seed as a job draws its own,
and a larger one contains the smaller one of its seed, so a criterion that is one sum over batches
needs one pass for all sizes (`saliency.score_prefixes`).

Two masks overlap by the kept weights that they share over those that either keeps (IoU). Beside it
stands the overlap to be expected of masks that keep as many weights of each layer, drawn at random.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from torch import nn

from gbp_ray.config import JobConfig
from gbp_ray.pruning.batchnorm import recalibrate_as_asked
from gbp_ray.pruning.evaluation import evaluate
from gbp_ray.pruning.masks import MaskSet, prunable_parameters
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.pruning.saliency import score_prefixes
from gbp_ray.pruning.selection import select_masks
from gbp_ray.workload import Workload

__all__ = ["Overlap", "SizeStability", "compare_samples", "measure_overlap"]


@dataclass(frozen=True)
class Overlap:
    """How far several masks are the same.

    Attributes:
        pairs: The overlap of each pair.
        chance: The mean expected of random masks with the same layers' sparsities.
        by_layer: The mean over pairs of each layer.
    """

    pairs: tuple[float, ...]
    chance: float
    by_layer: dict[str, float]

    @property
    def mean(self) -> float:
        """Over pairs."""
        return statistics.fmean(self.pairs)


@dataclass(frozen=True)
class SizeStability:
    """What a number of calibration examples gives.

    Attributes:
        examples: The number.
        between: Masks of this size, one per sample, against each other.
        to_largest: Each against the masks of the largest size of the other samples.
        accuracies: Of the network under each mask, not fine-tuned; empty where not asked for.
    """

    examples: int
    between: Overlap
    to_largest: tuple[float, ...]
    accuracies: tuple[float, ...]


def compare_samples(
    job: JobConfig,
    workload: Workload,
    model: nn.Module,
    sizes: Sequence[int],
    seeds: Sequence[int],
    ranks: Ranks,
    *,
    is_evaluated: bool = False,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[SizeStability]:
    """Scores a network on samples of growing size and compares the masks, on one rank.

    Args:
        job: Its criterion, sparsity and scope make the masks.
        model: The dense network; left as it was.
        sizes: Numbers of examples; those beyond what the data has are cut to it.
        seeds: One sample each; at least two.
        is_evaluated: Measures the accuracy under each mask, with BatchNorm as the job has it.
        tell: Called with (what is done, steps done, steps in all).

    Raises:
        PruneError: A score is not finite, or a mask is impossible.
    """
    assert len(seeds) > 1, "one sample has nothing to be compared with"
    units = prunable_parameters(model, job.prune.exclude)
    input_dims = {unit.name: unit.input_dim for unit in units}
    dense = MaskSet.dense(units)
    masks: dict[int, list[MaskSet]] = {}
    accuracies: dict[int, list[float]] = {}
    for seed in seeds:

        def tell_scoring(done: int, total: int, seed: int = seed) -> None:
            tell(f"sample {seed}: scoring", done, total)

        for size, scores in score_prefixes(
            model, units, workload, job.prune, sizes, seed=seed, tell=tell_scoring
        ):
            chosen = select_masks(scores, dense, job.prune, job.prune.sparsity, input_dims, ranks)
            masks.setdefault(size, []).append(chosen.masks)
            if is_evaluated:
                accuracy = _evaluate(job, workload, model, chosen.masks, ranks)
                accuracies.setdefault(size, []).append(accuracy)
                tell(f"sample {seed}: accuracy with {size} examples", 1, 1)
    largest = masks[max(masks)]
    return [
        SizeStability(
            examples=size,
            between=measure_overlap(found),
            to_largest=tuple(
                found[one].overlap(largest[other])
                for one, other in permutations(range(len(found)), 2)
            ),
            accuracies=tuple(accuracies.get(size, ())),
        )
        for size, found in sorted(masks.items())
    ]


def measure_overlap(masks: Sequence[MaskSet]) -> Overlap:
    """Compares each pair of masks.

    Raises:
        PruneError: They are not of the same parameters.
    """
    pairs, chances = [], []
    layers: dict[str, list[float]] = {}
    for one, other in combinations(masks, 2):
        pairs.append(one.overlap(other))
        both = either = 0.0
        for name, mask in one.items():
            kept, kept_other = int(mask.sum()), int(other[name].sum())
            shared = int((mask & other[name]).sum())
            union = kept + kept_other - shared
            layers.setdefault(name, []).append(shared / union if union else 1.0)
            expected = kept * kept_other / mask.numel()
            both += expected
            either += kept + kept_other - expected
        chances.append(both / either if either else 1.0)
    return Overlap(
        tuple(pairs),
        statistics.fmean(chances),
        {name: statistics.fmean(values) for name, values in layers.items()},
    )


def _evaluate(
    job: JobConfig, workload: Workload, model: nn.Module, masks: MaskSet, ranks: Ranks
) -> float:
    twin = copy.deepcopy(model)
    masks.apply_(twin)
    recalibrate_as_asked(job, twin, workload, ranks)
    accuracy, _ = evaluate(twin, workload, ranks, job.workload.eval_batch_size)
    return accuracy
