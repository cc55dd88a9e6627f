"""Which units go: exactly k of them, the lowest scores first, whatever the ties and the bounds.

Removing the lowest scores is a choice among laminar bounds: groups of an n:m pattern lie inside
layers, layers inside the whole. For such bounds the greedy choice is the best one, and it has a
closed form used here: within each group the highest n are exempt, and the whole has one threshold,
up to which every layer gives what it has, but no less than its floor and no more than its ceiling.

Each rank decides over its own slices (`slices`), and the decision is one: thresholds come from
counts added over all ranks (`thresholds`), and so do the shares of equal scores. What ranks tell
each other beyond that is their slice of the masks, one bit a weight. Which collectives come in
which order depends on those counts alone, which all ranks know.

Equal scores are taken by global flat index (parameter name order, then C order), so the choice is a
function of the scores alone. Zeros of both signs are equal. Weights pruned before stay pruned and
count towards k.

Scores are compared in float32, or in float64 where any of them is; narrower floats are widened,
which keeps their order.

Shape suffixes: N = prunable weights of the model, L = weights of one layer in this rank's slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gbp_ray.config.prune import PruneConfig
from gbp_ray.config.schema import is_matched, match_names, nearest_glob
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import (
    RankSlice,
    gather_packed,
    is_shard,
    like_shard,
    local,
    local_slice,
)
from gbp_ray.errors import ConfigError, PruneError, name_some
from gbp_ray.pruning.counting import ScoreView, as_score_view
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.thresholds import Cut, Pool, find_cuts
from gbp_ray.pruning.units import SlicedScores, num_to_prune

__all__ = [
    "Selection",
    "check_reachable",
    "check_selectable",
    "select_masks",
]


@dataclass(frozen=True)
class Selection:
    """The outcome of one decision.

    Attributes:
        masks: The new masks.
        held_back: Layers that would have lost more weights, but for their ceiling.
    """

    masks: MaskSet
    held_back: tuple[str, ...]


@dataclass
class _Layer:
    """One layer in the pool: this rank's scores as they compete, and numbers of the whole layer."""

    piece: RankSlice
    scores: ScoreView
    num_pruned: int = 0
    num_exempt: int = 0
    floor: int = 0
    ceiling: int = 0

    @property
    def name(self) -> str:
        return self.piece.name

    @property
    def size(self) -> int:
        return math.prod(self.piece.shape)


def select_masks(
    scores: SlicedScores | Mapping[str, Tensor],
    masks: MaskSet,
    config: PruneConfig,
    sparsity: float,
    input_dims: Mapping[str, int] | None = None,
    ranks: Ranks | None = None,
) -> Selection:
    """Removes units until exactly round(sparsity * N) are gone. Communicates.

    Args:
        scores: This rank's slices, or, with one rank, parameter name to saliency, shaped like the
            weights; the lowest go first.
        masks: The masks so far; pruned weights stay pruned and their scores are ignored.
        config: Scope, granularity and the bounds per layer.
        sparsity: Of this round, in [0, 1).
        input_dims: Axis of the n:m groups by parameter name; 1 where not given.

    Raises:
        PruneError: A score is NaN or infinite, or the bounds leave no choice of that size.
        ConfigError: An n:m pattern does not divide a layer, or a bound's glob matches no layer.
    """
    ranks = ranks or Ranks()
    if not isinstance(scores, SlicedScores):
        _refuse_other_shapes(scores, masks)
        scores = SlicedScores.from_full({name: scores[name] for name in masks})
    check_selectable({name: tuple(mask.shape) for name, mask in masks.items()}, config, input_dims)
    layers = _make_layers(scores, masks, config, input_dims or {}, ranks)
    _set_bounds(layers, config)
    k = num_to_prune(sparsity, masks.num_units)
    _refuse_impossible(layers, k, sparsity, config)
    if config.scope == "layer":
        quotas, held_back = _share_by_layer(layers, k)
        cuts: list[Cut | None] = [None] * len(layers)
    else:
        quotas, cuts, held_back = _share_globally(layers, k, ranks)
    num_pruned = sum(layer.num_pruned for layer in layers)
    pieces = [layer.piece for layer in layers]
    ends = _find_ends(layers, quotas, cuts, ranks)
    place = scores.values[0].device
    if any(is_shard(mask) for mask in masks.values()):
        found = _spread_masks(_mark_all(layers, ends, place), masks)
    elif ranks.world_size == 1:
        found = {
            piece.name: kept_L.view(piece.shape)
            for piece, kept_L in zip(pieces, _mark_all(layers, ends, place), strict=True)
        }
    else:
        found = _exchange_masks(pieces, _pack_all(layers, ends, place), ranks)
    device = next(iter(masks.values())).device
    chosen = MaskSet(found, masks.round + 1, config.criterion, masks.digest).to(device)
    assert chosen.num_pruned == max(k, num_pruned)
    return Selection(chosen, tuple(held_back))


