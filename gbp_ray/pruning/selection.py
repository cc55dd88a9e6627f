"""Which units to remove: exactly k of them, the lowest scores first, whatever the ties and bounds.

Removing the lowest scores is a choice among laminar bounds: groups of an n:m pattern lie inside
layers, layers inside the whole. For such bounds the greedy choice is optimal and has a closed form:
within each group the highest n are exempt, and the whole has one threshold, up to which every layer
gives what it has, but no less than its floor and no more than its ceiling.

Each rank decides over its own slices, and the decision is one: thresholds come from counts summed
over all ranks (`thresholds`), and so do the shares of equal scores. Beyond that, ranks exchange
only their slices of the masks, one bit a weight. The order of collectives depends only on those
counts, which all ranks know.

Equal scores are taken by global flat index (parameter name order, then C order), so the choice is a
function of the scores only. Zeros of both signs are equal. Weights pruned before stay pruned and
count towards k.

Where rows compete, each layer's number is split over its rows, the first ones taking one more where
it does not divide. Rows are whole on a rank, so each chooses in its own.

Scores are compared in float32, or in float64 where any of them is; narrower floats are widened,
which keeps their order.

Shape suffixes: N = prunable weights of the model, L = weights of one layer in this rank's slice,
R = its rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gbp_ray.config.prune import PruneConfig
from gbp_ray.config.schema import is_matched, match_names, nearest_glob
from gbp_ray.distributed.ranks import Ranks, empty_vector
from gbp_ray.distributed.sharding import (
    RankSlice,
    gather_packed,
    is_shard,
    local,
    local_slice,
    shard_from_rows,
)
from gbp_ray.errors import ConfigError, PruneError, name_some
from gbp_ray.pruning.counting import ScoreView, as_score_view
from gbp_ray.pruning.masks import MaskSet, Removal
from gbp_ray.pruning.thresholds import Cut, Pool, find_cuts
from gbp_ray.pruning.units import Prunable, SlicedScores, num_to_prune

__all__ = ["check_reachable", "check_selectable", "check_units", "select_masks", "share_out"]

_NOTHING = Cut(-math.inf, 0, 0)


@dataclass
class _Layer:
    """One layer in the pool: this rank's scores as they compete, and numbers of the whole layer.

    Attributes:
        quota: How many weights it loses, those pruned before included.
        cut: Where its losses end.
        num_equal: How many of this rank's scores equal to the cut's go; None for all.
        gone_R: How many weights each of this rank's rows loses, where rows compete.
    """

    rank_slice: RankSlice
    scores: ScoreView
    num_pruned: int = 0
    num_exempt: int = 0
    floor: int = 0
    ceiling: int = 0
    quota: int = 0
    cut: Cut = _NOTHING
    num_equal: int | None = None
    gone_R: Tensor | None = None

    @property
    def name(self) -> str:
        return self.rank_slice.name

    @property
    def size(self) -> int:
        return math.prod(self.rank_slice.shape)

    @property
    def is_split(self) -> bool:
        """Returns True where some, but not all, of the scores equal to the cut's go."""
        return self.cut.below < self.quota < self.cut.below + self.cut.equal

    @property
    def width(self) -> int:
        """Returns how many weights a row has."""
        return self.size // self.rank_slice.shape[0]

    @property
    def rows(self) -> slice:
        """Returns which rows of the layer this rank has."""
        return slice(self.rank_slice.start // self.width, self.rank_slice.stop // self.width)

    def write_mask(self, kept_L: Tensor) -> None:
        if self.gone_R is not None:
            # Stable: equal scores go by flat index.
            order = self.scores.filled().view(-1, self.width).argsort(dim=1, stable=True)
            places = torch.arange(order.shape[1], device=order.device)
            stays = places >= self.gone_R[:, None].to(order.device)
            kept_L.view(order.shape).scatter_(1, order, stays)
            return
        self.scores.write_mask(self.cut.threshold, self.num_equal, kept_L)


def select_masks(
    scores: SlicedScores | Mapping[str, Tensor],
    masks: MaskSet,
    config: PruneConfig,
    sparsity: float,
    input_dims: Mapping[str, int | None] | None = None,
    ranks: Ranks | None = None,
) -> Removal:
    """Removes units until exactly round(sparsity * N) are gone. Communicates.

    Args:
        scores: This rank's slices, or, with one rank, parameter name to saliency, shaped like the
            weights; the lowest go first.
        masks: The masks so far; pruned weights stay pruned and their scores are ignored.
        config: Scope, granularity and the bounds per layer.
        sparsity: Of this round, in [0, 1).
        input_dims: Axis of the n:m groups by parameter name; 1 where not given, None if unknown.

    Raises:
        PruneError: A score is NaN or infinite, or the bounds leave no choice of that size.
        ConfigError: An n:m pattern does not divide a layer, the axis of its inputs is unknown, or a
            bound's glob matches no layer.
    """
    ranks = ranks or Ranks()
    if not isinstance(scores, SlicedScores):
        for name, mask in masks.items():
            if scores[name].shape != mask.shape:
                raise PruneError(
                    f"scores of '{name}': shape {tuple(scores[name].shape)} differs from the "
                    f"weights' {tuple(mask.shape)}"
                )
        scores = SlicedScores.from_full({name: scores[name] for name in masks})
    check_selectable({name: tuple(mask.shape) for name, mask in masks.items()}, config, input_dims)
    layers = _make_layers(scores, masks, config, input_dims or {}, ranks)
    k = num_to_prune(sparsity, masks.num_units)
    _check_possible(layers, k, sparsity, config)
    share = _share_globally if config.scope == "global" else _share_by_layer
    capped_layers = share(layers, k, ranks)
    if config.scope == "row":
        _share_by_row(layers, ranks)
    else:
        _find_ends(layers, ranks)
    place = scores.values[0].device
    is_replicated = not any(is_shard(mask) for mask in masks.values())
    if is_replicated and ranks.world_size > 1:
        found = _exchange_masks(layers, place, ranks)
    else:
        kept = _allocate([layer.scores.size for layer in layers], place)
        for layer, kept_L in zip(layers, kept, strict=True):
            layer.write_mask(kept_L)
        found = {
            name: shard_from_rows(kept_L.view(local(before).shape).to(before.device), before)
            for (name, before), kept_L in zip(masks.items(), kept, strict=True)
        }
    device = next(iter(masks.values())).device
    chosen = MaskSet(found, masks.round + 1, config.criterion, masks.digest).to(device)
    assert chosen.num_pruned == max(k, sum(layer.num_pruned for layer in layers))
    return Removal(chosen, capped_layers=tuple(capped_layers))


def check_units(units: Collection[Prunable], config: PruneConfig) -> None:
    """Checks what no scores could make possible; see `check_selectable`, `check_reachable`."""
    shapes = {unit.name: tuple(unit.parameter.shape) for unit in units}
    axes = {unit.name: unit.input_dim for unit in units}
    check_selectable(shapes, config, axes, {unit.name: unit.num_groups for unit in units})
    check_reachable(shapes, config)


def check_selectable(
    shapes: Mapping[str, tuple[int, ...]],
    config: PruneConfig,
    input_dims: Mapping[str, int | None] | None = None,
    num_groups: Mapping[str, int] | None = None,
) -> None:
    """Checks what no scores could make possible, before any training.

    Args:
        input_dims: Axis of the n:m groups by parameter name; 1 where not given, None if unknown.
        num_groups: How many groups of a convolution lie along it, which an n:m group must not
            cross; 1 where not given.

    Raises:
        ConfigError: An n:m pattern does not divide a layer, the axis of its inputs is unknown, or a
            bound's glob matches no layer.
    """
    if config.unit_kinds:
        raise ConfigError(
            f"prune.granularity = '{config.granularity}': removes whole units, and this is a "
            'choice of single weights; set it to "weight" or "n:m"'
        )
    for key in ("layer_min_sparsity", "layer_max_sparsity"):
        bound = getattr(config, key)
        for pattern in bound if isinstance(bound, dict) else ():
            if not match_names(pattern, shapes):
                raise ConfigError(
                    f"prune.{key}.'{pattern}': matches no prunable parameter"
                    f"{nearest_glob(pattern, shapes)}"
                )
    if config.scope == "row":
        others = [f"'{name}'" for name in shapes if (input_dims or {}).get(name, 1) != 1]
        if others:
            raise ConfigError(
                "prune.scope = 'row': compares the inputs of each output, and the outputs of "
                f"{name_some(others, 3)} do not lie along the first axis; name such layers in "
                "prune.exclude, or set it to layer"
            )
    if config.pattern is None:
        return
    _, m = config.pattern
    axes = {name: (input_dims or {}).get(name, 1) for name in shapes}
    if unknown := [f"'{name}'" for name, axis in axes.items() if axis is None]:
        raise ConfigError(
            f"prune.granularity = '{config.granularity}': runs along the inputs, and which axis of "
            f"{name_some(unknown, 3)} these are is not known; leave it out of prune.include"
        )
    sizes = {
        name: shapes[name][axis] // (num_groups or {}).get(name, 1)
        for name, axis in axes.items()
        if axis is not None
    }
    misfits = [f"'{name}' has {size}" for name, size in sizes.items() if size % m]
    if misfits:
        raise ConfigError(
            f"prune.granularity = '{config.granularity}': needs input sizes divisible by {m}, but "
            f"{', '.join(misfits)}; name such layers in prune.exclude"
        )


def check_reachable(shapes: Mapping[str, tuple[int, ...]], config: PruneConfig) -> None:
    """Checks that the bounds of the layers allow the final sparsity.

    Raises:
        ConfigError: Naming prune.sparsity and the layers whose bounds are in the way.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    k = num_to_prune(config.sparsity, total)
    n, m = config.pattern or (0, 1)
    most = {
        name: min(_ceiling_of(name, size, config), size - size * n // m)
        for name, size in sizes.items()
    }
    least = {name: min(_least_of(name, size, config), most[name]) for name, size in sizes.items()}
    asked = f"prune.sparsity = {config.sparsity:g}: asks for {k} of {total} weights, but the layers"
    if k > sum(most.values()):
        tight = [
            f"'{name}' {most[name]} of {size}"
            for name, size in sizes.items()
            if most[name] < config.sparsity * size - 1e-9
        ]
        raise ConfigError(
            f"{asked} may lose {sum(most.values())} at most ({name_some(tight)}); "
            "lower it or raise prune.layer_max_sparsity"
        )
    if k < sum(least.values()):
        tight = [
            f"'{name}' {least[name]} of {size}"
            for name, size in sizes.items()
            if least[name] > config.sparsity * size + 1e-9
        ]
        raise ConfigError(
            f"{asked} must lose {sum(least.values())} at least ({name_some(tight)}); "
            "raise it or lower prune.layer_min_sparsity"
        )


def _make_layers(
    scores: SlicedScores,
    masks: MaskSet,
    config: PruneConfig,
    input_dims: Mapping[str, int | None],
    ranks: Ranks,
) -> list[_Layer]:
    is_wide = any(values.dtype is torch.float64 for values in scores.values)
    dtype = torch.float64 if is_wide else torch.float32
    layers = []
    counts = torch.zeros(len(scores.slices), 3, dtype=torch.int64)
    for number, (rank_slice, values) in enumerate(zip(scores.slices, scores.values, strict=True)):
        name, shape = rank_slice.name, rank_slice.shape
        kept_L = local_slice(masks[name], rank_slice).to(values.device)
        view = as_score_view(values.detach().to(dtype), kept_L)
        num_bad = view.size - view.num_pruned - view.count_finite()
        if config.pattern is not None:
            # Slices end where rows end, or hold all of a layer, so groups are whole.
            axis = input_dims.get(name, 1)
            assert axis is not None  # check_selectable has refused it
            view = view.protect_top_n(*config.pattern, shape, axis)
        counts[number] = torch.tensor([num_bad, view.num_exempt, view.num_pruned])
        layers.append(_Layer(rank_slice, view))
    ranks.all_reduce_counts(counts)
    for layer, (num_bad, num_exempt, num_pruned) in zip(layers, counts.tolist(), strict=True):
        if num_bad:
            raise PruneError(
                f"scores of '{layer.name}': {num_bad} are NaN or infinite; the criterion "
                f"'{config.criterion}' overflowed or the weights diverged"
            )
        layer.num_exempt, layer.num_pruned = num_exempt, num_pruned
        size = layer.size
        floor = num_to_prune(_bound_of(layer.name, config.layer_min_sparsity, 0.0), size)
        ceiling = min(_ceiling_of(layer.name, size, config), size - num_exempt)
        layer.ceiling = max(ceiling, num_pruned)
        layer.floor = max(min(floor, layer.ceiling), num_pruned)
    return layers


def _ceiling_of(name: str, size: int, config: PruneConfig) -> int:
    """Counts how many weights of a dense layer may go at most."""
    ceiling = math.floor(_bound_of(name, config.layer_max_sparsity, 1.0) * size + 1e-9)
    # A layer without a weight passes nothing on, so one always stays.
    return min(ceiling, size - 1)


def _least_of(name: str, size: int, config: PruneConfig) -> int:
    """Counts how many weights of a layer its floor asks for.

    Rounded down: otherwise rounding could take the sum of all floors past k by a weight or two.
    """
    return math.floor(_bound_of(name, config.layer_min_sparsity, 0.0) * size + 1e-9)


def _bound_of(name: str, bound: float | dict[str, float], default: float) -> float:
    if not isinstance(bound, dict):
        return bound
    matching = [value for pattern, value in bound.items() if is_matched(name, [pattern])]
    return matching[-1] if matching else default


def _check_possible(layers: list[_Layer], k: int, sparsity: float, config: PruneConfig) -> None:
    total = sum(layer.size for layer in layers)
    most = sum(layer.ceiling for layer in layers)
    asked = f"prune.sparsity = {sparsity:g}: asks for {k} of {total} weights, but the layers'"
    if k > most:
        raise PruneError(
            f"{asked} ceilings allow {most} (sparsity {most / total:.4f}); lower the sparsity or "
            "raise prune.layer_max_sparsity"
        )
    if sparsity < config.sparsity:
        return  # Earlier rounds may stay below the floors.
    least = 0
    for layer in layers:
        floor = _least_of(layer.name, layer.size, config)
        least += max(min(floor, layer.ceiling), layer.num_pruned)
    if least > max(k, sum(layer.num_pruned for layer in layers)):
        raise PruneError(
            f"{asked} floors ask for {least} (sparsity {least / total:.4f}); raise the sparsity or "
            "lower prune.layer_min_sparsity"
        )


def _share_globally(layers: list[_Layer], k: int, ranks: Ranks) -> list[str]:
    """Sets quotas and cuts as all weights compete; returns the layers capped by their ceiling."""
    num_pruned = sum(layer.num_pruned for layer in layers)
    forced = [max(layer.floor - layer.num_pruned, 0) for layer in layers]
    budget = max(k - num_pruned, 0)
    # An early round may ask for less than all floors together: floors then share it by size.
    if sum(forced) > budget:
        forced = share_out(budget, [layer.size for layer in layers], [0] * len(layers), forced)
    low = tuple(layer.num_pruned + n for layer, n in zip(layers, forced, strict=True))
    high = tuple(layer.ceiling for layer in layers)
    pool = Pool(tuple(range(len(layers))), max(k, num_pruned), low, high)
    cuts = find_cuts([layer.scores for layer in layers], [pool], ranks)
    for layer, cut, least in zip(layers, cuts, low, strict=True):
        layer.quota = min(max(cut.below, least), layer.ceiling)
    left = pool.target - sum(layer.quota for layer in layers)
    capped = []
    for layer, cut in zip(layers, cuts, strict=True):
        wanted = min(cut.below + cut.equal, max(layer.quota, cut.below) + left)
        if wanted > layer.ceiling:
            capped.append(layer.name)
        taken = min(max(wanted, layer.quota), layer.ceiling)
        left -= taken - layer.quota
        layer.quota = taken
        # A layer at one of its bounds ends elsewhere than the pool does.
        if taken and cut.below <= taken <= cut.below + cut.equal:
            layer.cut = cut
    return capped


def _share_by_layer(layers: list[_Layer], k: int, ranks: Ranks) -> list[str]:
    """Sets quotas of the same sparsity, to the unit; returns the layers capped by their ceiling."""
    sizes = [layer.size for layer in layers]
    low = [layer.num_pruned for layer in layers]
    floors = [layer.floor for layer in layers]
    ceilings = [layer.ceiling for layer in layers]
    # An early round may ask for less than all floors together, and then no layer exceeds its own.
    within = (low, floors) if sum(floors) > k else (floors, ceilings)
    for layer, quota in zip(layers, share_out(k, sizes, *within), strict=True):
        layer.quota = quota
    wanted = share_out(k, sizes, low, sizes)
    return [layer.name for layer, n in zip(layers, wanted, strict=True) if n > layer.ceiling]


def _share_by_row(layers: list[_Layer], ranks: Ranks) -> None:
    """Splits what each layer loses evenly over its rows, to the weight. Communicates."""
    for layer in layers:
        gone_R = torch.zeros(layer.rank_slice.shape[0], dtype=torch.int64)
        if layer.num_pruned:
            is_pruned = layer.scores.filled().view(-1, layer.width).isneginf()
            gone_R[layer.rows] = is_pruned.sum(dim=1).cpu()
            ranks.all_reduce_counts(gone_R)
        # The highest level that all rows can be filled up to.
        low, high = 0, layer.width
        while low < high:
            middle = (low + high + 1) // 2
            fits = int(gone_R.clamp(min=middle).sum()) <= layer.quota
            low, high = (middle, high) if fits else (low, middle - 1)
        (at_level,) = (gone_R <= low).nonzero(as_tuple=True)
        gone_R.clamp_(min=low)
        gone_R[at_level[: layer.quota - int(gone_R.sum())]] += 1
        layer.gone_R = gone_R[layer.rows]


def share_out(total: int, sizes: list[int], low: list[int], high: list[int]) -> list[int]:
    """Splits `total` in proportion to `sizes` within [low, high], exactly.

    Finds the common share s for which sum(clip(s * size, low, high)) = total, then hands the
    rounding remainder to the largest fractions, the first of equal ones.
    """
    total = min(max(total, sum(low)), sum(high))
    lower = 0.0
    upper = 1.0 + max((most / size for most, size in zip(high, sizes, strict=True)), default=0.0)
    for _ in range(200):
        share = (lower + upper) / 2
        if not lower < share < upper:
            break
        filled = sum(
            min(max(share * size, lo), hi) for size, lo, hi in zip(sizes, low, high, strict=True)
        )
        lower, upper = (share, upper) if filled < total else (lower, share)
    exact = [min(max(upper * size, lo), hi) for size, lo, hi in zip(sizes, low, high, strict=True)]
    counts = [
        min(max(math.floor(value), lo), hi) for value, lo, hi in zip(exact, low, high, strict=True)
    ]
    by_fraction = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    missing = total - sum(counts)
    while missing != 0:
        step = 1 if missing > 0 else -1
        for index in by_fraction if step > 0 else reversed(by_fraction):
            if missing and low[index] <= counts[index] + step <= high[index]:
                counts[index] += step
                missing -= step
    return counts


def _find_ends(layers: list[_Layer], ranks: Ranks) -> None:
    """Finds where each layer ends when it loses its quota of lowest scores. Communicates."""
    unknown = [layer for layer in layers if layer.quota and layer.cut is _NOTHING]
    pools = [Pool((i,), layer.quota, (0,), (layer.size,)) for i, layer in enumerate(unknown)]
    if pools:
        cuts = find_cuts([layer.scores for layer in unknown], pools, ranks)
        for layer, cut in zip(unknown, cuts, strict=True):
            layer.cut = cut
    table = torch.zeros(ranks.world_size, len(layers), dtype=torch.int64)
    for number, layer in enumerate(layers):
        # Where all equal scores go, or none, which is nearly everywhere, nobody counts them.
        if layer.is_split:
            table[ranks.rank, number] = layer.scores.count_equal(layer.cut.threshold)
    before = ranks.all_reduce_counts(table)[: ranks.rank].sum(dim=0).tolist()
    for layer, earlier in zip(layers, before, strict=True):
        if layer.is_split:
            # Equal scores go in flat order: those of earlier ranks first.
            layer.num_equal = max(layer.quota - layer.cut.below - earlier, 0)
        else:
            layer.num_equal = None if layer.quota > layer.cut.below else 0


def _allocate(sizes: list[int], device: torch.device) -> list[Tensor]:
    return list(empty_vector(sum(sizes), torch.bool, device).split(sizes))


def _exchange_masks(layers: list[_Layer], device: torch.device, ranks: Ranks) -> dict[str, Tensor]:
    """Gathers the masks on all ranks, one bit a weight, each layer's from a byte of its own on."""
    (scratch,) = _allocate([max(layer.scores.size for layer in layers)], device)
    packed = []
    for layer in layers:
        kept_L = scratch[: layer.scores.size]
        layer.write_mask(kept_L)
        packed.append(np.packbits(kept_L.cpu().numpy()))
    by_rank = ranks.all_gather_objects(
        [(s.start, s.stop) for s in (layer.rank_slice for layer in layers)]
    )
    sizes = [[stop - start for start, stop in of_rank] for of_rank in by_rank]
    bits = gather_packed(np.concatenate(packed), sizes, ranks)
    masks = {}
    wholes = _allocate([layer.size for layer in layers], torch.device("cpu"))
    for layer, whole, bounds in zip(layers, wholes, zip(*by_rank, strict=True), strict=True):
        for start, stop in bounds:
            whole.numpy()[start:stop] = next(bits)
        masks[layer.name] = whole.view(layer.rank_slice.shape)
    return masks
