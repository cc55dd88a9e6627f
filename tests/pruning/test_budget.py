"""Budgets of whole units against all subsets of tiny structures."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from chains import count_from_shapes, make_structure
from hypothesis import given
from hypothesis import strategies as st

from gbp_ray.config.prune import PruneConfig
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.budget import (
    Bounds,
    Budget,
    check_budget,
    count_cost,
    plan_budgets,
    select_units,
)
from gbp_ray.pruning.structure import Axis, Group, Product, Structure

KINDS = ("sparsity", "parameters", "macs", "bytes")
SLACK = 1e-9


def allowed_widths(size: int, start: int, bounds: Bounds) -> list[int]:
    """Lists the widths of a group, as the bounds are described; they are numbers here."""
    steps = [w for w in range(1, start) if w % bounds.round_to == 0] + [start]
    low = size - math.floor(bounds.max_sparsity * size + SLACK)
    high = size - math.floor(bounds.min_sparsity * size + SLACK)
    most = [w for w in steps if w >= max(low, bounds.min_width)] or [start]
    floor = [w for w in most if w >= high]
    return [w for w in most if w <= (floor or most[-1:])[0]]


structures = st.builds(
    make_structure, st.lists(st.integers(1, 4), min_size=1, max_size=3), residual=st.booleans()
)
all_bounds = st.builds(
    Bounds,
    round_to=st.sampled_from([1, 1, 2, 3]),
    min_width=st.sampled_from([1, 1, 2, 3]),
    min_sparsity=st.sampled_from([0.0, 0.0, 0.25, 0.5]),
    max_sparsity=st.sampled_from([1.0, 1.0, 0.75, 0.5, 0.0]),
)


@given(data=st.data())
def test_a_choice_is_as_large_as_the_limit_allows_and_no_larger(data: st.DataObject) -> None:
    """Of all subsets: those within the bounds that keep what was pruned before pruned."""
    structure, bounds = data.draw(structures), data.draw(all_bounds)
    kind, scope = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(["global", "layer"]))
    size = structure.num_units
    values = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 1.0, 3.0, 7.0])
    scores_U = np.array(data.draw(st.lists(values, min_size=size, max_size=size)))
    before_U = np.array(
        data.draw(st.lists(st.sampled_from([1, 1, 1, 0]), min_size=size, max_size=size)), dtype=bool
    )
    for kept_G in structure.split(before_U):
        kept_G[0] = True
    before = count_from_shapes(structure, kind, before_U)
    limit = data.draw(st.integers(0, before))
    widths = [
        allowed_widths(group.num_units, int(kept_G.sum()), bounds)
        for group, kept_G in zip(structure.groups, structure.split(before_U), strict=True)
    ]

    def cost_at(chosen: tuple[int, ...]) -> int:
        pairs = zip(structure.groups, chosen, strict=True)
        kept_U = np.concatenate([np.arange(group.num_units) < w for group, w in pairs])
        return count_from_shapes(structure, kind, kept_U)

    costs = {chosen: cost_at(chosen) for chosen in itertools.product(*widths)}
    budget, ask = Budget(kind, limit), {"scope": scope, "bounds": bounds}
    if min(costs.values()) > limit:
        with pytest.raises(PruneError, match=r"to stay, and at least"):
            select_units(structure, scores_U, before_U, budget, **ask)
        return
    # Floors are in the way where a step that only they ask for fits.
    floors, free = max(costs), replace(bounds, min_sparsity=0.0)
    for number, (group, start) in enumerate(
        zip(structure.groups, structure.widths(before_U), strict=True)
    ):
        wider = [w for w in allowed_widths(group.num_units, start, free) if w > floors[number]]
        if wider and cost_at((*floors[:number], wider[0], *floors[number + 1 :])) <= limit:
            with pytest.raises(PruneError, match=r"^prune\.layer_min_sparsity: leaves"):
                select_units(structure, scores_U, before_U, budget, **ask)
            return
    choice = select_units(structure, scores_U, before_U, budget, **ask)
    kept_U = choice.kept_U
    assert not np.any(kept_U & ~before_U)
    assert count_from_shapes(structure, kind, kept_U) == choice.cost <= limit
    assert count_cost(structure, kind, kept_U) == choice.cost
    assert tuple(structure.widths(kept_U)) in costs
    fits = []
    for number, (scores_G, kept_G, before_G) in enumerate(
        zip(
            structure.split(scores_U),
            structure.split(kept_U),
            structure.split(before_U),
            strict=True,
        )
    ):
        gone = scores_G[before_G & ~kept_G]
        assert not len(gone) or gone.max() <= scores_G[kept_G].min()
        now = structure.widths(kept_U)
        wider = [w for w in widths[number] if w > now[number]]
        if wider:
            now[number] = wider[0]
            fits.append(costs[tuple(now)] <= limit)
    # Within one unit: of any group, or of one where all groups keep the same share.
    assert not any(fits) if scope == "global" else not fits or not all(fits)
    again = select_units(structure, scores_U, before_U, budget, **ask)
    assert np.array_equal(again.kept_U, kept_U)
    assert again.held_back == choice.held_back


@given(data=st.data())
def test_sparsity_removes_exactly_the_lowest_scores(data: st.DataObject) -> None:
    """Ties go by unit number; the best unit of each group always stays."""
    structure = data.draw(structures)
    size = structure.num_units
    scores_U = np.array(
        data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size)), dtype=float
    )
    last = set()
    for first, scores_G in zip(structure.bounds, structure.split(scores_U), strict=False):
        last.add(first + max(range(len(scores_G)), key=lambda i: (scores_G[i], i)))
    number = data.draw(st.integers(0, size - len(last)))
    order = sorted(set(range(size)) - last, key=lambda unit: (scores_U[unit], unit))
    expected_U = np.ones(size, dtype=bool)
    expected_U[order[:number]] = False
    ones_U = np.ones(size, dtype=bool)
    choice = select_units(structure, scores_U, ones_U, Budget("sparsity", size - number))
    assert np.array_equal(choice.kept_U, expected_U)
    assert not choice.held_back


@given(data=st.data())
def test_each_step_has_the_lowest_price_of_all_at_its_widths(data: st.DataObject) -> None:
    """Follows the greedy choice one step at a time, in fractions, without heap or bounds."""
    structure, kind = data.draw(structures), data.draw(st.sampled_from(KINDS))
    size = structure.num_units
    scores_U = np.array(
        data.draw(st.lists(st.integers(-4, 9), min_size=size, max_size=size)), dtype=float
    )
    kept_U = np.ones(size, dtype=bool)
    for _ in range(size - len(structure.groups)):
        cost, prices = count_from_shapes(structure, kind, kept_U), []
        for first, kept_G in zip(structure.bounds, structure.split(kept_U), strict=False):
            if kept_G.sum() < 2:
                continue
            unit = min(first + np.flatnonzero(kept_G), key=lambda u: (scores_U[u], u))
            without_U = kept_U.copy()
            without_U[unit] = False
            saved = cost - count_from_shapes(structure, kind, without_U)
            score = Fraction(int(scores_U[unit]))
            prices.append((score if score < 0 else score / saved, unit, without_U))
        _, _, after_U = min(prices, key=lambda price: price[:2])
        limit = count_from_shapes(structure, kind, after_U)
        choice = select_units(structure, scores_U, kept_U, Budget(kind, limit))
        assert np.array_equal(choice.kept_U, after_U)
        kept_U = after_U


def test_a_gain_goes_before_a_larger_gain_that_saves_less_only_by_its_score() -> None:
    structure = make_structure([2, 2])
    scores_U = np.array([-1.0, 5.0, -2.0, 5.0])
    ones_U = np.ones(4, dtype=bool)
    for kind in KINDS:
        limit = count_cost(structure, kind, ones_U) - 1
        kept_U = select_units(structure, scores_U, ones_U, Budget(kind, limit)).kept_U
        assert kept_U.tolist() == [True, True, False, True]


def test_the_scope_layer_takes_the_same_share_of_every_group() -> None:
    structure = make_structure([40, 10, 21])
    scores_U = np.concatenate([np.full(40, 9.0), np.full(10, 1.0), np.full(21, 4.0)])
    ones_U = np.ones(71, dtype=bool)
    for share in (0.1, 0.5, 0.8):
        budget = Budget("sparsity", 71 - round(71 * share))
        choice = select_units(structure, scores_U, ones_U, budget, scope="layer")
        gone = [
            1 - w / g.num_units
            for w, g in zip(structure.widths(choice.kept_U), structure.groups, strict=True)
        ]
        assert choice.cost == budget.limit
        assert gone == pytest.approx([share] * 3, abs=0.05)
    budget = Budget("macs", 0.3 * count_cost(structure, "macs", ones_U))
    widths = structure.widths(
        select_units(structure, scores_U, ones_U, budget, scope="layer").kept_U
    )
    shares = [1 - w / g.num_units for w, g in zip(widths, structure.groups, strict=True)]
    assert max(shares) - min(shares) < 0.2


def test_only_groups_that_a_ceiling_stopped_are_held_back() -> None:
    structure = make_structure([4, 4, 4])
    scores_U = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    ones_U = np.ones(12, dtype=bool)
    names = [group.name for group in structure.groups]
    found = []
    for bounds in (
        Bounds(),
        Bounds(max_sparsity={"l0.*": 0.5}),
        Bounds(max_sparsity={"*": 0.9, "l0.weight": 0.25}),
        Bounds(min_width=3),
    ):
        choice = select_units(structure, scores_U, ones_U, Budget("sparsity", 9), bounds=bounds)
        found.append((structure.widths(choice.kept_U), choice.held_back))
    assert found == [
        ([1, 4, 4], ()),
        ([2, 3, 4], (names[0],)),
        ([3, 2, 4], (names[0],)),
        ([3, 3, 3], tuple(names[:2])),
    ]


def test_a_bound_by_glob_holds_for_groups_with_a_tensor_that_matches() -> None:
    structure = make_structure([4, 4])
    ones_U = np.ones(8, dtype=bool)
    bounds = Bounds(min_sparsity={"l2.*": 0.5})
    choice = select_units(structure, np.arange(8.0), ones_U, Budget("sparsity", 4), bounds=bounds)
    assert structure.widths(choice.kept_U) == [2, 2]  # l2 reads the second group
    with pytest.raises(ConfigError, match=r"^prune\.layer_max_sparsity\.'l7\.\*': matches no"):
        select_units(
            structure,
            np.arange(8.0),
            ones_U,
            Budget("sparsity", 4),
            bounds=Bounds(max_sparsity={"l7.*": 0.5}),
        )


def test_floors_bind_the_last_decision_and_share_out_an_earlier_one() -> None:
    structure = make_structure([8, 4])
    scores_U, ones_U = np.arange(12.0), np.ones(12, dtype=bool)
    bounds = Bounds(min_sparsity=0.5)
    early = select_units(
        structure, scores_U, ones_U, Budget("sparsity", 9, is_final=False), bounds=bounds
    )
    assert structure.widths(early.kept_U) == [6, 3]
    last = select_units(structure, scores_U, ones_U, Budget("sparsity", 6), bounds=bounds)
    assert structure.widths(last.kept_U) == [4, 2]
    with pytest.raises(PruneError, match=r"^prune\.layer_min_sparsity: leaves 6 units, and prune"):
        select_units(structure, scores_U, ones_U, Budget("sparsity", 7), bounds=bounds)


def test_scores_and_limits_that_cannot_be_used_are_refused_by_name() -> None:
    structure = make_structure([4, 4])
    scores_U, ones_U = np.arange(8.0), np.ones(8, dtype=bool)
    with pytest.raises(
        PruneError,
        match=r"^prune\.target\.parameters: allows 2 weights to stay, and at least 6 of "
        r"36 do.*raise it to 0\.1667",
    ):
        select_units(structure, scores_U, ones_U, Budget("parameters", 2))
    with pytest.raises(PruneError, match=r"^prune\.sparsity: .* of 8 do.*lower it to 0\.75,"):
        select_units(structure, scores_U, ones_U, Budget("sparsity", 1))
    scores_U[5] = np.nan
    with pytest.raises(PruneError, match=r"^scores of 'l1\.weight': those of 1 units are NaN"):
        select_units(structure, scores_U, ones_U, Budget("sparsity", 6))
    ones_U[5] = False
    select_units(structure, scores_U, ones_U, Budget("sparsity", 6))
    with pytest.raises(PruneError, match=r"^scores of units: shape \(7,\)"):
        select_units(structure, scores_U[:7], ones_U, Budget("sparsity", 6))


def test_costs_beyond_64_bits_are_exact() -> None:
    chain = make_structure([3, 4])
    huge = tuple(Product(10**19 + 1, p.axes, p.name) for p in chain.macs)
    structure = Structure(chain.groups, huge, chain.weights, chain.bytes_per_weight, chain.shapes)
    ones_U, scores_U = np.ones(7, dtype=bool), np.array([1.0, 3, 2, 5, 4, 1, 6])
    small = Structure(
        chain.groups, chain.weights, chain.weights, chain.bytes_per_weight, chain.shapes
    )
    choice = select_units(structure, scores_U, ones_U, Budget("macs", 15 * (10**19 + 1)))
    same = select_units(small, scores_U, ones_U, Budget("macs", 15))
    assert np.array_equal(choice.kept_U, same.kept_U)
    assert choice.cost == same.cost * (10**19 + 1)


# -- budgets of a job ------------------------------------------------------------------------------


def make_config(**fields: object) -> PruneConfig:
    return PruneConfig(**{"criterion": "taylor", "granularity": "channel", **fields})


def test_the_removed_share_of_a_cost_follows_the_schedule() -> None:
    structure = make_structure([10, 10])
    ones_U = np.ones(20, dtype=bool)
    prune = make_config(target={"macs": 0.4}, rounds=3, schedule="linear")
    dense = count_cost(structure, "macs", ones_U)
    plan = plan_budgets(structure, prune, ones_U)
    assert [b.limit for b in plan] == pytest.approx([0.8 * dense, 0.6 * dense, 0.4 * dense])
    assert [b.is_final for b in plan] == [False, False, True]
    assert plan[-1].limit == 0.4 * dense
    some_U = ones_U.copy()
    some_U[:5] = False
    start = count_cost(structure, "macs", some_U)
    plan = plan_budgets(structure, prune, some_U)
    steps = np.linspace(start, 0.4 * dense, 4)[1:]
    assert [b.limit for b in plan] == pytest.approx(steps)
    absolute = make_config(target={"bytes": 100}, rounds=2, ramp_rounds=1)
    assert plan_budgets(structure, absolute, ones_U) == [Budget("bytes", 100.0)] * 2


def test_a_sparsity_leaves_whole_numbers_of_units() -> None:
    structure = make_structure([10, 11])
    ones_U = np.ones(21, dtype=bool)
    prune = make_config(sparsity=0.5, rounds=2, schedule="linear")
    plan = plan_budgets(structure, prune, ones_U)
    assert plan == [Budget("sparsity", 16.0, is_final=False), Budget("sparsity", 10.0)]


def test_targets_out_of_reach_are_refused_before_any_round() -> None:
    structure = make_structure([4, 4])
    ones_U = np.ones(8, dtype=bool)
    some_U = np.array([1, 0, 0, 0, 1, 0, 0, 0], dtype=bool)
    check_budget(structure, make_config(target={"parameters": 20}), ones_U)
    with pytest.raises(ConfigError, match=r"^prune\.target\.macs = 1e\+06: is more than the 6\d "):
        check_budget(structure, make_config(target={"macs": 1e6}), ones_U)
    with pytest.raises(
        ConfigError, match=r"^prune\.target\.parameters = 0\.9: leaves 32 .* 6, and"
    ):
        check_budget(structure, make_config(target={"parameters": 0.9}), some_U)
    with pytest.raises(ConfigError, match=r"^prune\.sparsity = 0\.5: leaves 4 .* 2, and .* raise"):
        check_budget(structure, make_config(sparsity=0.5), some_U)
    with pytest.raises(PruneError, match=r"^prune\.target\.parameters: allows 14 .* 24 of 36"):
        check_budget(structure, make_config(target={"parameters": 0.4}, min_width=3), ones_U)
    with pytest.raises(PruneError, match=r"^prune\.layer_min_sparsity: leaves 14 weights"):
        check_budget(
            structure, make_config(target={"parameters": 30}, layer_min_sparsity=0.5), ones_U
        )


def test_scores_drawn_at_random_do_not_count_per_cost() -> None:
    cheap = Group("cheap", "channel", 4, ())
    dear = Group("dear", "channel", 4, ())
    products = (Product(1, (Axis(0, ((0, 1),)),)), Product(100, (Axis(0, ((1, 1),)),)))
    structure = Structure((cheap, dear), products, (), {}, {})
    prune = PruneConfig(criterion="random", granularity="channel", target={"macs": 0.7})
    everything = np.ones(8, dtype=bool)
    (budget,) = plan_budgets(structure, prune, everything)
    scores_U = np.array([0.1, 0.2, 0.3, 0.9, 0.4, 0.5, 0.8, 0.7])
    drawn = select_units(structure, scores_U, everything, budget)
    # The lowest go in turn until the limit is met, then what fits comes back.
    assert drawn.kept_U.tolist() == [True, True, True, True, False, False, True, True]
    assert not budget.is_by_cost
    priced = plan_budgets(structure, prune.model_copy(update={"criterion": "taylor"}), everything)
    assert priced[0].is_by_cost