def check_selectable(
    shapes: Mapping[str, tuple[int, ...]],
    config: PruneConfig,
    input_dims: Mapping[str, int] | None = None,
    num_groups: Mapping[str, int] | None = None,
) -> None:
    """Refuses what no scores could make possible, so that it shows before any training.

    Args:
        input_dims: Axis of the n:m groups by parameter name; 1 where not given.
        num_groups: How many groups of a convolution lie along it, which an n:m group must not
            cross; 1 where not given.

    Raises:
        ConfigError: An n:m pattern does not divide a layer, or a bound's glob matches no layer.
    """
    for key in ("layer_min_sparsity", "layer_max_sparsity"):
        bound = getattr(config, key)
        for pattern in bound if isinstance(bound, dict) else ():
            if not match_names(pattern, shapes):
                raise ConfigError(
                    f"prune.{key}.'{pattern}': matches no prunable parameter"
                    f"{nearest_glob(pattern, shapes)}"
                )
    if config.pattern is None:
        return
    _, m = config.pattern
    sizes = {
        name: shape[(input_dims or {}).get(name, 1)] // (num_groups or {}).get(name, 1)
        for name, shape in shapes.items()
    }
    misfits = [f"'{name}' has {size}" for name, size in sizes.items() if size % m]
    if misfits:
        raise ConfigError(
            f"prune.granularity = '{config.granularity}': needs input sizes divisible by {m}, but "
            f"{', '.join(misfits)}; name such layers in prune.exclude"
        )


