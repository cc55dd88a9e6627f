"""Sparsities by layer and overlaps of masks, for a few trials of a workload.

The index does not hold this; it is read from the rounds themselves, so it is bounded: a few
sparsities that most curves have, a few curves, a few seeds, and no more masks at a time than fit
the memory set aside for them. The page lists what was left out.

Two masks overlap by the kept weights that they share over those that either keeps. Beside it stands
the overlap to be expected of masks that keep as many weights of each layer, drawn at random: below
that nothing is shared but the layers' sparsities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from gbp_ray.errors import StoreError
from gbp_ray.report.curves import Curve, Trial, WorkloadCurves, pick_targets
from gbp_ray.report.spreads import Spread
from gbp_ray.results.goals import Goal
from gbp_ray.results.index import map_in_threads
from gbp_ray.results.records import RoundRecord
from gbp_ray.results.store import Store
from gbp_ray.results.tensors import MASKS, PackedMask, Shared, compare_masks, read_masks, sum_shared

__all__ = [
    "CloseUp",
    "Overlap",
    "look_closely",
]

_NUM_TARGETS = 3
_NUM_CURVES = 8
_NUM_SEEDS = 5
_MASK_BYTES = 256_000_000


@dataclass(frozen=True)
class Overlap:
    """The overlap of the masks of two curves, or of the seeds of one.

    Attributes:
        one: A curve's label.
        other: Another one's; the same for its own seeds.
        overlap: Over pairs of masks: of two curves those of one seed, of one curve those of two
            seeds. The pairs of one curve share masks: their deviation is not an error of the mean.
        chance: The mean expected of random masks.
    """

    one: str
    other: str
    overlap: Spread
    chance: float


@dataclass
class CloseUp:
    """The trials of one sparsity.

    Attributes:
        goal: What was asked for.
        layers: Layer to curve to its sparsity over seeds, in the network's order.
        unpruned: Of which matrices nothing was pruned and why, a sentence for each kind of trial.
        overlaps: Of all pairs that there are.
        num_masks: Masks that were compared.
        widths: Of whole units, group to curve to its units left over seeds, the input's first.
        dense: Group to its kind and its units in the dense network.
    """

    goal: Goal
    layers: dict[str, dict[str, Spread]]
    unpruned: tuple[str, ...] = ()
    overlaps: list[Overlap] = field(default_factory=list)
    num_masks: int = 0
    widths: dict[str, dict[str, Spread]] = field(default_factory=dict)
    dense: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def target(self) -> float:
        """The sparsity that was asked for, or what may be left."""
        return self.goal.value


def look_closely(
    curves: WorkloadCurves, stores: Mapping[str, Store], *, mask_bytes: int = _MASK_BYTES
) -> tuple[list[CloseUp], list[str]]:
    """Reads the last rounds of a few trials of a workload, and their masks.

    Args:
        stores: The jobs by name.
        mask_bytes: Memory that masks may take at a time.

    Returns:
        The close-ups by sparsity, and what was left out, a sentence each.

    Raises:
        TransientStoreError: The storage does not answer.
    """
    left_out = []
    shown = curves.curves[:_NUM_CURVES]
    if len(curves.curves) > len(shown):
        left_out.append(
            f"layers and masks: {len(curves.curves) - len(shown)} of {len(curves.curves)} curves"
        )
    targets = pick_targets(shown, _NUM_TARGETS)
    if len(curves.targets) > len(targets):
        words = ", ".join(f"{target:.4g}" for target in targets)
        what = f"targets of {curves.kind}" if curves.has_units else "sparsities"
        left_out.append(f"layers and masks: {what} other than {words}")
    goals = [Goal(curves.kind, target) for target in targets]
    found = [_look_at(goal, shown, stores, mask_bytes, left_out) for goal in goals]
    return [item for item in found if item is not None], list(dict.fromkeys(left_out))


def _look_at(
    goal: Goal,
    curves: Sequence[Curve],
    stores: Mapping[str, Store],
    mask_bytes: int,
    left_out: list[str],
) -> CloseUp | None:
    chosen = _choose(goal.value, curves, left_out)
    objects = next(iter(stores.values())).objects

    def read(item: tuple[Curve, Trial]) -> RoundRecord | None:
        trial = item[1]
        number = trial.final.round
        try:
            record = stores[trial.job].read_round(trial.trial_id, number)
        except StoreError as error:
            _note(error, left_out)
            return None
        if record is None:
            left_out.append(f"round {number} of {trial.trial_id}, which is missing")
        return record

    pairs = zip(chosen, map_in_threads(objects, read, chosen), strict=True)
    records = [(curve, trial, record) for (curve, trial), record in pairs if record is not None]
    if not records:
        return None
    layers, widths = _Values(), _Values()
    dense = {}
    for curve, _, record in records:
        for layer in record.cost.layers:
            layers.add(layer.name, curve.label, layer.sparsity)
        for width in record.cost.units.widths if record.cost.units else ():
            widths.add(width.name, curve.label, width.num_kept)
            dense[width.name] = width.kind, width.num_units
    close_up = CloseUp(
        goal,
        layers.spread(),
        tuple(dict.fromkeys(w for _, _, record in records if (w := record.cost.unpruned_in_words))),
        widths=widths.spread(),
        dense=dense,
    )
    _compare_masks(close_up, records, stores, mask_bytes, left_out)
    return close_up


class _Values:
    """Values by name and curve, of which the spread over seeds is wanted."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {}

    def add(self, name: str, label: str, value: float) -> None:
        self._values.setdefault(name, {}).setdefault(label, []).append(value)

    def spread(self) -> dict[str, dict[str, Spread]]:
        return {
            name: {
                label: spread for label, found in by_curve.items() if (spread := Spread.of(found))
            }
            for name, by_curve in self._values.items()
        }


