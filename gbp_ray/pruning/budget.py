"""Which whole units stay: as many as a budget of units, weights, multiply-adds or bytes allows.

The choice is greedy. The next step of a group removes its lowest-scoring unit, or as many of the
lowest as take its width down to a multiple of `round_to`. The price of a step is the sum of the
scores removed per cost saved, exact at the widths that all groups have at that moment. The group
with the lowest price goes next, until the limit is met. The last step may save more than was
needed, so units then come back, the highest score per cost first, wherever they fit. The result is
never above the limit, and no unit that this decision removed fits into what is left, unless a floor
of its group forbids it.

A negative score says that removal helps. Such steps go first, the lowest sum of scores first,
whatever they save: divided by its cost, a small gain would come before a large one.

Prices rise while other groups shrink, because steps save less. A price from an earlier step is
therefore a lower bound, and only the lowest in a heap is ever computed anew.

Costs are whole numbers, scores float64, and equal prices go by unit number, so the choice is a
function of the arguments: all ranks decide the same without communicating.

Where widths are to be uniform, the groups of a dimension (`dimensions`) take every step together:
each loses as many, its own lowest-scoring. The price is that of all of them.

Shape suffixes: U = units of the network, G = units of one group, S = steps of a line, D = groups of
one dimension.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from gbp_ray.config.prune import Cost, PruneConfig, sparsity_schedule
from gbp_ray.config.schema import is_matched, match_names, nearest_glob
from gbp_ray.errors import ConfigError, PruneError, name_some
from gbp_ray.pruning.dimensions import alike, check_alike, join
from gbp_ray.pruning.structure import Group, Structure
from gbp_ray.pruning.unit_costs import Costs, count_cost, products_of
from gbp_ray.pruning.units import num_to_prune

__all__ = [
    "Bounds",
    "Budget",
    "UnitChoice",
    "can_shrink",
    "check_budget",
    "count_cost",
    "plan_budgets",
    "select_units",
]

_WORDS = {"sparsity": "units", "parameters": "weights", "macs": "multiply-adds", "bytes": "bytes"}
_TINY = 1e-9  # so that 0.3 of ten units are three
_Price = tuple[float, int, int]
"""What a step of a group costs, the number of its first unit, and the number of the group."""


@dataclass(frozen=True)
class Budget:
    """How much may stay after one decision.

    Attributes:
        kind: Of what: units ("sparsity"), weights, multiply-adds or bytes.
        limit: How much of it may stay, as an absolute number.
        is_final: Enforces the floors of groups; an earlier decision may leave them unmet.
        is_by_cost: Scores count per cost saved. Those drawn at random do not, or the control would
            take nearly all units from the dearest groups.
    """

    kind: Cost
    limit: float
    is_final: bool = True
    is_by_cost: bool = True

    @property
    def field(self) -> str:
        """Returns the field of a job that sets it."""
        return "prune.sparsity" if self.kind == "sparsity" else f"prune.target.{self.kind}"


@dataclass(frozen=True)
class Bounds:
    """How wide the groups may become.

    Attributes:
        round_to: Widths that a decision may leave are multiples of it; a group that loses nothing
            keeps its width.
        min_width: Least number of units that stay in a group.
        min_sparsity: Least share of its units that a group loses in all, in [0, 1], or by glob of
            its name or of a tensor that its units lie in; the last match counts. Rounded down to
            steps. A ceiling and `min_width` win over it.
        max_sparsity: Greatest share, likewise. One unit stays in any case, or `round_to`.
        is_uniform: All groups of a dimension keep equal widths; the strictest of their shares
            counts.
    """

    round_to: int = 1
    min_width: int = 1
    min_sparsity: float | Mapping[str, float] = 0.0
    max_sparsity: float | Mapping[str, float] = 1.0
    is_uniform: bool = False

    @classmethod
    def of(cls, prune: PruneConfig) -> Bounds:
        """Returns those of a job."""
        shares = prune.layer_min_sparsity, prune.layer_max_sparsity
        return cls(prune.round_to, prune.min_width, *shares, prune.target.uniform)


@dataclass(frozen=True, eq=False)
class UnitChoice:
    """A decision over whole units.

    Attributes:
        kept_U: bool, True = stays.
        cost: What stays, in the budget's kind.
        held_back: Names of groups that only `max_sparsity` or `min_width` kept from losing more.
    """

    kept_U: np.ndarray
    cost: int
    held_back: tuple[str, ...] = ()


def select_units(
    structure: Structure,
    scores_U: np.ndarray,
    kept_U: np.ndarray,
    budget: Budget,
    *,
    scope: Literal["global", "layer"] = "global",
    bounds: Bounds | None = None,
) -> UnitChoice:
    """Chooses the units that stay; removes none where the limit is met already.

    Args:
        scores_U: Saliency of the units; may be negative. Those of pruned units are ignored.
        kept_U: bool; pruned units stay pruned.
        scope: "layer": every group loses the same share of its units, rounded to the nearest step,
            as large as the limit asks for; of each group one step may come back.

    Raises:
        PruneError: A score is not finite, or no choice within the bounds meets the limit. Floors
            that remove more than a final budget asks for are such bounds.
        ConfigError: A glob of the bounds matches no group.
    """
    scores_U, kept_U = np.asarray(scores_U, dtype=np.float64), np.asarray(kept_U, dtype=bool)
    _check_scores(structure, scores_U, kept_U)
    bounds, is_by_layer = bounds or Bounds(), scope == "layer"
    choice = _Choice(structure, scores_U, kept_U, budget, bounds, is_by_layer=is_by_layer)
    choice.meet_floors()
    choice.shrink()
    choice.put_back()
    return choice.finish()


def can_shrink(structure: Structure, bounds: Bounds) -> list[bool]:
    """Returns of each group whether its bounds allow it to lose a unit.

    Raises:
        ConfigError: A glob of the bounds matches no group.
    """
    lows = _shares(structure, bounds, "min_sparsity", 0.0)
    highs = _shares(structure, bounds, "max_sparsity", 1.0)
    found = []
    for group, low, high in zip(structure.groups, lows, highs, strict=True):
        places_G = np.arange(group.num_units)
        line = _Line([group], places_G[:, None], np.zeros(group.num_units), bounds)
        line.bound(bounds, low, high)
        found.append(line.least < group.num_units)
    return found


def check_budget(structure: Structure, prune: PruneConfig, kept_U: np.ndarray) -> None:
    """Checks what no scores could make possible, before any training.

    Args:
        kept_U: Units before the first round.

    Raises:
        PruneError: The bounds of the groups allow no choice that meets the target.
        ConfigError: The target is above what there is, or a glob matches no group.
    """
    budget = plan_budgets(structure, prune, kept_U)[-1]
    scores_U = np.zeros(structure.num_units)
    bounds = Bounds.of(prune)
    _Choice(structure, scores_U, kept_U, budget, bounds, is_by_layer=False).meet_floors()


def plan_budgets(structure: Structure, prune: PruneConfig, kept_U: np.ndarray) -> list[Budget]:
    """Lists the budget of every round; the last is the target exactly.

    The part of the dense network's cost that is gone follows `sparsity_schedule`, from that of the
    start on.

    Args:
        kept_U: Units before the first round.

    Raises:
        ConfigError: The target is above what there is, or layers that are to stay alike are not.
    """
    widths = structure.widths(kept_U)
    for numbers in alike(structure, prune.target.uniform):
        check_alike([structure.groups[i].name for i in numbers], [widths[i] for i in numbers])
    target, kind = prune.target, prune.target.kind or "sparsity"
    dense = count_cost(structure, kind, structure.everything)
    start = count_cost(structure, kind, kept_U)
    if kind == "sparsity":
        limit, gone = float(dense - num_to_prune(prune.sparsity, dense)), prune.sparsity
    else:
        limit = target.value * dense if target.value <= 1 else target.value
        gone = 1 - limit / dense if dense else 0.0
    final = Budget(kind, limit, is_by_cost=prune.spec.reads != "nothing")
    named = f"{final.field} = {prune.sparsity if kind == 'sparsity' else target.value:g}"
    if limit > dense:
        raise ConfigError(
            f"{named}: is more than the {dense:,} {_WORDS[kind]} of the dense network; lower it"
        )
    if limit > start:
        raise ConfigError(
            f"{named}: leaves {limit:,.0f} {_WORDS[kind]}, prune.initial_masks {start:,}, and "
            f"masks only ever remove; {'raise' if kind == 'sparsity' else 'lower'} it"
        )
    before = min(1 - start / dense, gone) if dense else 0.0
    if math.isclose(before, gone, abs_tol=1e-12):
        return [final] * prune.rounds  # a step between equal ends could round beyond them
    steps = sparsity_schedule(prune.schedule, gone, prune.rounds, prune.ramp_rounds, before)
    budgets = []
    for step in steps:
        stays = dense - num_to_prune(step, dense) if kind == "sparsity" else dense * (1 - step)
        earlier = replace(final, limit=float(stays), is_final=False)
        budgets.append(final if step == gone else earlier)
    return budgets


def _check_scores(structure: Structure, scores_U: np.ndarray, kept_U: np.ndarray) -> None:
    shape = (structure.num_units,)
    if scores_U.shape != shape or kept_U.shape != shape:
        raise PruneError(
            f"scores of units: shape {scores_U.shape}, and {kept_U.shape} of the kept ones, differ "
            f"from {shape} of the network; score and choose over the same units"
        )
    for group, scores_G, kept_G in zip(
        structure.groups, structure.split(scores_U), structure.split(kept_U), strict=True
    ):
        if num_bad := int(np.count_nonzero(~np.isfinite(scores_G[kept_G]))):
            raise PruneError(
                f"scores of '{group.name}': those of {num_bad} units are NaN or infinite; the "
                "criterion overflowed or the weights diverged"
            )


def _shares(structure: Structure, bounds: Bounds, key: str, default: float) -> list[float]:
    """Returns a bound of every group.

    Raises:
        ConfigError: A glob matches no group.
    """
    bound = getattr(bounds, key)
    if not isinstance(bound, Mapping):
        return [bound] * len(structure.groups)
    names = [_names_of(group) for group in structure.groups]
    every = list(dict.fromkeys(name for of_group in names for name in of_group))
    for pattern in bound:
        if not match_names(pattern, every):
            raise ConfigError(
                f"prune.layer_{key}.'{pattern}': matches no group of units and no tensor of one"
                f"{nearest_glob(pattern, every)}"
            )
    found = []
    for of_group in names:
        matching = [v for p, v in bound.items() if any(is_matched(n, [p]) for n in of_group)]
        found.append(matching[-1] if matching else default)
    return found


def _names_of(group: Group) -> list[str]:
    return list(dict.fromkeys([group.name, *(part.name for part in group.slices)]))


class _Line:
    """The kept units of a group, in the order in which they go, and how many are left.

    Of the groups of a dimension, as many units go at a time as there are groups, one of each.

    Attributes:
        start: Units at first.
        width: Units now; the first `start - width` in order are removed.
        floor: Width that a floor asks for at most.
        least: Least width within all bounds.
        last: Least width where there is no ceiling and no `min_width`.
    """

    def __init__(
        self, groups: Sequence[Group], units_SD: np.ndarray, scores_S: np.ndarray, bounds: Bounds
    ) -> None:
        self.names = tuple(group.name for group in groups)
        self.size, self.round_to = groups[0].num_units, bounds.round_to
        self.units_SD = units_SD
        self.first: list[int] = units_SD[:, 0].tolist()
        self.scores: list[float] = scores_S.tolist()
        self.start = self.width = self.floor = self.least = self.last = len(units_SD)

    @classmethod
    def of(
        cls,
        structure: Structure,
        numbers: Sequence[int],
        scores_U: np.ndarray,
        kept_U: np.ndarray,
        bounds: Bounds,
    ) -> _Line:
        """Returns that of the groups of one dimension."""
        orders = []
        for number in numbers:
            first, stop = structure.bounds[number : number + 2]
            order = first + np.flatnonzero(kept_U[first:stop])
            # Stable: equal scores go by unit number.
            orders.append(order[np.argsort(scores_U[order], kind="stable")])
        groups = [structure.groups[number] for number in numbers]
        units_SD = np.stack(orders, axis=1)
        scores_S = scores_U[units_SD[:, 0]]
        if len(orders) > 1:
            scores_S = np.array([math.fsum(row) for row in scores_U[units_SD]])
        return cls(groups, units_SD, scores_S, bounds)

    def bound(self, bounds: Bounds, low: float, high: float) -> None:
        """Sets the widths that are allowed."""
        self.last = max(1, self._rounded_up(1))
        ceiling = self.size - math.floor(high * self.size + _TINY)
        self.least = self._rounded_up(max(1, bounds.min_width, ceiling))
        floor = self.size - math.floor(low * self.size + _TINY)
        self.floor = max(self.least, self._rounded_up(floor))

    def _rounded_up(self, width: int) -> int:
        """Returns the next width that a decision may leave."""
        return min(self.start, -(-width // self.round_to) * self.round_to)

    @property
    def below(self) -> int:
        """Returns the next lower width, 0 for none."""
        return max(0, (self.width - 1) // self.round_to * self.round_to)

    @property
    def above(self) -> int:
        """Returns the next higher width, which is at most the first."""
        return self._rounded_up(self.width + 1)

    def first_unit(self, width: int) -> int:
        """Returns the unit that goes first below a width."""
        return self.first[self.start - width]

    def score(self, high: int, low: int) -> float:
        """Adds up the scores of the units that go from one width to a lower one."""
        if high == low + 1:
            return self.scores[self.start - high]
        return math.fsum(self.scores[self.start - high : self.start - low])

    def share(self, high: int, low: int) -> float:
        """Returns the share of units that is gone in the middle of a step.

        Steps in this order leave every group at the same share, rounded to the nearest step.
        """
        return (2 * self.size - high - low) / (2 * self.size)


class _Choice:
    """One decision on its way.

    Attributes:
        lines: One for each group, or for each dimension.
        tops: Width of each up to which units may come back.
        held: Those that their least width kept from a step whose turn it was.
    """

    def __init__(
        self,
        structure: Structure,
        scores_U: np.ndarray,
        kept_U: np.ndarray,
        budget: Budget,
        bounds: Bounds,
        *,
        is_by_layer: bool,
    ) -> None:
        self.kept_U, self.budget, self.is_by_layer = kept_U, budget, is_by_layer
        lows = _shares(structure, bounds, "min_sparsity", 0.0)
        highs = _shares(structure, bounds, "max_sparsity", 1.0)
        dimensions = alike(structure, bounds.is_uniform)
        self.lines = []
        for numbers in dimensions:
            line = _Line.of(structure, numbers, scores_U, kept_U, bounds)
            line.bound(bounds, max(lows[i] for i in numbers), min(highs[i] for i in numbers))
            self.lines.append(line)
        self.tops = [line.start for line in self.lines]
        self.held: set[int] = set()
        products = join(products_of(structure, budget.kind), dimensions)
        self.costs = Costs(products, self.tops)
        narrowest = [line.least for line in self.lines]
        least = sum(product.value(narrowest) for product in products)
        if least > budget.limit:
            sizes = [line.size for line in self.lines]
            dense = sum(product.value(sizes) for product in products)
            raise PruneError(_describe_unreachable(budget, least, dense, structure.frozen))

    @property
    def is_met(self) -> bool:
        """Returns True where no more than the limit stays."""
        return self.costs.total <= self.budget.limit

    def meet_floors(self) -> None:
        """Removes what floors ask for: all of it, or, before the last decision, up to the limit.

        Raises:
            PruneError: That is more than a final budget asks for.
        """
        below = [i for i, line in enumerate(self.lines) if line.width > line.floor]
        heap = [self._share(number) for number in below]
        heapq.heapify(heap)
        while heap and (self.budget.is_final or not self.is_met):
            number = heap[0][2]
            line = self.lines[number]
            self._move(number, line.below)
            if line.width > line.floor:
                heapq.heapreplace(heap, self._share(number))
            else:
                heapq.heappop(heap)
        if heap:
            return
        self.tops = [line.floor for line in self.lines]
        if self.budget.is_final and any(self._fits(i, self.lines[i].above) for i in below):
            names = name_some([f"'{self.lines[i].names[0]}'" for i in below], 3)
            raise PruneError(_describe_too_low(self.budget, self.costs.total, names))

    def shrink(self) -> None:
        """Removes the step with the lowest price until the limit is met."""
        heap = [self._price(i) for i, line in enumerate(self.lines) if line.below >= line.last]
        heapq.heapify(heap)
        while heap and not self.is_met:
            number = heap[0][2]
            line, fresh = self.lines[number], self._price(number)
            if fresh > heap[0]:
                heapq.heapreplace(heap, fresh)
                continue
            if line.below < line.least:
                self.held.add(number)
                heapq.heappop(heap)
                continue
            self._move(number, line.below)
            if line.below >= line.last:
                heapq.heapreplace(heap, self._price(number))
            else:
                heapq.heappop(heap)

    def put_back(self) -> None:
        """Puts the step with the highest price back, as long as one fits."""
        heap = [self._worth(i) for i, line in enumerate(self.lines) if line.width < self.tops[i]]
        heapq.heapify(heap)
        while heap:
            number = heap[0][2]
            line, fresh = self.lines[number], self._worth(number)
            if not self._fits(number, line.above):
                # What comes back later makes it only larger.
                heapq.heappop(heap)
            elif fresh > heap[0]:
                heapq.heapreplace(heap, fresh)
            else:
                self._move(number, line.above)
                if self.is_by_layer or line.width >= self.tops[number]:
                    heapq.heappop(heap)
                else:
                    heapq.heapreplace(heap, self._worth(number))

    def finish(self) -> UnitChoice:
        """Returns the decision."""
        kept_U = self.kept_U.copy()
        for line in self.lines:
            kept_U[line.units_SD[: line.start - line.width]] = False
        names = [
            name
            for number, line in enumerate(self.lines)
            # One that took units back has lost fewer than it might.
            if number in self.held and line.width == line.least
            for name in line.names
        ]
        return UnitChoice(kept_U, self.costs.total, tuple(names))

    def _move(self, number: int, width: int) -> None:
        self.costs.move(number, width - self.lines[number].width)
        self.lines[number].width = width

    def _fits(self, number: int, width: int) -> bool:
        more = self.costs.change(number, width - self.lines[number].width)
        return self.costs.total + more <= self.budget.limit

    def _share(self, number: int) -> _Price:
        """Prices the next step by the share of the group that is gone then."""
        line = self.lines[number]
        return line.share(line.width, line.below), line.first_unit(line.width), number

    def _price(self, number: int) -> _Price:
        """Prices the next step, as its scope does."""
        if self.is_by_layer:
            return self._share(number)
        line = self.lines[number]
        score = line.score(line.width, line.below)
        price = self._per_cost(score, -self.costs.change(number, line.below - line.width))
        return price, line.first_unit(line.width), number

    def _worth(self, number: int) -> _Price:
        """Returns the price of the step that comes back next, as the lowest of a heap."""
        line = self.lines[number]
        if self.is_by_layer:
            price = line.share(line.above, line.width)
        else:
            score = line.score(line.above, line.width)
            price = self._per_cost(score, self.costs.change(number, line.above - line.width))
        return -price, -line.first_unit(line.above), number

    def _per_cost(self, score: float, cost: int) -> float:
        """Returns a score per cost; a negative one as it is, so that larger gains come first."""
        if score < 0 or not self.budget.is_by_cost:
            return score
        return score / cost if cost else math.inf


def _describe_unreachable(budget: Budget, least: int, dense: int, frozen: Mapping[str, str]) -> str:
    """Says that groups as narrow as they may be cost more than the limit."""
    share = least / dense if dense else 1.0
    if budget.kind == "sparsity":
        remedy = f"lower it to {math.floor((1 - share) * 1e4) / 1e4:g}"
    else:
        remedy = f"raise it to {math.ceil(share * 1e4) / 1e4:g}"
    fixed = [f"'{axis}' ({why})" for axis, why in frozen.items()]
    return (
        f"{budget.field}: allows {budget.limit:,.0f} {_WORDS[budget.kind]} to stay, and at least "
        f"{least:,} of {dense:,} do, as each group keeps a unit, or what its bounds ask for; "
        f"{remedy}, raise prune.layer_max_sparsity, or lower prune.min_width or prune.round_to"
        f"{f'; fixed are {name_some(fixed, 3)}' if fixed else ''}"
    )


def _describe_too_low(budget: Budget, total: int, names: str) -> str:
    """Says that floors remove more than the limit asks for."""
    return (
        f"prune.layer_min_sparsity: leaves {total:,} {_WORDS[budget.kind]}, and {budget.field} "
        f"allows {budget.limit:,.0f}, because it takes units of {names}; lower it, or "
        f"{'raise' if budget.kind == 'sparsity' else 'lower'} {budget.field}"
    )
