"""Thresholds by counting against a stable sort, on 1 to 4 ranks, whatever the scores.

Shape suffixes: N = scores of all ranks.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import lowest, pruned_N
from small_networks import prune_config
from thread_ranks import on_threads
from torch import Tensor, nn

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import local_slice
from gbp_ray.pruning import counting, thresholds
from gbp_ray.pruning.counting import as_score_view
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.selection import select_masks, share_out
from gbp_ray.pruning.thresholds import Pool, exact_threshold, find_cuts
from gbp_ray.pruning.units import Layout, Prunable, SlicedScores, num_to_prune

pytestmark = pytest.mark.usefixtures("where_scores_lie")

DTYPES = (np.float16, np.float32, np.float64)
WORLDS = (1, 2, 3, 4)


@contextlib.contextmanager
def brackets_for_few(deviations: float = 0.5, most_kept: float = 1.0) -> Iterator[None]:
    """Makes a dozen scores take the path of millions, with brackets that often miss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "_MANY", 2)
        patch.setattr(thresholds, "_SAMPLE", 6)
        patch.setattr(thresholds, "_LEAST_STRIDE", 2)
        patch.setattr(counting, "_CHUNK", 5)
        patch.setattr(counting, "_DEVICE_CHUNK", 5)
        patch.setattr(thresholds, "_DEVIATIONS", deviations)
        patch.setattr(thresholds, "_MOST_KEPT", most_kept)
        yield


def any_score(dtype: type) -> st.SearchStrategy[float]:
    """Few values, so that many are equal; zeros of both signs, denormals and the largest."""
    info = np.finfo(dtype)
    tiny, most = float(info.smallest_subnormal), float(info.max)
    special = [0.0, -0.0, tiny, -tiny, 2 * tiny, float(info.tiny), most, -most]
    width = info.bits
    free = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return st.one_of(st.integers(-3, 3).map(float), st.sampled_from(special), free)


