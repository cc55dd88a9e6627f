"""Which units go: exactly k of them, the lowest scores first, whatever the ties and the bounds.

Removing the lowest scores is a choice among laminar bounds: groups of an n:m pattern lie inside
layers, layers inside the whole. For such bounds the greedy choice is the best one, and it has a
closed form used here: within each group the highest n are exempt, within each layer the lowest
`floor` are forced and all beyond `ceiling` are exempt, and the rest compete in one pool.

Equal scores are taken by global flat index (parameter name order, then C order), so the choice is a
function of the scores alone. Zeros of both signs are equal. Weights pruned before stay pruned and
count towards k.

Shape suffixes: N = prunable weights of the model, L = weights of one layer.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gbp_ray.config import PruneConfig, nearest_name
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.masks import MaskSet

__all__ = [
    "Selection",
    "check_reachable",
    "check_selectable",
    "exact_threshold",
    "num_to_prune",
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
    """One layer in the pool: positions are within the layer's flat weights."""

    name: str
    scores_L: np.ndarray
    pruned_L: np.ndarray
    exempt_L: np.ndarray
    floor: int
    ceiling: int

    @property
    def is_open_L(self) -> np.ndarray:
        return ~(self.pruned_L | self.exempt_L)

    @property
    def num_pruned(self) -> int:
        return int(self.pruned_L.sum())


def num_to_prune(sparsity: float, num_units: int) -> int:
    """Rounds sparsity * units half up: the exact number of removed units."""
    return math.floor(sparsity * num_units + 0.5)


def exact_threshold(scores_N: np.ndarray, k: int) -> tuple[np.floating, int]:
    """Finds where the k lowest scores end.

    Args:
        scores_N: (N,) float32 or float64, finite.
        k: 1 <= k <= N.

    Returns:
        The k-th lowest score, and how many units equal to it belong to the k.
    """
    threshold = np.partition(scores_N, k - 1)[k - 1]
    return threshold, k - int(np.count_nonzero(scores_N < threshold))


def select_masks(
    scores: Mapping[str, Tensor],
    masks: MaskSet,
    config: PruneConfig,
    sparsity: float,
    input_dims: Mapping[str, int] | None = None,
) -> Selection:
    """Removes units until exactly round(sparsity * N) are gone.

    Args:
        scores: Parameter name to saliency, shaped like the weights, float32 or float64 (narrower
            floats are widened, which keeps their order); the lowest go first.
        masks: The masks so far; pruned weights stay pruned and their scores are ignored.
        config: Scope, granularity and the bounds per layer.
        sparsity: Of this round, in [0, 1).
        input_dims: Axis of the n:m groups by parameter name; 1 where not given.

    Raises:
        PruneError: A score is NaN or infinite, or the bounds leave no choice of that size.
        ConfigError: An n:m pattern does not divide a layer, or a bound's glob matches no layer.
    """
    check_selectable({name: tuple(mask.shape) for name, mask in masks.items()}, config, input_dims)
    layers = [
        _make_layer(name, scores[name], mask, config, (input_dims or {}).get(name, 1))
        for name, mask in masks.items()
    ]
    _set_bounds(layers, config)
    k = num_to_prune(sparsity, masks.num_units)
    _refuse_impossible(layers, k, sparsity, config)
    if config.scope == "layer":
        held_back = _prune_by_layer(layers, k)
    else:
        held_back = _prune_globally(layers, k)
    kept = {
        layer.name: torch.from_numpy(~layer.pruned_L).view(masks[layer.name].shape)
        for layer in layers
    }
    device = next(iter(masks.values())).device
    chosen = MaskSet(kept, masks.round + 1, config.criterion, masks.digest).to(device)
    assert chosen.num_pruned == max(k, masks.num_pruned)
    return Selection(chosen, tuple(held_back))