def check_reachable(shapes: Mapping[str, tuple[int, ...]], config: PruneConfig) -> None:
    """Refuses a final sparsity that the bounds of the layers leave no room for.

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


def _refuse_other_shapes(scores: Mapping[str, Tensor], masks: MaskSet) -> None:
    for name, mask in masks.items():
        if scores[name].shape != mask.shape:
            raise PruneError(
                f"scores of '{name}': shape {tuple(scores[name].shape)} differs from the weights' "
                f"{tuple(mask.shape)}"
            )


def _make_layers(
    scores: SlicedScores,
    masks: MaskSet,
    config: PruneConfig,
    input_dims: Mapping[str, int],
    ranks: Ranks,
) -> list[_Layer]:
    is_wide = any(values.dtype is torch.float64 for values in scores.values)
    dtype = torch.float64 if is_wide else torch.float32
    layers = []
    counts = torch.zeros(len(scores.slices), 3, dtype=torch.int64)
    for number, (piece, values) in enumerate(zip(scores.slices, scores.values, strict=True)):
        kept_L = local_slice(masks[piece.name], piece).to(values.device)
        rivals = as_score_view(values.detach().to(dtype), kept_L)
        num_bad = piece.size - rivals.num_pruned - rivals.count_finite()
        if config.pattern is not None:
            # Slices end where rows end, or hold all of a layer, so groups are whole.
            rivals = rivals.protect_top_n(
                *config.pattern, piece.shape, input_dims.get(piece.name, 1)
            )
        counts[number] = torch.tensor([num_bad, rivals.num_exempt, rivals.num_pruned])
        layers.append(_Layer(piece, rivals))
    ranks.all_reduce_counts(counts)
    for layer, (num_bad, num_exempt, num_pruned) in zip(layers, counts.tolist(), strict=True):
        if num_bad:
            raise PruneError(
                f"scores of '{layer.name}': {num_bad} are NaN or infinite; the criterion "
                f"'{config.criterion}' overflowed or the weights diverged"
            )
        layer.num_exempt, layer.num_pruned = num_exempt, num_pruned
    return layers


def _set_bounds(layers: list[_Layer], config: PruneConfig) -> None:
    for layer in layers:
        size = layer.size
        floor = num_to_prune(_bound_of(layer.name, config.layer_min_sparsity, 0.0), size)
        ceiling = min(_ceiling_of(layer.name, size, config), size - layer.num_exempt)
        layer.ceiling = max(ceiling, layer.num_pruned)
        layer.floor = max(min(floor, layer.ceiling), layer.num_pruned)


def _ceiling_of(name: str, size: int, config: PruneConfig) -> int:
    """Counts how many weights of a dense layer may go at most."""
    ceiling = math.floor(_bound_of(name, config.layer_max_sparsity, 1.0) * size + 1e-9)
    # A layer without a weight passes nothing on, so one always stays.
    return min(ceiling, size - 1)


def _least_of(name: str, size: int, config: PruneConfig) -> int:
    """Counts how many weights of a layer its floor asks for.

    Counted downwards: rounding alone may take all floors together past k by a weight or two.
    """
    return math.floor(_bound_of(name, config.layer_min_sparsity, 0.0) * size + 1e-9)


def _bound_of(name: str, bound: float | dict[str, float], default: float) -> float:
    if not isinstance(bound, dict):
        return bound
    matching = [value for pattern, value in bound.items() if is_matched(name, [pattern])]
    return matching[-1] if matching else default


def _refuse_impossible(layers: list[_Layer], k: int, sparsity: float, config: PruneConfig) -> None:
    total = sum(layer.size for layer in layers)
    most = sum(layer.ceiling for layer in layers)
    if k > most:
        raise PruneError(
            f"prune.sparsity = {sparsity:g}: asks for {k} of {total} weights, but the layers' "
            f"ceilings allow {most} (sparsity {most / total:.4f}); lower the sparsity or raise "
            "prune.layer_max_sparsity"
        )
    if sparsity < config.sparsity:
        return  # Earlier rounds are still on their way to the floors.
    least = 0
    for layer in layers:
        floor = _least_of(layer.name, layer.size, config)
        least += max(min(floor, layer.ceiling), layer.num_pruned)
    if least > max(k, sum(layer.num_pruned for layer in layers)):
        raise PruneError(
            f"prune.sparsity = {sparsity:g}: asks for {k} of {total} weights, but the layers' "
            f"floors ask for {least} (sparsity {least / total:.4f}); raise the sparsity or lower "
            "prune.layer_min_sparsity"
        )


def _share_globally(
    layers: list[_Layer], k: int, ranks: Ranks
) -> tuple[list[int], list[Cut | None], list[str]]:
    """Lets all weights compete; returns the number each layer loses, the cuts, who is held back."""
    pruned = [layer.num_pruned for layer in layers]
    forced = [max(layer.floor - layer.num_pruned, 0) for layer in layers]
    budget = max(k - sum(pruned), 0)
    # An early round may ask for less than all floors together: floors then share it by size.
    if sum(forced) > budget:
        sizes = [layer.size for layer in layers]
        forced = _share_out(budget, sizes, [0] * len(layers), forced)
    low = [before + extra for before, extra in zip(pruned, forced, strict=True)]
    high = [layer.ceiling for layer in layers]
    pool = Pool(tuple(range(len(layers))), max(k, sum(pruned)), tuple(low), tuple(high))
    cuts = find_cuts([layer.scores for layer in layers], [pool], ranks)
    quotas = [min(max(cut.below, lo), hi) for cut, lo, hi in zip(cuts, low, high, strict=True)]
    left = pool.target - sum(quotas)
    held_back = []
    for number, (layer, cut) in enumerate(zip(layers, cuts, strict=True)):
        wanted = min(cut.below + cut.equal, max(quotas[number], cut.below) + left)
        if wanted > layer.ceiling:
            held_back.append(layer.name)
        taken = min(max(wanted, quotas[number]), layer.ceiling)
        left -= taken - quotas[number]
        quotas[number] = taken
    # A layer held by a bound ends elsewhere than the pool does.
    own_cuts: list[Cut | None] = [
        cut if cut.below <= quota <= cut.below + cut.equal else None
        for cut, quota in zip(cuts, quotas, strict=True)
    ]
    return quotas, own_cuts, held_back


def _share_by_layer(layers: list[_Layer], k: int) -> tuple[list[int], list[str]]:
    """Gives each layer the same sparsity, to the unit; returns the numbers and who is held back."""
    sizes = [layer.size for layer in layers]
    low = [layer.num_pruned for layer in layers]
    wanted = _share_out(k, sizes, low, sizes)
    floors = [layer.floor for layer in layers]
    ceilings = [layer.ceiling for layer in layers]
    # An early round may ask for less than all floors together, and takes nothing beside them.
    within = (low, floors) if sum(floors) > k else (floors, ceilings)
    quotas = _share_out(k, sizes, *within)
    held_back = [
        layer.name for layer, want in zip(layers, wanted, strict=True) if want > layer.ceiling
    ]
    return quotas, held_back


def _share_out(total: int, sizes: list[int], low: list[int], high: list[int]) -> list[int]:
    """Splits `total` in proportion to `sizes` within [low, high], exactly.

    Finds the common share s for which sum(clip(s * size, low, high)) = total, then hands the
    rounding remainder to the largest fractions, the first of equal ones.
    """
    total = min(max(total, sum(low)), sum(high))
    lower, upper = (
        0.0,
        1.0 + max((bound / size for bound, size in zip(high, sizes, strict=True)), default=0.0),
    )
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


@dataclass(frozen=True)
class _End:
    """Where a layer's losses end on this rank.

    Attributes:
        threshold: All scores below it go.
        num_equal: So many of those equal to it go, the first ones; None for all.
    """

    threshold: float
    num_equal: int | None


def _find_ends(
    layers: list[_Layer], quotas: list[int], cuts: list[Cut | None], ranks: Ranks
) -> list[_End]:
    """Finds where each layer ends when it loses its quota of lowest scores. Communicates."""
    pools = [
        Pool((number,), quota, (0,), (layer.size,))
        for number, (layer, quota, cut) in enumerate(zip(layers, quotas, cuts, strict=True))
        if cut is None and quota > 0
    ]
    found = iter(find_cuts([layer.scores for layer in layers], pools, ranks) if pools else ())
    nothing = Cut(-math.inf, 0, 0)
    known = [
        nothing if quota == 0 else cut or next(found)
        for cut, quota in zip(cuts, quotas, strict=True)
    ]
    # Where all equal scores go, or none, which is nearly everywhere, nobody needs to count them.
    is_split = [
        cut.below < quota < cut.below + cut.equal for cut, quota in zip(known, quotas, strict=True)
    ]
    before = _count_before(
        [
            layer.scores.count_equal(cut.threshold) if split else 0
            for layer, cut, split in zip(layers, known, is_split, strict=True)
        ],
        ranks,
    )
    ends = []
    for cut, quota, split, earlier in zip(known, quotas, is_split, before, strict=True):
        if split:
            # Equal scores go in flat order: those of earlier ranks first.
            ends.append(_End(cut.threshold, max(quota - cut.below - earlier, 0)))
        else:
            ends.append(_End(cut.threshold, None if quota > cut.below else 0))
    return ends


def _mark_all(layers: list[_Layer], ends: list[_End], device: torch.device) -> list[Tensor]:
    """Marks what is kept of this rank's slices."""
    kept = _allocate([layer.scores.size for layer in layers], device)
    for layer, end, kept_L in zip(layers, ends, kept, strict=True):
        layer.scores.write_mask(end.threshold, end.num_equal, kept_L)
    return kept


