"""Saliency: the estimated loss change from removing a weight, each rank for those it owns.

A criterion is an additive statistic plus a finish. What a calibration batch adds is either a
function of its gradients, weight by weight, which is summed as they arrive (`GradientReducer`), or
it takes passes of its own and comes as one flat vector (`OrderedSum`), of weights or of the moments
of layers (`LayerMoments`). Either way the batches are added in batch order over all ranks, and only
then comes anything non-linear. Models are scored in eval mode and left as they were found.

Sums are float64; what one batch adds has the weights' precision. Scores are float32.

Each rank owns a slice of every layer's sum, and so of its scores; nobody gathers them. For a
sharded network, criteria of gradients never hold more than one group's weights at a time; those
with passes of their own need the unsharded network.

Shape suffixes: N = prunable weights of the model in the order of the global flat index, S = those
that this rank owns, L = its slice of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.gathering import unsharded
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import (
    differentiating,
    is_sharded,
    leaves,
    local,
    local_slice,
)
from gbp_ray.distributed.sums import GradientReducer, OrderedSum, in_blocks
from gbp_ray.errors import PruneError
from gbp_ray.pruning.calibration import Calibration, Given, scoring_mode, take_calibration
from gbp_ray.pruning.criteria import Criterion, criterion
from gbp_ray.pruning.moments import LayerMoments, LayerRule
from gbp_ray.pruning.statistics import BatchStatistic, Probe
from gbp_ray.pruning.units import Layout, Prunable, SlicedScores
from gbp_ray.training.non_finite import why_not_finite
from gbp_ray.training.progress import OnProgress, Progress, ignore_progress
from gbp_ray.workloads.batch import Batch, forward
from gbp_ray.workloads.checks import check_labels
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import derive_seed
from gbp_ray.workloads.losses import mean_loss, zero_loss

__all__ = ["ScoreCache", "check_criterion", "on_few_examples", "score", "score_prefixes"]

_TRIAL_EXAMPLES = 8
"""Size of the batch that a criterion is tried on before any training."""

_Keep = Callable[[int, Callable[[], Mapping[str, Tensor]]], None]
"""(batches summed, () -> a copy of the sum so far, this rank's slice (L,) by layer)."""


class ScoreCache(Protocol):
    """Shares the scores of the dense network between trials."""

    def fetch(
        self, job: JobConfig, model: nn.Module, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor] | None:
        """Returns the float32 scores of a model by parameter name, computed where not stored.

        Returns None for a job whose scores are not worth storing.
        """


def score(
    model: nn.Module,
    units: list[Prunable],
    workload: Workload,
    config: PruneConfig,
    ranks: Ranks,
    *,
    seed: int = 0,
    round_number: int = 1,
    movement: Mapping[str, Tensor] | None = None,
    batches: Sequence[Batch] | None = None,
    on_progress: OnProgress = ignore_progress,
) -> SlicedScores:
    """Scores every prunable weight, each rank its slices, to the same bits on any number of ranks.

    Communicates.

    Args:
        units: From `prunable_parameters(model)`.
        round_number: Distinguishes the draws of `random`.
        movement: Its statistic by parameter name, gathered in training.
        batches: This rank's, to score on in place of the calibration examples; those of all ranks
            are taken in turn: the first of each rank, the second of each, and so on.
        on_progress: Told of this rank's batches.

    Raises:
        ConfigError: The criterion cannot be found.
        PruneError: A score is NaN or infinite (raised on every rank), or movement has no history.
    """
    rule = criterion(config.criterion)
    scorer = _Scorer(rule, model, units, workload, config, ranks, seed, on_progress)
    with scoring_mode(model, units):
        statistic, total = scorer.compute_statistic(round_number, movement, batches)
    scores = ranks.run_collectively(lambda: scorer.finish(statistic, total))
    ranks.run_collectively(lambda: scorer.check_finite(scores))
    return scores


def score_prefixes(
    model: nn.Module,
    units: list[Prunable],
    workload: Workload,
    config: PruneConfig,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    on_progress: OnProgress = ignore_progress,
) -> Iterator[tuple[int, SlicedScores]]:
    """Scores on growing numbers of calibration examples, each nested in the next; on one rank.

    The scores of each size have the bits that `score` gives for it. Where a criterion is one sum
    over batches, all sizes that end with a batch share one pass; the others get their own.

    Args:
        sizes: Numbers of calibration examples; capped at what the data has.
        on_progress: Told of the batches of all passes.

    Yields:
        (size, scores), by size, each size once.
    """
    rule, ranks = criterion(config.criterion), Ranks(device=units[0].parameter.device)
    available = num_examples(workload.train)
    wanted = sorted({min(size, available) for size in sizes})
    of_size = {n: config.model_copy(update={"calibration_examples": n}) for n in wanted}
    largest = Calibration(workload, of_size[wanted[-1]], seed, ranks)
    # Whether all examples have equally many items may depend on the size, and the last bits on it.
    is_one_sum = rule.spec.num_passes == 1 and largest.counts is None
    nested = [
        n
        for n in wanted
        if is_one_sum and (n % config.calibration_batch_size == 0 or n == wanted[-1])
    ]
    own = {n: of_size[n] for n in wanted if n not in nested}
    statistics: dict[int, Mapping[str, Tensor]] = {}

    def keep(num_batches: int, so_far: Callable[[], Mapping[str, Tensor]]) -> None:
        size = min(num_batches * config.calibration_batch_size, wanted[-1])
        if size in nested:
            statistics[size] = so_far()

    num_batches = {n: -(-n // config.calibration_batch_size) for n in wanted}
    total = sum(num_batches[n] * max(1, len(rule.passes)) for n in own)
    total += num_batches[wanted[-1]] if nested else 0
    before = 0

    def of_all(progress: Progress) -> None:
        on_progress(replace(progress, done=before + progress.done, total=total))

    scorer = _Scorer(rule, model, units, workload, config, ranks, seed, of_all)
    if nested:
        with scoring_mode(model, units):
            scorer.sum_batches(largest, keep)
        before = num_batches[wanted[-1]]
    for size in wanted:
        if size in own:
            scores = score(model, units, workload, own[size], ranks, seed=seed, on_progress=of_all)
            before += num_batches[size] * max(1, len(rule.passes))
        else:
            scores = scorer.finish(statistics.pop(size), size)
            scorer.check_finite(scores)
        yield size, scores


def check_criterion(
    model: nn.Module,
    units: list[Prunable],
    workload: Workload,
    config: PruneConfig,
    *,
    seed: int = 0,
) -> None:
    """Scores one small batch before any training, to see that the criterion can.

    The scores need not be finite, as training may change that.

    Raises:
        ConfigError: The criterion cannot be found.
        PruneError: It fails, or its result does not fit the model.
    """
    rule, small = criterion(config.criterion), on_few_examples(config)
    if rule.spec.needs_history:
        return
    ranks = Ranks(device=units[0].parameter.device)
    scorer = _Scorer(rule, model, units, workload, small, ranks, seed)
    with scoring_mode(model, units):
        statistic, total = scorer.compute_statistic(1, None)
    scorer.finish(statistic, total)


def on_few_examples(config: PruneConfig) -> PruneConfig:
    """Returns a section that scores one small batch."""
    size = min(_TRIAL_EXAMPLES, config.calibration_batch_size)
    few = {"calibration_examples": size, "calibration_batch_size": size, "hutchinson_probes": 1}
    return config.model_copy(update=few)


@dataclass(frozen=True)
class _Scorer:
    """The computation of one criterion's scores for the weights of one network."""

    rule: Criterion
    model: nn.Module
    units: list[Prunable]
    workload: Workload
    config: PruneConfig
    ranks: Ranks
    seed: int
    on_progress: OnProgress = ignore_progress

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.units, self.ranks)

    def compute_statistic(
        self,
        round_number: int,
        movement: Mapping[str, Tensor] | None,
        batches: Sequence[Batch] | None = None,
    ) -> tuple[Mapping[str, Tensor], float]:
        """Returns this rank's slices of the statistic, (L,) by layer, and the number of items."""
        if self.rule.spec.reads == "nothing":
            return self._draw(derive_seed(self.seed, "random", round_number)), 1
        if self.rule.spec.needs_history:
            if movement is None:
                raise PruneError(
                    "prune.criterion = movement: nothing was gathered; set finetune.epochs above 0"
                )
            return {own.name: local_slice(movement[own.name], own) for own in self.layout.own}, 1
        if self.rule.of_network is not None:
            of_network = self.rule.of_network
            with unsharded(self.model) as plain:
                units = self._units_of(plain)
                vector_N = self.ranks.run_collectively(
                    lambda: of_network(plain, units, self.workload)
                )
            return self._take_own(vector_N), 1
        if not self.rule.spec.needs_data:
            return {own.name: torch.zeros(()) for own in self.layout.own}, 1
        calibration = take_calibration(self.workload, self.config, self.seed, self.ranks, batches)
        return self.sum_batches(calibration), sum(calibration.items)

    def sum_batches(
        self, calibration: Calibration | Given, keep: _Keep | None = None
    ) -> Mapping[str, Tensor]:
        """Sums over the batches; returns this rank's slices of the sum, (L,) by layer."""
        if self.rule.of_gradients is not None:
            return self._sum_gradients(calibration, keep)
        with unsharded(self.model) as plain:
            if self.rule.layers is not None:
                return self._sum_moments(self.rule.layers, plain, calibration, keep)
            return self._sum_passes(plain, calibration, keep)

    def finish(self, statistic: Mapping[str, Tensor], total: float) -> SlicedScores:
        """Computes this rank's scores from its slices of the statistic."""
        values = []
        for unit, own in zip(self.units, self.layout.own, strict=True):
            weights_L = local_slice(unit.parameter, own)
            if own.size == 0:
                values.append(weights_L.float())
                continue
            statistic_L = statistic[unit.name].to(weights_L.device).expand(own.size)
            scores_L = torch.empty_like(weights_L, dtype=torch.float32)
            for scores, weights, sums in in_blocks(scores_L, weights_L, statistic_L):
                scores.copy_(self.rule.finish(weights.double(), sums, total))
            values.append(scores_L)
        return SlicedScores(self.layout.own, tuple(values))

    def check_finite(self, scores: SlicedScores) -> None:
        bad = [
            unit
            for unit, values_L in zip(self.units, scores.values, strict=True)
            if not all(bool(torch.isfinite(block).all()) for (block,) in in_blocks(values_L))
        ]
        if not bad:
            return
        # This rank's rows only, as the other ranks may not be here.
        rows = {unit.name: local(unit.parameter.detach()) for unit in self.units}
        # One weight that is not finite makes all gradients so: name that one.
        broken = (name for name, rows_L in rows.items() if not bool(torch.isfinite(rows_L).all()))
        name = next(broken, bad[0].name)
        seen = f", seen by worker {self.ranks.rank}" if self.ranks.world_size > 1 else ""
        why = why_not_finite(rows) or (
            "the weights diverged or the criterion overflowed; lower the learning rate, or try "
            "another criterion"
        )
        raise PruneError(
            f"scores of '{name}': NaN or infinite under prune.criterion = "
            f"{self.config.criterion}{seen}; {why}"
        )

    def _draw(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        # Every rank draws for all, one layer at a time, and keeps its own.
        return {
            own.name: torch.rand(math.prod(own.shape), generator=generator)[
                own.start : own.stop
            ].clone()
            for own in self.layout.own
        }

    def _units_of(self, model: nn.Module) -> list[Prunable]:
        """Finds the units in the unsharded network."""
        return [replace(unit, parameter=model.get_parameter(unit.name)) for unit in self.units]

    def _sum_gradients(
        self, calibration: Calibration | Given, keep: _Keep | None
    ) -> Mapping[str, Tensor]:
        model, ranks, workload = self.model, self.ranks, self.workload
        assert self.rule.of_gradients is not None
        batches, precision = calibration.batches, self.config.calibration_precision
        differentiated = leaves(model)
        numbers = {unit.name: number for number, unit in enumerate(self.units)}
        # In the order of the network, which is roughly that of the passes, and not of the names.
        names = [name for name in differentiated if name in numbers]
        sums = GradientReducer(
            ranks,
            {name: self.units[numbers[name]].parameter for name in names},
            {name: differentiated[name] for name in names},
            {name: [own[numbers[name]] for own in self.layout.by_rank] for name in names},
            calibration.items,
            self.rule.of_gradients,
            torch.float64,
            is_sharded=is_sharded(model),
        )
        turns = -(-len(batches) // ranks.world_size)
        with differentiating(model, names), sums.listening():
            for turn, item in enumerate(ranks.deal(len(batches))):
                with sums.turn():
                    # All ranks pass through a sharded network; one without a batch uses batch 0.
                    number = 0 if item is None and is_sharded(model) else item
                    if number is not None:
                        with (
                            calibration.batch(model, number, ranks.device) as examples,
                            isolated(model, derive_seed(calibration.draws(number), 0)),
                        ):
                            targets = examples.targets
                            outputs = forward(model, workload, examples, precision)
                            check_labels(workload, "train", batches[number], outputs, targets)
                            loss = (
                                mean_loss(workload, outputs, targets)
                                if calibration.items[number] > 0
                                else zero_loss(outputs)
                            )
                            if loss.requires_grad:
                                loss.backward()
                if keep is not None:
                    keep(turn + 1, sums.so_far)
                self.on_progress(Progress("score", turn + 1, turns))
        return sums.owned()

    def _sum_passes(
        self, model: nn.Module, calibration: Calibration | Given, keep: _Keep | None
    ) -> Mapping[str, Tensor]:
        layout, units = self.layout, self._units_of(model)
        wire_dtype = reduce(torch.promote_types, (unit.parameter.dtype for unit in units))
        previous_N: Tensor | None = None
        sums: OrderedSum | None = None

        def by_owner(statistic: BatchStatistic, probe: Probe, inputs: Any, targets: Any) -> Tensor:
            if probe.num_items > 0:
                return layout.by_owner(statistic(probe, inputs, targets))
            return torch.zeros(layout.num_weights, dtype=wire_dtype, device=self.ranks.device)

        for number, statistic in enumerate(self.rule.passes):
            if sums is not None:
                # The next pass may need the sum as a direction, all of it on every rank.
                previous_N = layout.by_layer(sums.result())
            sums = OrderedSum(
                *(self.ranks, layout.num_weights, len(calibration.batches)),
                *(torch.float64, wire_dtype, layout.bounds),
            )
            pass_batch = partial(by_owner, statistic)
            self._add_batches(
                *(sums, pass_batch, layout.split_own, model, units, calibration, keep),
                *(number, previous_N),
            )
        assert sums is not None
        return layout.split_own(sums.owned())

    def _sum_moments(
        self,
        rule: LayerRule,
        model: nn.Module,
        calibration: Calibration | Given,
        keep: _Keep | None,
    ) -> Mapping[str, Tensor]:
        ranks, units = self.ranks, self._units_of(model)
        moments = LayerMoments(rule, model, units, self.config)
        cuts = moments.deal(ranks.world_size)
        sizes = [
            sum(unit.parameter.numel() for unit in units[start:stop])
            for start, stop in pairwise(cuts)
        ]
        sums = OrderedSum(
            *(ranks, moments.size, len(calibration.batches), torch.float64, moments.dtype),
            [moments.starts[cut] for cut in cuts],
        )

        def spread(sums_S: Tensor) -> Mapping[str, Tensor]:
            found = ranks.run_collectively(lambda: moments.spread(sums_S, cuts[ranks.rank]))
            return self._take_own(torch.cat(ranks.all_gather_vectors(found, sizes)))

        self._add_batches(sums, moments.of_batch, spread, model, units, calibration, keep)
        return spread(sums.owned())

    def _add_batches(
        self,
        sums: OrderedSum,
        statistic: BatchStatistic,
        split: Callable[[Tensor], Mapping[str, Tensor]],
        model: nn.Module,
        units: list[Prunable],
        calibration: Calibration | Given,
        keep: _Keep | None,
        number: int = 0,
        previous_N: Tensor | None = None,
    ) -> None:
        """Adds up what all batches add in one pass, of this number, over the calibration data.

        Args:
            split: Makes slices by layer of this rank's part of the sum.
        """
        ranks, batches = self.ranks, calibration.batches
        turns = -(-len(batches) // ranks.world_size)
        total = turns * max(1, len(self.rule.passes))
        for turn, item in enumerate(ranks.deal(len(batches))):
            vector: Tensor | None = None
            if item is not None:
                probe = Probe(
                    *(model, units, self.workload, self.config),
                    *(self.seed, item, previous_N),
                    partial(calibration.single, item, ranks.device),
                    len(batches[item]),
                    calibration.counts_in(item),
                )
                with (
                    sums.attempt(),
                    calibration.batch(model, item, ranks.device) as examples,
                    isolated(model, derive_seed(calibration.draws(item), number)),
                ):
                    vector = statistic(probe, *examples)
            sums.add(vector)
            if keep is not None:
                keep(turn + 1, lambda: split(sums.so_far()))
            self.on_progress(Progress("score", number * turns + turn + 1, total))

    def _take_own(self, vector_N: Tensor) -> Mapping[str, Tensor]:
        """Returns this rank's slices, (L,) by layer, of a vector that all have."""
        start, stop = self.layout.bounds[self.ranks.rank : self.ranks.rank + 2]
        return self.layout.split_own(self.layout.by_owner(vector_N)[start:stop])