def check_selectable(
    shapes: Mapping[str, tuple[int, ...]],
    config: PruneConfig,
    input_dims: Mapping[str, int] | None = None,
) -> None:
    """Refuses what no scores could make possible, so that it shows before any training.

    Raises:
        ConfigError: An n:m pattern does not divide a layer, or a bound's glob matches no layer.
    """
    for key in ("layer_min_sparsity", "layer_max_sparsity"):
        bound = getattr(config, key)
        for pattern in bound if isinstance(bound, dict) else ():
            if not fnmatch.filter(shapes, pattern):
                raise ConfigError(
                    f"prune.{key}.'{pattern}': matches no prunable parameter"
                    f"{nearest_name(pattern, list(shapes))}"
                )
    if config.pattern is None:
        return
    _, m = config.pattern
    misfits = [
        f"'{name}' has {shape[(input_dims or {}).get(name, 1)]}"
        for name, shape in shapes.items()
        if shape[(input_dims or {}).get(name, 1)] % m
    ]
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
            f"{asked} may lose {sum(most.values())} at most ({_some_of(tight)}); "
            "lower it or raise prune.layer_max_sparsity"
        )
    if k < sum(least.values()):
        tight = [
            f"'{name}' {least[name]} of {size}"
            for name, size in sizes.items()
            if least[name] > config.sparsity * size + 1e-9
        ]
        raise ConfigError(
            f"{asked} must lose {sum(least.values())} at least ({_some_of(tight)}); "
            "raise it or lower prune.layer_min_sparsity"
        )


