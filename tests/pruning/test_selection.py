"""Shape suffixes: N = weights of all layers in the order of the global flat index."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import (
    Scores,
    dense,
    flat,
    layered_scores,
    lowest,
    pruned_N,
    removed_by_layer,
    select,
    tied_values,
)
from small_networks import ConvNet, built, draw, prune_config
from thread_ranks import ThreadRanks, on_threads
from torch import Tensor
from torch.nn.utils import prune

from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.selection import check_reachable, select_masks
from gbp_ray.pruning.thresholds import exact_threshold
from gbp_ray.pruning.units import (
    Layout,
    Prunable,
    SlicedScores,
    num_to_prune,
    prunable_parameters,
)

# -- exactly k, and which --------------------------------------------------------------------------


@given(sparsity=st.fractions(0, 1), num_units=st.integers(1, 10_000))
def test_the_number_removed_is_rounded_half_up(sparsity: Any, num_units: int) -> None:
    exact = sparsity * num_units
    found = num_to_prune(float(sparsity), num_units)
    assert abs(found - exact) <= 0.5 + 1e-6
    if exact.denominator == 2 and num_units <= 64:
        assert found == math.floor(exact) + 1


@given(values=st.lists(tied_values, min_size=1, max_size=30), data=st.data())
def test_the_threshold_is_the_kth_lowest_with_its_ties(values: list[float], data: Any) -> None:
    k = data.draw(st.integers(1, len(values)))
    threshold, num_ties = exact_threshold(np.array(values), k)
    assert threshold == sorted(values)[k - 1]
    assert sum(value < threshold for value in values) + num_ties == k
    assert 1 <= num_ties <= values.count(threshold)


@given(scores=layered_scores(), data=st.data())
def test_global_scope_removes_the_k_lowest_with_ties_by_flat_index(
    scores: dict[str, Tensor], data: Any
) -> None:
    """The last weight of a layer stays, so only sizes that empty none are compared here."""
    every_N = flat(scores)
    k = data.draw(st.integers(0, len(every_N) - 1))
    expected = lowest(every_N, k)
    sizes = [scores[name].numel() for name in sorted(scores)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    empties = any(
        set(range(start, start + size)) <= expected
        for start, size in zip(starts, sizes, strict=True)
    )
    sparsity = k / len(every_N)
    if k > len(every_N) - len(scores):
        with pytest.raises(PruneError, match=f"asks for {k} of {len(every_N)} weights"):
            select(scores, sparsity)
        return
    chosen = select(scores, sparsity)
    assert chosen.masks.num_pruned == k
    if not empties:
        assert set(pruned_N(chosen.masks)) == expected
        assert chosen.capped_layers == ()


@given(scores=layered_scores(max_size=12), data=st.data())
def test_layer_scope_removes_the_lowest_of_each_layer_in_equal_shares(
    scores: dict[str, Tensor], data: Any
) -> None:
    total = sum(values.numel() for values in scores.values())
    k = data.draw(st.integers(0, total - len(scores)))
    # Below half, no layer comes near its last weight.
    k = min(k, total // 2)
    removed = removed_by_layer(select(scores, k / total, scope="layer").masks)
    assert sum(len(positions) for positions in removed.values()) == k
    for name, positions in removed.items():
        assert abs(len(positions) - k * scores[name].numel() / total) < 1
        assert positions == lowest(scores[name].tolist(), len(positions))


@given(
    scores=layered_scores(),
    scope=st.sampled_from(["global", "layer"]),
    data=st.data(),
)
def test_no_layer_is_emptied_and_the_count_stays_exact(
    scores: dict[str, Tensor], scope: str, data: Any
) -> None:
    total = sum(values.numel() for values in scores.values())
    k = data.draw(st.integers(0, total - len(scores)))
    chosen = select(scores, k / total, scope=scope)
    assert chosen.masks.num_pruned == k
    assert all(mask.any() for mask in chosen.masks.values())


@given(
    rounds=st.lists(layered_scores(), min_size=2, max_size=4),
    shares=st.lists(st.floats(0, 0.5), min_size=4, max_size=4),
    scope=st.sampled_from(["global", "layer"]),
)
def test_pruned_weights_stay_pruned_whatever_they_score_later(
    rounds: list[dict[str, Tensor]], shares: list[float], scope: str
) -> None:
    shapes = {name: values.shape for name, values in rounds[0].items()}
    masks = MaskSet({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})
    before = 0
    for number, (scores, share) in enumerate(zip(rounds, shares, strict=False), start=1):
        values, later = flat(scores) * 40, {}
        for name, shape in shapes.items():
            later[name] = torch.tensor(values[: shape.numel()]).view(shape)
            values = values[shape.numel() :]
            later[name][~masks[name]] = math.nan
        chosen = select(later, share, masks, final=0.5, scope=scope)
        k = max(num_to_prune(share, masks.num_units), before)
        assert chosen.masks.num_pruned == k
        assert chosen.masks.intersection(masks) == chosen.masks
        assert (chosen.masks.round, chosen.masks.parent) == (number, masks.digest)
        masks, before = chosen.masks, k


def test_a_sparsity_already_reached_changes_nothing() -> None:
    scores = {"a": draw(4, 5)}
    masks = select(scores, 0.5).masks
    for scope in ("global", "layer"):
        assert select({"a": -scores["a"]}, 0.3, masks, final=0.5, scope=scope).masks == masks


def test_global_magnitude_is_that_of_torch() -> None:
    model = built(ConvNet)
    units = prunable_parameters(model)
    scores = {unit.name: unit.parameter.detach().abs() for unit in units}
    assert len(set(flat(scores))) == len(flat(scores))
    chosen = select(scores, 0.37).masks
    layers = [(module, "weight") for module in (model.conv1, model.conv2, model.head)]
    prune.global_unstructured(
        layers, prune.L1Unstructured, amount=num_to_prune(0.37, chosen.num_units)
    )
    assert MaskSet.from_torch_prune(model.state_dict())[0] == chosen


# -- kinds of numbers ------------------------------------------------------------------------------


def test_zeros_of_both_signs_are_equal() -> None:
    scores = {"a": torch.tensor([0.0, -0.0, 0.0, -0.0]), "b": torch.tensor([-0.0, 0.0])}
    assert pruned_N(select(scores, 2 / 6).masks) == [0, 1]
    assert pruned_N(select(scores, 2 / 6, scope="layer").masks) == [0, 4]


def test_denormals_are_ordered() -> None:
    tiny = torch.tensor([3e-45, 1e-45, 0.0, -1e-45, -3e-45, 1.0])
    assert tiny.unique().numel() == 6
    order = [4, 3, 2, 1, 0]
    for k in range(1, 6):
        assert set(pruned_N(select({"a": tiny}, k / 6).masks)) == set(order[:k])


def test_negative_scores_go_first() -> None:
    assert pruned_N(select({"a": torch.tensor([0.5, -2.0, 0.0, -3e38])}, 0.5).masks) == [1, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_float_is_ordered_as_it_is(dtype: torch.dtype, scope: str) -> None:
    scores = {"a": draw(50, seed=1).to(dtype), "b": draw(30, seed=2).to(dtype)}
    # Python's floats hold each of these dtypes exactly.
    if scope == "global":
        assert set(pruned_N(select(scores, 0.4).masks)) == lowest(flat(scores), 32)
    else:
        removed = removed_by_layer(select(scores, 0.4, scope="layer").masks)
        assert removed == {n: lowest(v.tolist(), 2 * len(v) // 5) for n, v in scores.items()}


def test_float64_is_not_rounded_before_it_is_compared() -> None:
    near = 1.0 + torch.tensor([3.0, 1.0, 2.0, 4.0], dtype=torch.float64) * 1e-12
    assert pruned_N(select({"a": near}, 0.5).masks) == [1, 2]
    assert near.float().unique().numel() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_non_finite_scores_are_refused_by_name(bad: float, scope: str) -> None:
    scores = {"a.weight": torch.ones(3), "b.weight": torch.tensor([1.0, bad, bad])}
    with pytest.raises(PruneError, match=r"scores of 'b.weight': 2 are NaN or infinite"):
        select(scores, 0.5, scope=scope)


def test_scores_of_another_shape_are_refused() -> None:
    masks = dense({"a": torch.ones(2, 3)})
    with pytest.raises(PruneError, match=r"scores of 'a': shape \(3, 2\) differs"):
        select({"a": torch.ones(3, 2)}, 0.5, masks)


# -- floors and ceilings ---------------------------------------------------------------------------


@st.composite
def bounded_cases(
    draw_from: st.DrawFn,
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]], int]:
    """Scores, (floor, ceiling) in weights by layer, and k."""
    scores = draw_from(layered_scores(max_layers=3, max_size=6))
    bounds = {}
    for name, values in scores.items():
        floor = draw_from(st.integers(0, len(values) - 1))
        bounds[name] = floor, draw_from(st.integers(floor, len(values)))
    return scores, bounds, draw_from(st.integers(0, len(flat(scores)) - 1))


def cheapest(scores: dict[str, Tensor], bounds: dict[str, tuple[int, int]], k: int) -> float | None:
    """Tries every way to split k over the layers; the least sum of removed scores."""
    ordered = {name: sorted(values.tolist()) for name, values in scores.items()}
    choices = [
        range(low, min(high, len(ordered[name]) - 1) + 1) for name, (low, high) in bounds.items()
    ]
    costs = [
        sum(sum(ordered[name][:count]) for name, count in zip(bounds, counts, strict=True))
        for counts in itertools.product(*choices)
        if sum(counts) == k
    ]
    return min(costs, default=None)


def as_fractions(scores: Scores, bounds: Mapping[str, tuple[int, int]], which: int) -> Any:
    return {name: pair[which] / scores[name].numel() for name, pair in bounds.items()}


@given(case=bounded_cases())
@settings(max_examples=300)
def test_global_scope_finds_the_cheapest_choice_within_the_bounds(case: Any) -> None:
    scores, bounds, k = case
    expected = cheapest(scores, bounds, k)
    fields = {
        "layer_min_sparsity": as_fractions(scores, bounds, 0),
        "layer_max_sparsity": as_fractions(scores, bounds, 1),
    }
    sparsity = k / len(flat(scores))
    if expected is None:
        with pytest.raises(PruneError, match=r"prune.sparsity = .* (ceilings|floors)"):
            select(scores, sparsity, **fields)
        return
    removed = removed_by_layer(select(scores, sparsity, **fields).masks)
    assert sum(len(positions) for positions in removed.values()) == k
    cost = 0.0
    for name, (low, high) in bounds.items():
        assert low <= len(removed[name]) <= high
        assert removed[name] == lowest(scores[name].tolist(), len(removed[name]))
        cost += sum(scores[name][i].item() for i in removed[name])
    assert cost == expected


@given(case=bounded_cases())
def test_layer_scope_keeps_the_bounds_and_the_count(case: Any) -> None:
    scores, bounds, k = case
    fields = {
        "layer_min_sparsity": as_fractions(scores, bounds, 0),
        "layer_max_sparsity": as_fractions(scores, bounds, 1),
    }
    sparsity = k / len(flat(scores))
    if cheapest(scores, bounds, k) is None:
        with pytest.raises(PruneError, match=r"prune.sparsity = "):
            select(scores, sparsity, scope="layer", **fields)
        return
    removed = removed_by_layer(select(scores, sparsity, scope="layer", **fields).masks)
    assert sum(len(positions) for positions in removed.values()) == k
    shares = []
    for name, (low, high) in bounds.items():
        size, count = len(scores[name]), len(removed[name])
        assert low <= count <= high
        assert removed[name] == lowest(scores[name].tolist(), count)
        if low < count < min(high, size - 1):
            shares.append(((count - 1) / size, (count + 1) / size))
    # Layers that no bound holds have one share, give or take a weight.
    if shares:
        assert max(low for low, _ in shares) < min(high for _, high in shares)


@given(case=bounded_cases(), scope=st.sampled_from(["global", "layer"]))
def test_an_early_round_asks_for_no_more_than_its_sparsity_even_of_floors(
    case: Any, scope: str
) -> None:
    scores, bounds, _ = case
    floors = as_fractions(scores, bounds, 0)
    k = sum(low for low, _ in bounds.values()) // 2
    total = len(flat(scores))
    removed = removed_by_layer(
        select(scores, k / total, final=0.99, scope=scope, layer_min_sparsity=floors).masks
    )
    assert sum(len(positions) for positions in removed.values()) == k
    assert all(len(removed[name]) <= low for name, (low, _) in bounds.items())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_early_rounds_leave_room_for_the_floors_of_the_last(scope: str) -> None:
    scores = {"a": draw(10, seed=1), "b": draw(10, seed=2) - 9}
    masks = None
    for sparsity in (0.2, 0.4, 0.5):
        floor = {"layer_min_sparsity": {"a": 0.9}}
        masks = select(scores, sparsity, masks, final=0.5, scope=scope, **floor).masks
    assert [len(gone) for gone in removed_by_layer(masks).values()] == [9, 1]


def test_a_floor_is_kept_where_scores_alone_would_not() -> None:
    scores = {"cheap": torch.zeros(10), "dear": torch.ones(10)}
    chosen = select(scores, 0.5, layer_min_sparsity={"dear": 0.3}).masks
    assert {name: len(gone) for name, gone in removed_by_layer(chosen).items()} == {
        "cheap": 7,
        "dear": 3,
    }


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_floor_that_is_no_whole_number_never_contradicts_the_total(scope: str) -> None:
    """Half of 3 rounds up to 2, and three such floors are more than half of 9."""
    scores = {name: draw(3, seed=i) for i, name in enumerate("abc")}
    assert select(scores, 0.5, scope=scope, layer_min_sparsity=0.5).masks.num_pruned == 5
    third = {"layer_min_sparsity": 1 / 3, "layer_max_sparsity": {"*": 1 / 3}}
    exact = select(scores, 1 / 3, scope=scope, **third).masks
    assert [len(gone) for gone in removed_by_layer(exact).values()] == [1, 1, 1]


def test_the_later_of_two_matching_globs_counts() -> None:
    scores = {"cheap.weight": torch.zeros(10), "dear.weight": torch.ones(10)}
    for bounds, expected in (
        ({"*": 0.5, "cheap.*": 0.8}, 8),
        ({"cheap.*": 0.8, "*": 0.5}, 5),
    ):
        removed = removed_by_layer(select(scores, 0.5, layer_max_sparsity=bounds).masks)
        assert len(removed["cheap.weight"]) == expected


@pytest.mark.parametrize("key", ["layer_min_sparsity", "layer_max_sparsity"])
def test_a_bound_for_no_layer_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"prune.{key}.'conv.\*': matches no prunable"):
        select({"fc.weight": torch.ones(4)}, 0.5, **{key: {"conv.*": 0.5}})


# -- layers held back ------------------------------------------------------------------------------


def test_a_layer_that_would_be_emptied_keeps_its_best_weight_and_is_reported() -> None:
    scores = {"a": torch.tensor([0.1, 0.3, 0.2]), "b": torch.arange(10.0) + 1}
    chosen = select(scores, 4 / 13)
    assert removed_by_layer(chosen.masks) == {"a": {0, 2}, "b": {0, 1}}
    assert chosen.capped_layers == ("a",)


def test_a_layer_that_only_the_surplus_of_another_would_empty_is_reported_too() -> None:
    scores = {
        "a": torch.tensor([1.0, 2.0, 3.0]),
        "b": torch.tensor([4.0, 5.0]),
        "c": torch.arange(10.0) + 10,
    }
    chosen = select(scores, 4 / 15)
    # Of the lowest four, 1 2 3 4, the 3 must stay; the next, 5, would empty b.
    assert removed_by_layer(chosen.masks) == {"a": {0, 1}, "b": {0}, "c": {0}}
    assert chosen.capped_layers == ("a", "b")


def test_no_layer_is_reported_that_lost_all_it_would_have_lost() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 30.0]), "b": torch.arange(10.0) + 10}
    chosen = select(scores, 3 / 13)
    assert removed_by_layer(chosen.masks) == {"a": {0, 1}, "b": {0}}
    assert chosen.capped_layers == ()


def test_layer_scope_reports_what_its_ceiling_held_back() -> None:
    scores = {"a": draw(10, seed=1), "b": draw(10, seed=2)}
    chosen = select(scores, 0.6, scope="layer", layer_max_sparsity={"a": 0.4})
    assert [len(gone) for gone in removed_by_layer(chosen.masks).values()] == [4, 8]
    assert chosen.capped_layers == ("a",)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_an_impossible_sparsity_is_refused(scope: str) -> None:
    scores = {"a": draw(10), "b": draw(10, seed=1)}
    with pytest.raises(PruneError, match=r"asks for 19 of 20 weights.*allow 18"):
        select(scores, 0.95, scope=scope)
    with pytest.raises(PruneError, match=r"asks for 16 of 20 weights.*allow 14"):
        select(scores, 0.8, scope=scope, layer_max_sparsity={"a": 0.5})
    with pytest.raises(PruneError, match=r"asks for 4 of 20 weights.*floors"):
        select(scores, 0.2, scope=scope, layer_min_sparsity={"a": 0.5})


@given(case=bounded_cases(), scope=st.sampled_from(["global", "layer"]))
def test_what_cannot_be_reached_shows_without_scores(case: Any, scope: str) -> None:
    scores, bounds, k = case
    config = prune_config(
        sparsity=k / len(flat(scores)),
        scope=scope,
        layer_min_sparsity=as_fractions(scores, bounds, 0),
        layer_max_sparsity=as_fractions(scores, bounds, 1),
    )
    shapes = {name: tuple(values.shape) for name, values in scores.items()}
    if cheapest(scores, bounds, k) is None:
        with pytest.raises(ConfigError, match=r"^prune\.sparsity = "):
            check_reachable(shapes, config)
    else:
        check_reachable(shapes, config)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"sparsity": 0.9, "layer_max_sparsity": {"a.*": 0.5, "b.*": 0.88}},
            r"asks for 198 of 220 weights, but the layers may lose 190 at most "
            r"\('a\.weight' 5 of 10, 'b\.weight' 176 of 200\); lower it or raise "
            r"prune\.layer_max_sparsity$",
        ),
        ({"sparsity": 0.99}, r"218 of 220 weights.* 217 at most .*'a\.weight' 9 of 10"),
        (
            {"sparsity": 0.1, "layer_min_sparsity": {"b.*": 0.2}},
            r"asks for 22 of 220 weights, but the layers must lose 40 at least "
            r"\('b\.weight' 40 of 200\); raise it or lower prune\.layer_min_sparsity$",
        ),
        (
            {"sparsity": 0.5, "granularity": "1:2", "layer_max_sparsity": {"a.*": 0.2}},
            r"110 of 220 weights.* 107 at most \('a\.weight' 2 of 10\)",
        ),
    ],
    ids=["ceilings", "one stays", "floors", "pattern"],
)
def test_a_sparsity_out_of_reach_names_the_layers_in_the_way(
    fields: dict[str, Any], reason: str
) -> None:
    shapes = {"a.weight": (1, 10), "b.weight": (20, 10), "c.weight": (1, 10)}
    with pytest.raises(ConfigError, match=rf"^prune\.sparsity = {fields['sparsity']}: .*{reason}"):
        check_reachable(shapes, prune_config(**fields))


def test_only_the_first_of_many_layers_in_the_way_are_named() -> None:
    shapes = {f"{number}.weight": (10, 10) for number in range(9)}
    bounds = {"sparsity": 0.9, "layer_max_sparsity": {"*": 0.5}}
    with pytest.raises(ConfigError, match=r"'4\.weight' 50 of 100 and 4 more\); lower"):
        check_reachable(shapes, prune_config(**bounds))


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_a_later_decision_holds_no_copy_of_the_scores(granularity: str) -> None:
    """Beside the new masks, one byte a weight, and what a pattern exempts, another one."""
    num_weights = 2**22
    scores = {f"layer{i}.weight": draw(2**9, 2**9, seed=i) for i in range(16)}
    half = select(scores, 0.2, final=0.5, granularity=granularity).masks
    assert half.num_units == num_weights
    config = prune_config(sparsity=0.5, granularity=granularity)
    tracemalloc.start()
    try:
        select_masks(scores, half, config, 0.4)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    least = num_weights * (1 if granularity == "weight" else 2)
    assert least < peak_bytes < least + num_weights


# -- rows ------------------------------------------------------------------------------------------


@given(scores=layered_scores(), data=st.data())
def test_each_row_loses_the_same_number_of_its_lowest(scores: dict[str, Tensor], data: Any) -> None:
    """In one decision and in two, which go on from unequal rows, too."""
    scores = {name: v[: len(v) // 2 * 2].reshape(2, -1) for name, v in scores.items()}
    total = sum(values.numel() for values in scores.values())
    most = sum(values.numel() - 1 for values in scores.values())
    first, last = sorted(data.draw(st.integers(0, most)) / total for _ in range(2))
    config = prune_config(sparsity=last, scope="row")
    masks = dense(scores)
    for sparsity in (first, last):
        alone = select_masks(scores, masks, config, sparsity).masks
        by_layer = select_masks(
            scores, masks, prune_config(sparsity=last, scope="layer"), sparsity
        ).masks
        for name, mask in alone.items():
            before, values = masks[name], scores[name]
            gone = (~mask).sum(dim=1)
            assert int(gone.sum()) == int((~by_layer[name]).sum())
            free = gone > (~before).sum(dim=1)
            if free.any():
                assert int(gone[free].max()) <= int(gone.min()) + 1
            for row in range(len(values)):
                keys = [
                    (bool(before[row, i]), float(values[row, i]), i) for i in range(values.shape[1])
                ]
                wanted = sorted(range(values.shape[1]), key=keys.__getitem__)[: int(gone[row])]
                assert sorted(wanted) == (~mask[row]).nonzero().flatten().tolist()
        masks = alone


def test_rows_are_whole_on_every_rank() -> None:
    scores = {"a": draw(7, 5), "b": draw(3, 2, 3, seed=1), "c": draw(1, 9, seed=2)}
    config = prune_config(sparsity=0.5, scope="row")
    masks = dense(scores)
    wanted = select_masks(scores, masks, config, 0.5).masks
    units = [Prunable(name, torch.nn.Parameter(values), 1) for name, values in scores.items()]

    def program(ranks: ThreadRanks) -> str:
        own = Layout(units, ranks).own
        values = [scores[s.name].flatten()[s.start : s.stop] for s in own]
        return select_masks(SlicedScores(own, values), masks, config, 0.5, ranks=ranks).masks.digest

    assert {wanted.digest} == set(on_threads(3, program))


def test_rows_that_no_rank_holds_whole_are_refused() -> None:
    scores = {"a.weight": draw(4, 4)}
    config = prune_config(sparsity=0.5, scope="row")
    with pytest.raises(ConfigError, match=r"^prune\.scope = 'row': .* outputs of 'a\.weight' do"):
        select_masks(scores, dense(scores), config, 0.5, input_dims={"a.weight": 0})
    with pytest.raises(ValueError, match=r'scope = "row": compares single weights, and granul'):
        prune_config(sparsity=0.5, scope="row", granularity="2:4")