def _pack_all(layers: list[_Layer], ends: list[_End], device: torch.device) -> np.ndarray:
    """Marks the same with a bit a weight, each layer from a byte of its own on."""
    (scratch,) = _allocate([max(layer.scores.size for layer in layers)], device)
    packed = []
    for layer, end in zip(layers, ends, strict=True):
        kept_L = scratch[: layer.scores.size]
        layer.scores.write_mask(end.threshold, end.num_equal, kept_L)
        packed.append(np.packbits(kept_L.cpu().numpy()))
    return np.concatenate(packed)


def _allocate(sizes: list[int], device: torch.device) -> list[Tensor]:
    if device.type != "cpu":
        return list(torch.empty(sum(sizes), dtype=torch.bool, device=device).split(sizes))
    # One block for all: a system gives large ones in large pages, which it has sooner ready.
    return list(torch.from_numpy(np.empty(sum(sizes), dtype=bool)).split(sizes))


def _count_before(counts: list[int], ranks: Ranks) -> list[int]:
    """Adds up, for each count, those of the ranks before this one. Communicates."""
    table = torch.zeros(ranks.world_size, len(counts), dtype=torch.int64)
    table[ranks.rank] = torch.tensor(counts)
    return ranks.all_reduce_counts(table)[: ranks.rank].sum(dim=0).tolist()


def _spread_masks(kept: list[Tensor], masks: MaskSet) -> dict[str, Tensor]:
    """Leaves each rank's rows where they are."""
    found = {}
    for (name, before), kept_L in zip(masks.items(), kept, strict=True):
        rows = kept_L.view(local(before).shape).to(before.device)
        found[name] = like_shard(rows, before)
    return found


def _exchange_masks(pieces: list[RankSlice], packed: np.ndarray, ranks: Ranks) -> dict[str, Tensor]:
    """Puts the ranks' slices together on all of them, one bit a weight. Communicates."""
    by_rank = ranks.all_gather_objects([(piece.start, piece.stop) for piece in pieces])
    sizes = [[stop - start for start, stop in of_rank] for of_rank in by_rank]
    bits = gather_packed(packed, sizes, ranks)
    masks = {}
    wholes = _allocate([math.prod(piece.shape) for piece in pieces], torch.device("cpu"))
    for piece, whole, stretches in zip(pieces, wholes, zip(*by_rank, strict=True), strict=True):
        for start, stop in stretches:
            whole.numpy()[start:stop] = next(bits)
        masks[piece.name] = whole.view(piece.shape)
    return masks