def _some_of(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _make_layer(
    name: str, scores: Tensor, mask: Tensor, config: PruneConfig, input_dim: int
) -> _Layer:
    if scores.shape != mask.shape:
        raise PruneError(
            f"scores of '{name}': shape {tuple(scores.shape)} differs from the weights' "
            f"{tuple(mask.shape)}"
        )
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    # Adding zero makes -0.0 equal to 0.0 bit for bit.
    scores_L = wide.detach().cpu().reshape(-1).numpy() + 0.0
    pruned_L = ~mask.cpu().reshape(-1).numpy()
    finite_L = np.isfinite(scores_L) | pruned_L
    if not finite_L.all():
        raise PruneError(
            f"scores of '{name}': {int((~finite_L).sum())} are NaN or infinite; the criterion "
            f"'{config.criterion}' overflowed or the weights diverged"
        )
    exempt_L = np.zeros_like(pruned_L)
    if config.pattern is not None:
        exempt_L = _exempt_by_pattern(scores_L, pruned_L, mask.shape, input_dim, config.pattern)
    return _Layer(name, scores_L, pruned_L, exempt_L, 0, 0)


def _exempt_by_pattern(
    scores_L: np.ndarray,
    pruned_L: np.ndarray,
    shape: tuple[int, ...],
    input_dim: int,
    pattern: tuple[int, int],
) -> np.ndarray:
    """Marks the n weights of each group that the pattern keeps: those removed last."""
    n, m = pattern
    # Pruned weights sort first, so they fill the m - n places a group has to lose.
    order_L = np.where(pruned_L, -np.inf, scores_L)
    grouped = np.moveaxis(order_L.reshape(shape), input_dim, -1)
    rank_in_group = np.argsort(
        np.argsort(grouped.reshape(-1, m), axis=1, kind="stable"), axis=1, kind="stable"
    )
    exempt = (rank_in_group >= m - n).reshape(grouped.shape)
    return np.moveaxis(exempt, -1, input_dim).reshape(-1) & ~pruned_L


def _set_bounds(layers: list[_Layer], config: PruneConfig) -> None:
    for layer in layers:
        size = layer.scores_L.size
        floor = num_to_prune(_bound_of(layer.name, config.layer_min_sparsity, 0.0), size)
        ceiling = min(_ceiling_of(layer.name, size, config), size - int(layer.exempt_L.sum()))
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
    matching = [value for pattern, value in bound.items() if fnmatch.fnmatch(name, pattern)]
    return matching[-1] if matching else default


def _refuse_impossible(layers: list[_Layer], k: int, sparsity: float, config: PruneConfig) -> None:
    total = sum(layer.scores_L.size for layer in layers)
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
        floor = _least_of(layer.name, layer.scores_L.size, config)
        least += max(min(floor, layer.ceiling), layer.num_pruned)
    if least > max(k, sum(layer.num_pruned for layer in layers)):
        raise PruneError(
            f"prune.sparsity = {sparsity:g}: asks for {k} of {total} weights, but the layers' "
            f"floors ask for {least} (sparsity {least / total:.4f}); raise the sparsity or lower "
            "prune.layer_min_sparsity"
        )


def _prune_globally(layers: list[_Layer], k: int) -> list[str]:
    """Lets all weights compete; returns the layers held back by a ceiling."""
    forced = [max(layer.floor - layer.num_pruned, 0) for layer in layers]
    budget = k - sum(layer.num_pruned for layer in layers)
    # An early round may ask for less than all floors together: floors then share it by size.
    if sum(forced) > budget:
        sizes = [layer.scores_L.size for layer in layers]
        forced = _share_out(max(budget, 0), sizes, [0] * len(layers), forced)
    for layer, count in zip(layers, forced, strict=True):
        _prune_lowest(layer, count)
    budget = k - sum(layer.num_pruned for layer in layers)
    if budget <= 0:
        return []
    pools = [layer.is_open_L for layer in layers]
    held_back: set[str] = set()
    while True:
        quotas = _count_taken(layers, pools, budget)
        over = [
            index
            for index, (layer, quota) in enumerate(zip(layers, quotas, strict=True))
            if quota > layer.ceiling - layer.num_pruned
        ]
        if not over:
            break
        # What a full layer gives up moves on, and may fill the next one.
        for index in over:
            layer = layers[index]
            pools[index] = _lowest_of(layer, layer.ceiling - layer.num_pruned)
            held_back.add(layer.name)
    for layer, quota in zip(layers, quotas, strict=True):
        _prune_lowest(layer, quota)
    return [layer.name for layer in layers if layer.name in held_back]


def _count_taken(layers: list[_Layer], pools: list[np.ndarray], budget: int) -> list[int]:
    """Counts how many of each layer's pool are among the `budget` lowest of all pools."""
    scores_N = np.concatenate(
        [layer.scores_L[pool] for layer, pool in zip(layers, pools, strict=True)]
    )
    threshold, num_ties = exact_threshold(scores_N, budget)
    counts = []
    for layer, pool in zip(layers, pools, strict=True):
        inside = layer.scores_L[pool]
        ties = min(int(np.count_nonzero(inside == threshold)), num_ties)
        num_ties -= ties
        counts.append(int(np.count_nonzero(inside < threshold)) + ties)
    return counts


def _prune_by_layer(layers: list[_Layer], k: int) -> list[str]:
    """Gives each layer the same sparsity, to the unit; returns the layers held back."""
    sizes = [layer.scores_L.size for layer in layers]
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
    for layer, quota in zip(layers, quotas, strict=True):
        _prune_lowest(layer, quota - layer.num_pruned)
    return held_back


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


def _prune_lowest(layer: _Layer, count: int) -> None:
    if count > 0:
        layer.pruned_L = layer.pruned_L | _lowest_of(layer, count)


def _lowest_of(layer: _Layer, count: int) -> np.ndarray:
    """Marks the `count` lowest open weights of a layer, earlier ones first among equals."""
    chosen_L = np.zeros_like(layer.pruned_L)
    positions = np.flatnonzero(layer.is_open_L)
    if count <= 0:
        return chosen_L
    if count >= positions.size:
        chosen_L[positions] = True
        return chosen_L
    open_scores = layer.scores_L[positions]
    threshold, num_ties = exact_threshold(open_scores, count)
    chosen_L[positions[open_scores < threshold]] = True
    chosen_L[positions[np.flatnonzero(open_scores == threshold)[:num_ties]]] = True
    return chosen_L
