"""Saliency of whole units: channels and heads, the slices of many weights that go together.

By the gate: `gates` gives the gradient in a factor on all that reads a unit, of a batch or of an
example; a criterion adds a function of it over the batches, in batch order over all ranks.

By the sum: the scores of all weights that lie in a unit, biases and those of norms included, are
added in float64. One layer's scores at a time are gathered and added on every rank alike, as the
bits of a sum depend on its order.

Shape suffixes: U = units of the network, G = units of one group, K = positions of one unit, B =
examples of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import is_sharded, local
from gbp_ray.distributed.sums import OrderedSum
from gbp_ray.errors import PruneError
from gbp_ray.pruning.calibration import Calibration, Given, scoring_mode, take_calibration
from gbp_ray.pruning.criteria import GateRule, criterion
from gbp_ray.pruning.gates import Gates, join_positions
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.structure import Slice, Structure
from gbp_ray.pruning.units import Layout, Prunable, SlicedScores
from gbp_ray.training.non_finite import why_not_finite
from gbp_ray.training.progress import OnProgress, Progress, ignore_progress
from gbp_ray.workloads.batch import Batch, forward
from gbp_ray.workloads.checks import check_labels
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import derive_seed
from gbp_ray.workloads.losses import mean_loss, zero_loss

__all__ = ["score_units"]

_NUM_CHECKED = 8
"""Examples of the batch that gates are checked on."""


def score_units(
    model: nn.Module,
    structure: Structure,
    kept_U: np.ndarray,
    workload: Workload,
    config: PruneConfig,
    ranks: Ranks,
    *,
    seed: int = 0,
    round_number: int = 1,
    movement: Mapping[str, Tensor] | None = None,
    batches: Sequence[Batch] | None = None,
    must_be_finite: bool = True,
    on_progress: OnProgress = ignore_progress,
) -> np.ndarray:
    """Scores every unit, to the same bits on every rank and any number of ranks. Communicates.

    Criteria with a gate (`CriterionSpec.gate`) take it, under `prune.unit_score = "gate"`. `random`
    draws once for each kept unit. Of the others the scores of all weights in a unit's slices are
    summed, each weight once: of `magnitude` their squares, and the root is taken (the L2 norm); of
    `movement` those of the weights that it was gathered for; of criteria that read activations, and
    of a user's own, those of matrices. Buffers and weights that lie in a pruned unit, too, add
    nothing.

    Args:
        structure: Of this very model: of a compacted one it has the units that are left.
        kept_U: bool; the others are masked in the model.
        round_number: Distinguishes the draws of `random`.
        movement: Its statistic by parameter name, gathered in training.
        batches: This rank's, in place of the calibration examples, as `scoring.score` takes them.
        must_be_finite: Refuses gates that are NaN or infinite.
        on_progress: Told of this rank's batches.

    Returns:
        (U,) float64; 0 for units that are pruned.

    Raises:
        ConfigError: The criterion cannot be found.
        PruneError: A score is NaN or infinite (raised on every rank), units cannot be scored by
            the criterion, or movement has no history.
    """
    rule = criterion(config.criterion)
    if not structure.num_units:
        return np.zeros(0)
    if rule.spec.reads == "nothing":
        generator = torch.Generator().manual_seed(derive_seed(seed, "random", round_number))
        scores_U = np.zeros(structure.num_units)
        # So that a network from which units were removed draws alike.
        drawn = torch.rand(int(kept_U.sum()), generator=generator, dtype=torch.float64)
        scores_U[kept_U] = drawn.numpy()
        return scores_U
    if rule.gate is not None and config.unit_score == "gate":
        with scoring_mode(model, []):
            scorer = _GateScorer(
                *(rule.gate, model, structure, workload, config, ranks),
                *(take_calibration(workload, config, seed, ranks, batches), on_progress),
            )
            scores_U = scorer.compute()
    else:
        units = _find_scored(model, structure, config, movement)
        scores = score(
            *(model, units, workload, config, ranks),
            seed=seed,
            round_number=round_number,
            movement=movement,
            batches=batches,
            on_progress=on_progress,
        )
        scores_U = _sum_weights(scores, units, structure, kept_U, ranks, rule.power)
    scores_U = np.where(kept_U, scores_U, 0.0)
    if must_be_finite:
        _check_finite(model, structure, scores_U, config, ranks)
    return scores_U


def _check_finite(
    model: nn.Module, structure: Structure, scores_U: np.ndarray, config: PruneConfig, ranks: Ranks
) -> None:
    """Raises PruneError, alike on all ranks, for scores that are not finite. Communicates then."""
    bad = [
        group.name
        for group, scores_G in zip(structure.groups, structure.split(scores_U), strict=True)
        if not np.isfinite(scores_G).all()
    ]
    if not bad:
        return
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # One weight that is not finite makes all gradients so: name that one.
    own = [name for name, w in weights.items() if not bool(torch.isfinite(local(w)).all())]
    broken = {name for of_rank in ranks.all_gather_objects(own) for name in of_rank}
    name = next((name for name in weights if name in broken), bad[0])
    why = why_not_finite({n: w for n, w in weights.items() if w.ndim > 1}) or (
        "the weights diverged or the criterion overflowed; lower the learning rate, or try "
        "another criterion"
    )
    raise PruneError(
        f"scores of the units of '{name}': NaN or infinite under prune.criterion = "
        f"{config.criterion}; {why}"
    )


# -- by the gate -----------------------------------------------------------------------------------


@dataclass
class _GateScorer:
    """The sum of a gate's statistic over all batches."""

    rule: GateRule
    model: nn.Module
    structure: Structure
    workload: Workload
    config: PruneConfig
    ranks: Ranks
    calibration: Calibration | Given
    on_progress: OnProgress
    gates: Gates = field(init=False)

    def compute(self) -> np.ndarray:
        ranks, batches = self.ranks, self.calibration.batches
        self.gates = Gates(self.model, self.structure, ranks.device)
        self._check_gates()
        sums = OrderedSum(
            ranks, self.structure.num_units, len(batches), torch.float64, torch.float64
        )
        turns = -(-len(batches) // ranks.world_size)
        for turn, item in enumerate(ranks.deal(len(batches))):
            vector_U: Tensor | None = None
            # All ranks pass through a sharded network; one without a batch uses batch 0.
            number = 0 if item is None and self.is_sharded else item
            with sums.attempt(communicates=self.is_sharded):
                if number is not None:
                    vector_U = self._add_up(number)
            sums.add(vector_U if item is not None else None)
            self.on_progress(Progress("score", turn + 1, turns))
        sum_U = sums.result()
        return self.rule.finish(sum_U, sum(self.calibration.items)).cpu().numpy()

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.model)

    def _check_gates(self) -> None:
        """Decides on one batch how gates are heard, on one rank for all. Communicates."""
        ranks, gates, items = self.ranks, self.gates, self.calibration.items
        # A batch without any item has no gradients to compare.
        item = next(number for number, count in enumerate(items) if count > 0)
        turn, judge = divmod(item, ranks.world_size)
        own = turn * ranks.world_size + ranks.rank
        own = own if own < len(items) else item
        takes_part = ranks.rank == judge or self.is_sharded

        def hear(check: Callable[[], list[int]]) -> frozenset[int]:
            found = ranks.run_collectively(
                lambda: check() if takes_part else [], communicates=self.is_sharded
            )
            return frozenset(ranks.all_gather_objects(found)[judge])

        once = partial(self._pass_few, own)
        gates.by_weight = hear(lambda: gates.check_hooks(once))
        gates.check_mixed()
        gates.differentiates_all = bool(hear(lambda: [0] * gates.check_quiet(once)))
        if not self.rule.is_by_example or gates.by_weight:
            return
        gates.trusted = hear(lambda: self._check_rows(own))
        gates.is_by_row = bool(gates.trusted)

    def _few(self, number: int) -> list[int]:
        """Chooses examples of a batch to check gates on: the first that have items."""
        rows = [row for row, count in enumerate(self._counts(number)) if count > 0]
        return rows[:_NUM_CHECKED] or [0]

    def _check_rows(self, number: int) -> list[int]:
        held: list[int] = []
        counts = self._counts(number)
        rows = self._few(number)
        with self.calibration.few(self.model, number, self.ranks.device, rows) as (_, found):
            held.extend(found)
        # Two on all ranks, which pass through a sharded network together.
        ends = rows[0], rows[-1]
        alone = [(held.index(row), partial(self._pass_alone, number, row)) for row in ends]
        if self.config.calibration_augment and self.workload.augment is not None:
            # Read by themselves they would be augmented otherwise.
            alone = [(place, partial(self._pass_few, number, place)) for place, _ in alone]
        return self.gates.check_rows(
            partial(self._pass_few, number), [counts[row] for row in held], alone
        )

    def _add_up(self, number: int) -> Tensor:
        """Computes what a batch adds, (U,)."""
        items = self.calibration.items[number]
        if not self.rule.is_by_example:
            heard = self.gates.listen(partial(self._pass_batch, number))
            gradient_U = self.gates.gradient(heard)
            return self.rule.fold(gradient_U, items) if items > 0 else torch.zeros_like(gradient_U)
        counts_B = self._counts(number)
        total_U: Tensor | None = None
        if self.gates.is_by_row:
            heard = self.gates.listen(partial(self._pass_batch, number), len(counts_B))
            if heard.is_told_apart:
                gradient_BU = self.gates.gradient(heard)
                total_U = torch.zeros_like(gradient_BU[0])
                for row, count in enumerate(counts_B):
                    if count > 0:
                        total_U += self.rule.fold(gradient_BU[row] * (items / count), count)
        rows = [] if total_U is not None else [r for r, count in enumerate(counts_B) if count > 0]
        num_passes = len(rows)
        if self.is_sharded:
            num_passes = max(self.ranks.all_gather_objects(num_passes))
        for turn in range(num_passes):
            row = rows[turn] if turn < len(rows) else 0
            heard = self.gates.listen(partial(self._pass_alone, number, row))
            if turn < len(rows):
                added_U = self.rule.fold(self.gates.gradient(heard), counts_B[row])
                total_U = added_U if total_U is None else total_U + added_U
        if total_U is None:
            size = self.structure.num_units
            total_U = torch.zeros(size, dtype=torch.float64, device=self.ranks.device)
        return total_U

    def _counts(self, number: int) -> list[float]:
        counts_B = self.calibration.counts_in(number)
        size = len(self.calibration.batches[number])
        return [1.0] * size if counts_B is None else counts_B.tolist()

    def _pass_batch(self, number: int) -> None:
        calibration = self.calibration
        with calibration.batch(self.model, number, self.ranks.device) as batch:
            self._pass(number, batch, calibration.batches[number], calibration.items[number] > 0)

    def _pass_few(self, number: int, place: int | None = None) -> None:
        """Passes a few examples of a batch, or the one of them at `place`, cut out."""
        device, few = self.ranks.device, self._few(number)
        with self.calibration.few(self.model, number, device, few) as (batch, rows):
            if place is not None:
                batch, rows = batch.part(slice(place, place + 1), len(rows)), [rows[place]]
            self._pass(number, batch, self.calibration.batches[number][list(rows)])

    def _pass_alone(self, number: int, row: int) -> None:
        self._pass(number, self.calibration.single(number, self.ranks.device, row))

    def _pass(
        self, number: int, batch: Batch, indices: Tensor | None = None, has_items: bool = True
    ) -> None:
        """Passes a batch forward and its mean loss backward."""
        seed = derive_seed(self.calibration.draws(number), 0)
        with isolated(self.model, seed):
            precision = self.config.calibration_precision
            outputs = forward(self.model, self.workload, batch, precision)
            if indices is not None:
                check_labels(self.workload, "train", indices, outputs, batch.targets)
            if has_items:
                loss = mean_loss(self.workload, outputs, batch.targets)
            else:
                loss = zero_loss(outputs)
            if loss.requires_grad:
                loss.backward()