@st.composite
def dealt_scores(draw_from: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Scores of one dtype, and where the stretches of up to four ranks end; some are empty."""
    dtype = draw_from(st.sampled_from(DTYPES))
    values = draw_from(st.lists(any_score(dtype), min_size=1, max_size=60))
    world_size = draw_from(st.sampled_from(WORLDS))
    ends = sorted(draw_from(st.integers(0, len(values))) for _ in range(world_size - 1))
    return np.array(values, dtype=dtype), [0, *ends, len(values)]


@given(
    case=dealt_scores(),
    deviations=st.sampled_from([None, 0.0, 0.5, 5.0]),
    most_kept=st.sampled_from([0.0, 0.3, 1.0]),
    data=st.data(),
)
@settings(max_examples=75)
def test_a_threshold_is_that_of_sorting_on_any_number_of_ranks(
    case: tuple[np.ndarray, list[int]], deviations: float | None, most_kept: float, data: Any
) -> None:
    values_N, ends = case
    k = data.draw(st.integers(1, len(values_N)))
    expected = float(np.sort(values_N)[k - 1])
    is_special = deviations is not None
    with brackets_for_few(deviations, most_kept) if is_special else contextlib.nullcontext():
        found = on_threads(
            len(ends) - 1,
            lambda ranks: exact_threshold(
                values_N[ends[ranks.rank] : ends[ranks.rank + 1]], k, ranks
            ),
        )
    below = int(np.count_nonzero(values_N < expected))
    assert found == [(expected, k - below)] * len(found)


@given(case=dealt_scores(), data=st.data())
def test_layers_that_share_a_pool_are_cut_at_one_value_within_their_bounds(
    case: tuple[np.ndarray, list[int]], data: Any
) -> None:
    values_N, _ = case
    middle = data.draw(st.integers(0, len(values_N)))
    layers = [values_N[:middle], values_N[middle:]]
    low = tuple(data.draw(st.integers(0, len(layer))) for layer in layers)
    high = tuple(
        data.draw(st.integers(lo, len(layer))) for lo, layer in zip(low, layers, strict=True)
    )
    pool = Pool((0, 1), data.draw(st.integers(max(1, sum(low)), max(1, sum(high)))), low, high)
    if sum(high) < pool.target:
        return
    for path in (contextlib.nullcontext(), brackets_for_few(), brackets_for_few(5.0, 0.0)):
        with path:
            cuts = find_cuts([as_score_view(layer) for layer in layers], [pool], Ranks())
        (threshold,) = {cut.threshold for cut in cuts}
        for layer, cut in zip(layers, cuts, strict=True):
            assert cut.below == np.count_nonzero(layer < threshold)
            assert cut.equal == np.count_nonzero(layer == threshold)
        assert pool.reaches([cut.below + cut.equal for cut in cuts])
        # The lowest such value: with what lies below alone the target is not made.
        if threshold > values_N.min():
            assert not pool.reaches([cut.below for cut in cuts])


# -- whole decisions -------------------------------------------------------------------------------


@st.composite
def networks(draw_from: st.DrawFn) -> dict[str, Tensor]:
    """Scores of two or three layers whose inputs divide by 4, with many ties."""
    sizes = draw_from(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    scores = {}
    for name, rows in zip("abc", sizes, strict=False):
        values = draw_from(st.lists(any_score(np.float32), min_size=4 * rows, max_size=4 * rows))
        scores[f"{name}.weight"] = torch.tensor(values).view(rows, 4)
    return scores


def decide(scores: dict[str, Tensor], world_size: int, shares: list[float], **fields: Any) -> str:
    """Decides twice, the second time over what is left; all ranks must agree."""
    units = [Prunable(name, nn.Parameter(scores[name]), 1) for name in sorted(scores)]
    config = prune_config(sparsity=shares[-1], **fields)

    def program(ranks: Ranks) -> str:
        own = Layout(units, ranks).own
        values = [
            local_slice(unit.parameter, piece) for unit, piece in zip(units, own, strict=True)
        ]
        sliced = SlicedScores(own, tuple(values))
        masks, digests = MaskSet.dense(units), ""
        for share in shares:
            masks = select_masks(sliced, masks, config, share, ranks=ranks).masks
            digests += masks.digest
        return digests

    (found,) = set(on_threads(world_size, program))
    return found


@given(
    scores=networks(),
    scope=st.sampled_from(["global", "layer"]),
    granularity=st.sampled_from(["weight", "2:4"]),
    is_bracketed=st.booleans(),
)
@settings(max_examples=13)
def test_decisions_are_the_same_bits_on_any_number_of_ranks(
    scores: dict[str, Tensor], scope: str, granularity: str, is_bracketed: bool
) -> None:
    with brackets_for_few() if is_bracketed else contextlib.nullcontext():
        found = [
            decide(scores, world_size, [0.25, 0.5], scope=scope, granularity=granularity)
            for world_size in WORLDS
        ]
    assert set(found) == {found[0]}


@given(scores=networks(), data=st.data())
@settings(max_examples=15)
def test_a_decision_among_ranks_removes_the_first_of_a_stable_sort(
    scores: dict[str, Tensor], data: Any
) -> None:
    values = [float(x) for name in sorted(scores) for x in scores[name].flatten()]
    k = data.draw(st.integers(1, len(values) // 2))
    expected = lowest(values, k)
    masks, offset = {}, 0
    for name in sorted(scores):
        size = scores[name].numel()
        kept = [place not in expected for place in range(offset, offset + size)]
        if not any(kept):
            return  # The layer keeps its best weight instead.
        masks[name] = torch.tensor(kept).view(scores[name].shape)
        offset += size
    assert pruned_N(MaskSet(masks)) == sorted(expected)
    with brackets_for_few():
        for world_size in WORLDS:
            assert decide(scores, world_size, [k / len(values)]) == MaskSet(masks).digest


# -- scores meant to mislead -----------------------------------------------------------------------

NUM_MANY = 300_000  # enough for the bracket, with the strides and the limits of real use


@cache
def misleading_scores() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    ordinary = random.standard_normal(NUM_MANY).astype(np.float32)
    periodic = ordinary.copy()
    periodic[:: thresholds._LEAST_STRIDE] = 1e6
    bulk = np.where(random.random(NUM_MANY) < 0.999, 1.0, ordinary).astype(np.float32)
    few = np.repeat(np.float32([-1.0, 0.0, 2.0]), NUM_MANY // 3)
    heavy = np.exp(random.standard_normal(NUM_MANY) * 10).astype(np.float32)
    return {
        "ordinary": ordinary,
        "ascending": np.sort(ordinary),
        "descending": np.sort(ordinary)[::-1].copy(),
        "equal": np.full(NUM_MANY, 0.5, dtype=np.float32),
        "high at each stride": periodic,
        "one value but for a thousandth": bulk,
        "three values in blocks": few,
        "over many magnitudes": heavy,
        "pruned before": np.where(ordinary < 0.5, -np.inf, ordinary).astype(np.float32),
        "exempt": np.where(ordinary > 0.5, np.inf, ordinary).astype(np.float32),
    }


@pytest.mark.parametrize("case", misleading_scores())
def test_scores_that_mislead_a_sample_do_not_mislead_the_count(case: str) -> None:
    values_N = misleading_scores()[case]
    ordered = np.sort(values_N)
    size = len(values_N)
    # Two of the four ranks hold nothing, another a single score.
    for ends in ([0, size], [0, 0, size - 1, size - 1, size]):
        for k in (1, 2, size // 3 - 1, size // 3, size // 2, size - 1, size):
            found = on_threads(
                len(ends) - 1,
                lambda ranks, k=k, ends=ends: exact_threshold(
                    values_N[ends[ranks.rank] : ends[ranks.rank + 1]], k, ranks
                ),
            )
            below = int(np.count_nonzero(values_N < ordered[k - 1]))
            assert set(found) == {(float(ordered[k - 1]), k - below)}


@pytest.mark.parametrize("case", ["ordinary", "ascending", "high at each stride", "equal"])
def test_extra_memory_stays_under_a_tenth_of_the_scores(case: str, where_scores_lie: str) -> None:
    values_N = np.tile(misleading_scores()[case], 30)
    if case == "ascending":
        values_N.sort()
    if where_scores_lie == "on a GPU":
        pytest.skip("what torch allocates is not traced")
    tracemalloc.start()
    exact_threshold(values_N, len(values_N) // 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < values_N.nbytes / 10


def test_a_rank_that_holds_all_that_is_in_question_keeps_none_of_it() -> None:
    """Its scores are read again, one chunk at a time."""
    values_N = np.sort(misleading_scores()["ordinary"])
    middle = slice(NUM_MANY // 2 - 2000, NUM_MANY // 2 + 2000)
    values = [np.delete(values_N, np.arange(middle.start, middle.stop)), values_N[middle]]
    kept = []

    def program(ranks: Ranks) -> tuple[float, int]:
        own = values[ranks.rank]
        scans = thresholds._scan_all(
            [as_score_view(own)], values_N[middle.start], values_N[middle.stop - 1]
        )
        kept.append(scans[0].inside)
        return exact_threshold(own, NUM_MANY // 2, ranks)

    expected = float(values_N[NUM_MANY // 2 - 1])
    assert {threshold for threshold, _ in on_threads(2, program)} == {expected}
    assert sum(inside is None for inside in kept) == 1


# -- more than 2^31 weights ------------------------------------------------------------------------

CROWD = 2**33


class Crowd(Ranks):
    """Stands for 2^33 ranks that all hold what this one holds."""

    def all_reduce_counts(self, counts: Tensor) -> Tensor:
        return counts.mul_(CROWD)


@given(values=st.lists(any_score(np.float32), min_size=1, max_size=20), data=st.data())
def test_counts_of_more_weights_than_32_bits_hold_stay_exact(
    values: list[float], data: Any
) -> None:
    scores = np.array(values, dtype=np.float32)
    k = data.draw(st.integers(1, len(values) * CROWD))
    threshold, num_ties = exact_threshold(scores, k, Crowd())
    expected = float(np.sort(scores)[(k - 1) // CROWD])
    assert threshold == expected
    assert num_ties == k - int(np.count_nonzero(scores < expected)) * CROWD


def test_shares_of_huge_layers_are_exact() -> None:
    sizes = [2**33 + 1, 2**31, 7, 3 * 2**34]
    total = sum(sizes)
    for k in (1, 2**31 + 1, total // 2, total - 4):
        counts = share_out(k, sizes, [0] * 4, [size - 1 for size in sizes])
        assert sum(counts) == k
        if k <= total // 2:  # beyond it the bounds have their say
            assert all(abs(c - k * s / total) <= 2 for c, s in zip(counts, sizes, strict=True))
    assert num_to_prune(0.5, 2**40 + 1) == 2**39 + 1
    assert num_to_prune(0.75, 2**40) == 3 * 2**38


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_are_ordered_like_the_floats_and_lead_back(dtype: type) -> None:
    info = np.finfo(dtype)
    tiny = info.smallest_subnormal
    ordered = np.array(
        [-np.inf, info.min, -1, -info.tiny, -tiny, 0, tiny, info.tiny, 1, info.max, np.inf], dtype
    )
    keys = counting._host_keys(ordered)
    assert keys.dtype.itemsize == ordered.dtype.itemsize
    assert (keys[1:] > keys[:-1]).all()
    assert [counting.from_key(int(key), ordered.dtype) for key in keys] == ordered.tolist()
    assert len(set(counting._host_keys(np.array([0.0, -0.0], dtype)).tolist())) == 1


def test_float64_scores_that_float32_cannot_tell_apart_are_told_apart_among_ranks() -> None:
    scores = {
        "a.weight": torch.tensor([[1 + 3e-12, 1 + 1e-12]], dtype=torch.float64),
        "b.weight": torch.tensor([[1 + 2e-12, 1 + 4e-12]], dtype=torch.float64),
    }
    kept = MaskSet(
        {
            "a.weight": torch.tensor([[True, False]]),
            "b.weight": torch.tensor([[False, True]]),
        }
    )
    for world_size in (1, 2):
        assert decide(scores, world_size, [0.5]) == kept.digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_scores_are_widened_and_decided_alike_on_any_number_of_ranks(
    dtype: torch.dtype,
) -> None:
    random = torch.Generator().manual_seed(4)
    scores = {f"{name}.weight": torch.randn(8, 4, generator=random).to(dtype) for name in "ab"}
    values = [float(x) for name in sorted(scores) for x in scores[name].flatten()]
    expected = lowest(values, 32)
    masks = {
        name: torch.tensor([32 * number + i not in expected for i in range(32)]).view(8, 4)
        for number, name in enumerate(sorted(scores))
    }
    assert {decide(scores, w, [0.5]) for w in WORLDS} == {MaskSet(masks).digest}
