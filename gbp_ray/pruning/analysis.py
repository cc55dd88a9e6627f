"""Compares a pruned network with its dense original, and masks of several samples.

On the test split: which classes lose accuracy and which answers change (Hooker et al. 2019, arXiv
1911.05248, who call such examples pruning-identified exemplars); which parts of an input the right
answer depends on, by the gradient of its output (Simonyan et al. 2013, arXiv 1312.6034); and the
saliency of each layer before and after.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import copy_network
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.scoring import score, score_prefixes
from gbp_ray.pruning.selection import select_masks
from gbp_ray.pruning.units import Prunable, prunable_parameters
from gbp_ray.pruning.whole_units import WholeUnits, find_units
from gbp_ray.results.findings import ClassFinding, ExampleFinding, Findings, LayerSaliency
from gbp_ray.results.tensors import sum_shared
from gbp_ray.training.batchnorm import recalibrate_as_asked
from gbp_ray.training.evaluation import evaluate
from gbp_ray.training.network import unused_layers
from gbp_ray.training.progress import OnProgress, Progress, ignore_progress, with_changes
from gbp_ray.workloads.batch import Batch, forward, labels_of, logits_of
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import cut_batches, derive_seed, shuffled_indices, take_batch
from gbp_ray.workloads.metrics import metrics_of

__all__ = ["Overlap", "SizeStability", "compare_networks", "compare_samples", "measure_overlap"]

_NUM_CHANGED, _NUM_SAME = 9, 3
"""Examples that are shown as images."""

_NUM_GRADIENTS = 256
"""Examples of each kind that input gradients are compared on."""


def compare_networks(
    job: JobConfig,
    workload: Workload,
    dense: nn.Module,
    pruned: nn.Module,
    masks: MaskSet,
    ranks: Ranks,
    *,
    trial_id: str,
    round_number: int,
    on_progress: OnProgress = ignore_progress,
) -> Findings:
    """Compares a dense and a pruned network, on one rank.

    Args:
        masks: Of the pruned one.

    Raises:
        PruneError: A score is not finite.
    """
    left_out: list[str] = []
    criterion = job.prune.criterion
    if job.prune.spec.reads in ("nothing", "history"):
        left_out.append(f"saliency by {criterion}, which needs a training; taylor_squared instead")
        criterion = "taylor_squared"
    comparison = _Comparison(job, workload, dense, pruned, ranks, on_progress)
    found = Findings(
        trial_id=trial_id,
        round=round_number,
        criterion=criterion,
        num_examples=num_examples(workload.test),
        layers=comparison.compare_saliency(masks, criterion),
    )
    answers = comparison.answer_all()
    if answers is None:
        left_out.append("classes, answers and examples: the network is no plain classifier")
        return replace(found, left_out=tuple(left_out))
    right = answers.targets == answers.dense, answers.targets == answers.pruned
    is_changed = answers.dense != answers.pruned
    examples, order = _pick_examples(answers, is_changed, job.seed)
    found = replace(
        found,
        classes=_count_classes(answers, *right),
        num_changed=int(is_changed.sum()),
        num_hurt=int((right[0] & ~right[1]).sum()),
        num_helped=int((right[1] & ~right[0]).sum()),
        examples=examples,
        class_names=_name_classes(workload),
        agreement=comparison.measure_agreement(is_changed),
    )
    images = _take_images(workload, order)
    if images is None:
        left_out.append("pictures of examples: the inputs are no images")
    else:
        maps_dense, maps_pruned = comparison.map_gradients(order)
        found = replace(found, images=images, maps_dense=maps_dense, maps_pruned=maps_pruned)
    return replace(found, left_out=tuple(left_out))


@dataclass(frozen=True)
class _Answers:
    """The predictions of both networks for every test example; all (n,)."""

    targets: Tensor
    dense: Tensor
    pruned: Tensor
    confidence_dense: Tensor
    confidence_pruned: Tensor


@dataclass(frozen=True)
class _Comparison:
    """Passes of a dense and a pruned network over the same examples, on one rank."""

    job: JobConfig
    workload: Workload
    dense: nn.Module
    pruned: nn.Module
    ranks: Ranks
    on_progress: OnProgress

    def compare_saliency(self, masks: MaskSet, criterion: str) -> tuple[LayerSaliency, ...]:
        config = self.job.prune.model_copy(update={"criterion": criterion})
        scores = [
            score(
                model,
                self._layers_of(model, masks),
                self.workload,
                config,
                self.ranks,
                seed=self.job.seed,
                on_progress=with_changes(self.on_progress, phase=f"saliency, {name}"),
            ).gather(self.ranks)
            for name, model in (("dense", self.dense), ("pruned", self.pruned))
        ]
        layers = []
        for name in (unit.name for unit in self._layers_of(self.dense, masks)):
            if name not in masks:
                continue
            # Some criteria have a sign, the direction of the loss change; its size is compared.
            before, after = (values[name].double().abs() for values in scores)
            kept = masks[name].cpu()
            layers.append(
                LayerSaliency(
                    name=name,
                    num_weights=kept.numel(),
                    num_kept=int(kept.sum()),
                    dense_all=float(before.sum()),
                    dense_kept=float(before[kept].sum()),
                    pruned=float(after[kept].sum()),
                )
            )
        return tuple(layers)

    def _layers_of(self, model: nn.Module, masks: MaskSet) -> list[Prunable]:
        """Lists the layers whose saliency is compared: of whole units, those that units lie in."""
        prune = self.job.prune
        if not prune.unit_kinds:
            return prunable_parameters(model, prune.exclude, prune.include)
        return [
            Prunable(name, parameter, None)
            for name, parameter in model.named_parameters()
            if name in masks and parameter.ndim > 1
        ]

    @torch.no_grad()
    def answer_all(self) -> _Answers | None:
        """Returns the answers to all test examples; None if the network is no classifier."""
        rows: list[list[Tensor]] = []
        batches = cut_batches(num_examples(self.workload.test), self.job.workload.eval_batch_size)
        for item, batch in enumerate(batches):
            indices = torch.arange(batch.start, batch.stop)
            taken = self._take(indices)
            targets = labels_of(taken.targets)
            columns = [targets]
            for model in (self.dense, self.pruned):
                with isolated(model, derive_seed("evaluate", item)):
                    outputs = logits_of(forward(model, self.workload, taken))
                are_tensors = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
                if not are_tensors or outputs.ndim != 2 or targets.ndim != 1:
                    return None
                if targets.is_floating_point() or outputs.shape[1] < 2:
                    return None
                confidence, answer = functional.softmax(outputs.float(), dim=1).max(dim=1)
                columns += [answer, confidence]
            rows.append([column.cpu() for column in columns])
            self.on_progress(Progress("answers of both networks", item + 1, len(batches)))
        targets, answer, confidence, answer_pruned, confidence_pruned = (
            torch.cat(column) for column in zip(*rows, strict=True)
        )
        return _Answers(targets, answer, answer_pruned, confidence, confidence_pruned)

    def measure_agreement(self, is_changed: Tensor) -> dict[str, float]:
        """Averages the cosine of both networks' input gradients, of same and changed answers."""
        agreement = {}
        for name, wanted in (("same", ~is_changed), ("changed", is_changed)):
            places = wanted.nonzero().flatten()
            draws = derive_seed(self.job.seed, "explain", name)
            places = places[shuffled_indices(len(places), draws)[:_NUM_GRADIENTS]]
            cosines = []
            for batch in cut_batches(len(places), min(64, self.job.workload.eval_batch_size)):
                pair = self._input_gradients(places[batch.start : batch.stop])
                if pair is None:
                    return {}
                one, other = (gradient.flatten(1).double() for gradient in pair)
                cosines.append(functional.cosine_similarity(one, other, dim=1))
                phase = f"input gradients, {name} answers"
                self.on_progress(Progress(phase, batch.stop, len(places)))
            if cosines:
                agreement[name] = float(torch.cat(cosines).mean())
        return agreement

    def map_gradients(self, indices: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Returns both networks' largest absolute input gradient over channels, by pixel."""
        pair = self._input_gradients(indices)
        if pair is None or pair[0].ndim != 4:
            return (np.zeros((0, 1, 1), np.float32),) * 2
        dense, pruned = (gradient.abs().amax(dim=1).float().numpy() for gradient in pair)
        return dense, pruned

    def _input_gradients(self, indices: Tensor) -> tuple[Tensor, Tensor] | None:
        """Differentiates each example's output of its true class by its own prepared input."""
        gradients = []
        for model in (self.dense, self.pruned):
            batch = self._take(indices)
            if not isinstance(batch.inputs, Tensor) or not batch.inputs.is_floating_point():
                return None
            inputs = batch.inputs.detach().requires_grad_(True)
            with torch.enable_grad(), isolated(model, 0):
                outputs = logits_of(forward(model, self.workload, batch._replace(inputs=inputs)))
                chosen = outputs.gather(1, labels_of(batch.targets).view(-1, 1)).sum()
                (gradient,) = torch.autograd.grad(chosen, inputs)
            gradients.append(gradient.detach().cpu())
        return gradients[0], gradients[1]

    def _take(self, indices: Tensor) -> Batch:
        workload = self.workload
        return take_batch(workload, workload.test, indices, device=self.ranks.device)


def _count_classes(
    answers: _Answers, right_dense: Tensor, right_pruned: Tensor
) -> tuple[ClassFinding, ...]:
    labels = answers.targets.unique().tolist()
    return tuple(
        ClassFinding(
            label=int(label),
            num_examples=int(own.sum()),
            num_right_dense=int(right_dense[own].sum()),
            num_right_pruned=int(right_pruned[own].sum()),
        )
        for label, own in ((label, answers.targets == label) for label in labels)
    )


def _name_classes(workload: Workload) -> tuple[str, ...]:
    """Returns the names of classes, of the workload or of a data set inside the test split."""
    found: Any = workload.classes
    data = workload.test
    while not found and data is not None:
        found = getattr(data, "classes", ())
        data = getattr(data, "dataset", None)
    is_named = isinstance(found, (list, tuple)) and all(isinstance(name, str) for name in found)
    return tuple(found) if is_named else ()


def _pick_examples(
    answers: _Answers, is_changed: Tensor, seed: int
) -> tuple[tuple[ExampleFinding, ...], Tensor]:
    """Picks the changed answers that both networks are surest of, and some others at random."""
    sureness = answers.confidence_dense + answers.confidence_pruned
    changed = is_changed.nonzero().flatten()
    changed = changed[sureness[changed].argsort(descending=True, stable=True)][:_NUM_CHANGED]
    same = (~is_changed).nonzero().flatten()
    chance = shuffled_indices(len(same), derive_seed(seed, "explain"))
    order = torch.cat([changed, same[chance[:_NUM_SAME]]])
    examples = tuple(
        ExampleFinding(
            index=i,
            label=int(answers.targets[i]),
            answer_dense=int(answers.dense[i]),
            answer_pruned=int(answers.pruned[i]),
            confidence_dense=float(answers.confidence_dense[i]),
            confidence_pruned=float(answers.confidence_pruned[i]),
        )
        for i in order.tolist()
    )
    return examples, order


def _take_images(workload: Workload, indices: Tensor) -> np.ndarray | None:
    """Returns stored inputs, before `prepare`, as images; None if they are none.

    Returns:
        (n, height, width, 1 or 3) uint8.
    """
    raw = take_batch(replace(workload, prepare=None), workload.test, indices).inputs
    if not isinstance(raw, Tensor):
        return None
    if raw.ndim == 3:
        raw = raw.unsqueeze(1)
    if raw.ndim != 4 or raw.shape[1] not in (1, 3):
        return None
    values = raw.double()
    low = 0.0 if raw.dtype is torch.uint8 else float(values.min())
    high = float(values.max())
    scaled = (values - low) / (high - low) if high > low else values * 0
    return (255 * scaled).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Overlap:
    """The intersection over union of several masks.

    Attributes:
        pairs: Of each pair.
        chance: Expected mean for random masks with the same layers' sparsities.
        by_layer: Mean over pairs of each layer.
    """

    pairs: tuple[float, ...]
    chance: float
    by_layer: dict[str, float]

    @property
    def mean(self) -> float:
        """Averages over pairs."""
        return statistics.fmean(self.pairs)


@dataclass(frozen=True)
class SizeStability:
    """Agreement of the masks of different samples, for one number of calibration examples.

    Attributes:
        between: Overlap of the masks of this size, one per sample.
        to_largest: Overlap of each with the masks of the largest size of the other samples.
        scores: Of the network under each mask, not fine-tuned; empty if not measured.
    """

    examples: int
    between: Overlap
    to_largest: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """The scores, by the name that they have where they are accuracies."""
        return self.scores


def compare_samples(
    job: JobConfig,
    workload: Workload,
    model: nn.Module,
    sizes: Sequence[int],
    seeds: Sequence[int],
    ranks: Ranks,
    *,
    is_evaluated: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> list[SizeStability]:
    """Scores a network on samples of growing size and compares their masks, on one rank.

    Args:
        job: Its criterion, sparsity and scope make the masks.
        model: The dense network; not changed.
        sizes: Numbers of examples; capped at what the data has.
        seeds: One sample each; at least two.
        is_evaluated: Measures the first metric under each mask, with BatchNorm as the job
            recalibrates.

    Raises:
        PruneError: A score is not finite, or a mask is impossible.
    """
    assert len(seeds) > 1, "one sample has nothing to be compared with"
    masks_of_sizes = _masks_of_units if job.prune.unit_kinds else _masks_of_weights
    metric = metrics_of(workload)[0].name
    masks: dict[int, list[MaskSet]] = {}
    measured: dict[int, list[float]] = {}
    for seed in seeds:
        scoring = with_changes(on_progress, phase=f"sample {seed}: scoring")
        for size, chosen in masks_of_sizes(job, workload, model, sizes, seed, ranks, scoring):
            masks.setdefault(size, []).append(chosen)
            if is_evaluated:
                found = _evaluate(job, workload, model, chosen, ranks)
                measured.setdefault(size, []).append(found)
                on_progress(Progress(f"sample {seed}: {metric} with {size} examples", 1, 1))
    largest = masks[max(masks)]
    return [
        SizeStability(
            examples=size,
            between=measure_overlap(found),
            to_largest=tuple(
                found[one].overlap(largest[other])
                for one, other in permutations(range(len(found)), 2)
            ),
            scores=tuple(measured.get(size, ())),
        )
        for size, found in sorted(masks.items())
    ]


def _masks_of_weights(
    job: JobConfig,
    workload: Workload,
    model: nn.Module,
    sizes: Sequence[int],
    seed: int,
    ranks: Ranks,
    on_progress: OnProgress,
) -> Iterator[tuple[int, MaskSet]]:
    """Yields the masks of each number of calibration examples, each size once."""
    prune, unused = job.prune, unused_layers(workload, model)
    units = prunable_parameters(model, prune.exclude, prune.include, unused)
    input_dims = {unit.name: unit.input_dim for unit in units}
    dense = MaskSet.dense(units)
    for size, scores in score_prefixes(
        model, units, workload, prune, sizes, seed=seed, on_progress=on_progress
    ):
        chosen = select_masks(scores, dense, prune, prune.sparsity, input_dims, ranks)
        yield size, chosen.masks


def _masks_of_units(
    job: JobConfig,
    workload: Workload,
    model: nn.Module,
    sizes: Sequence[int],
    seed: int,
    ranks: Ranks,
    on_progress: OnProgress,
) -> Iterator[tuple[int, MaskSet]]:
    """Does the same of whole units: those of the last round's budget, decided at once."""
    structure = find_units(workload, model, job.prune)
    total = num_examples(workload.train)
    for size in sorted({min(size, total) for size in sizes}):
        prune = job.prune.model_copy(update={"calibration_examples": size})
        units = WholeUnits(structure, prune)
        scores_U = units.score(model, workload, ranks, seed, 1, None, on_progress)
        yield size, units.dense_masks(units.choose(prune.rounds, scores_U).kept_U)


def measure_overlap(masks: Sequence[MaskSet]) -> Overlap:
    """Compares each pair of masks; raises PruneError if they mask other parameters."""
    pairs, chances = [], []
    layers: dict[str, list[float]] = {}
    for one, other in combinations(masks, 2):
        found = one.compare(other)
        whole = sum_shared(found.values())
        pairs.append(whole.overlap)
        chances.append(whole.chance)
        for name, shared in found.items():
            layers.setdefault(name, []).append(shared.overlap)
    return Overlap(
        tuple(pairs),
        statistics.fmean(chances),
        {name: statistics.fmean(values) for name, values in layers.items()},
    )


def _evaluate(
    job: JobConfig, workload: Workload, model: nn.Module, masks: MaskSet, ranks: Ranks
) -> float:
    twin = copy_network(model)
    masks.apply_(twin)
    recalibrate_as_asked(job, twin, workload, ranks)
    precision = job.workload.eval_precision
    return evaluate(twin, workload, ranks, job.workload.eval_batch_size, precision=precision).score