# -- by the sum of weights -------------------------------------------------------------------------


def _find_scored(
    model: nn.Module,
    structure: Structure,
    config: PruneConfig,
    movement: Mapping[str, Tensor] | None,
) -> list[Prunable]:
    """Lists the parameters that units lie in and that the criterion can score, by name."""
    inside = {part.name for _, part in structure.slices()}
    found = []
    for name, parameter in model.named_parameters():
        is_known = movement is None or not config.spec.needs_history or name in movement
        # A function of a user's own may return what `prunable_parameters` lists, and no more; and
        # biases and norms have no inputs.
        is_asked = parameter.ndim > 1 or not (":" in config.criterion or config.spec.scores_layers)
        if name in inside and parameter.numel() and is_known and is_asked:
            found.append(Prunable(name, parameter, None))
    names = {unit.name for unit in found}
    for group in structure.groups:
        if names.isdisjoint(part.name for part in group.slices):
            raise PruneError(
                f"prune.criterion = {config.criterion}: scores no weight of the units of "
                f"'{group.name}'; choose another criterion, or name the layer in prune.exclude"
            )
    return sorted(found, key=lambda unit: unit.name)


def _sum_weights(
    scores: SlicedScores,
    units: list[Prunable],
    structure: Structure,
    kept_U: np.ndarray,
    ranks: Ranks,
    power: int,
) -> np.ndarray:
    """Sums scores over the weights of each unit, each once, (U,). Communicates."""
    sums_U = np.zeros(structure.num_units)
    by_name: dict[str, dict[int, dict[int, list[Slice]]]] = {}
    for number, part in structure.slices():
        of_group = by_name.setdefault(part.name, {}).setdefault(number, {})
        of_group.setdefault(part.dim, []).append(part)
    by_rank = Layout(units, ranks).by_rank
    for number, (own, own_L) in enumerate(zip(scores.slices, scores.values, strict=True)):
        gathered = ranks.all_gather_vectors(own_L, [slices[number].size for slices in by_rank])
        values = torch.cat(gathered).view(own.shape).cpu().numpy()
        if not kept_U.all():
            values = np.where(structure.masks(kept_U, [own.name])[own.name].numpy(), values, 0)
        if power != 1:
            values = values.astype(np.float64) ** power
        for group, by_dim in by_name[own.name].items():
            bounds = slice(*structure.bounds[group : group + 2])
            sums_U[bounds] += _sum_positions(values, by_dim)
    # Rounding may leave less than nothing of what is taken off.
    return sums_U if power == 1 else np.maximum(sums_U, 0) ** (1 / power)


def _sum_positions(values: np.ndarray, by_dim: Mapping[int, Sequence[Slice]]) -> np.ndarray:
    """Sums what lies in each unit's positions along some axis, (G,).

    What lies in them along several axes is counted once: by inclusion and exclusion.
    """
    joined = {dim: join_positions(parts) for dim, parts in sorted(by_dim.items())}
    num_units = len(next(iter(joined.values()))[0])
    total_G = np.zeros(num_units)
    for size in range(1, len(joined) + 1):
        for dims in itertools.combinations(joined, size):
            others = tuple(axis for axis in range(values.ndim) if axis not in dims)
            reduced = values.sum(axis=others, dtype=np.float64)
            index, is_counted = [], np.ones((num_units, *[1] * size), dtype=bool)
            for place, dim in enumerate(dims):
                shape = [num_units, *[1] * size]
                shape[1 + place] = -1
                positions_GK, is_new_GK = joined[dim]
                index.append(positions_GK.reshape(shape))
                is_counted = is_counted & is_new_GK.reshape(shape)
            block = np.where(is_counted, reduced[tuple(index)], 0)
            total_G -= (-1) ** size * block.reshape(num_units, -1).sum(axis=1)
    return total_G