def _choose(
    target: float, curves: Sequence[Curve], left_out: list[str]
) -> list[tuple[Curve, Trial]]:
    """Picks trials seed by seed, so that what has to be left out is the last seeds."""
    points = [(curve, point) for curve in curves if (point := curve.at(target))]
    # Seeds that most curves have come first: masks of different curves are compared within a seed.
    counts: dict[int, int] = {}
    for _, point in points:
        for seed in point.seeds:
            counts[seed] = counts.get(seed, 0) + 1
    seeds = sorted(counts, key=lambda seed: (-counts[seed], seed))
    if len(seeds) > _NUM_SEEDS:
        left_out.append(f"layers and masks: seeds beyond {_NUM_SEEDS} of each curve")
    by_seed = [(curve, {trial.seed: trial for trial in point.trials}) for curve, point in points]
    return [
        (curve, trials[seed])
        for seed in seeds[:_NUM_SEEDS]
        for curve, trials in by_seed
        if seed in trials
    ]


# -- masks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mask:
    label: str
    seed: int
    masks: dict[str, PackedMask]


def _compare_masks(
    close_up: CloseUp,
    records: list[tuple[Curve, Trial, RoundRecord]],
    stores: Mapping[str, Store],
    mask_bytes: int,
    left_out: list[str],
) -> None:
    stored = [item for item in records if MASKS in item[2].files]
    if len(stored) < 2:
        return
    # Reading a mask takes its size once more for a moment.
    fitting = mask_bytes // max(item[2].files[MASKS].num_bytes for item in stored) - 1
    if fitting < len(stored):
        left_out.append(
            f"masks: {len(stored) - max(0, fitting)} of {len(stored)} at {_name(close_up)}"
            f", which do not fit into {mask_bytes / 1e6:.0f} MB"
        )
        stored = stored[: max(0, fitting)]
    objects = next(iter(stores.values())).objects

    def read(item: tuple[Curve, Trial, RoundRecord]) -> _Mask | None:
        curve, trial, record = item
        try:
            masks = read_masks(stores[trial.job], trial.trial_id, record)
        except StoreError as error:
            _note(error, left_out)
            return None
        return _Mask(curve.label, trial.seed, masks)

    masks = [mask for mask in map_in_threads(objects, read, stored) if mask is not None]
    close_up.num_masks = len(masks)
    found: dict[tuple[str, str], list[Shared]] = {}
    for one, other in combinations(masks, 2):
        is_same_curve = one.label == other.label
        # Of two curves only masks of one seed tell the criteria apart from the seeds.
        if is_same_curve != (one.seed == other.seed):
            shared = sum_shared(compare_masks(one.masks, other.masks).values())
            if shared.either:
                found.setdefault((one.label, other.label), []).append(shared)
    for (one_label, other_label), measured in found.items():
        overlap = Spread.of(shared.overlap for shared in measured)
        chance = Spread.of(shared.chance for shared in measured)
        if overlap and chance:
            close_up.overlaps.append(Overlap(one_label, other_label, overlap, chance.mean))


def _name(close_up: CloseUp) -> str:
    is_sparsity = close_up.goal.kind == "sparsity"
    return f"sparsity {close_up.target:.4g}" if is_sparsity else str(close_up.goal)


def _note(error: StoreError, left_out: list[str]) -> None:
    if type(error) is not StoreError:
        # The storage does not answer; the results may be sound.
        raise error
    left_out.append(str(error))
