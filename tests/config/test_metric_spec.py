"""A metric in words: its direction, how values are written, and which of them tell nothing."""

from __future__ import annotations

import math

import pytest

from gbp_ray.config.metrics import ACCURACY, LOSS, MetricSpec, find_constant

RMSE = MetricSpec(name="rmse", higher_is_better=False, unit="m")
PERPLEXITY = MetricSpec(name="perplexity", higher_is_better=False, chance=50.0)


def guess(chance: float) -> MetricSpec:
    return MetricSpec(name="accuracy", unit="%", chance=chance)


@pytest.mark.parametrize("metric", [ACCURACY, RMSE, LOSS])
def test_the_greatest_rank_is_best_and_nan_is_worst(metric: MetricSpec) -> None:
    values = [0.25, 0.5, 0.75]
    best = max(values, key=metric.rank)
    assert best == (0.75 if metric.higher_is_better else 0.25)
    assert max([math.nan, *values], key=metric.rank) == best
    assert metric.rank(math.nan) == -math.inf


def test_values_are_written_in_their_unit() -> None:
    assert ACCURACY.write(0.98765) == "98.77%"
    assert ACCURACY.write_change(-0.0123) == "-1.23 points"
    assert RMSE.write(0.123456) == "0.1235 m"
    assert RMSE.write_change(0.5) == "+0.5 m"
    assert PERPLEXITY.write(math.inf) == "inf"
    assert (ACCURACY.label, RMSE.label, PERPLEXITY.label) == (
        "accuracy, %",
        "rmse, m",
        "perplexity",
    )
    assert MetricSpec(name="mIoU").title == "MIoU"


@pytest.mark.parametrize(
    ("metric", "values", "words"),
    [
        (ACCURACY, [0.5, 79.0], "accuracy 79 is no share"),
        (ACCURACY, [0.0, 0.0], "accuracy is 0 throughout"),
        (ACCURACY, [0.0, 0.1], ""),
        (RMSE, [0.0, 0.0], ""),
        (PERPLEXITY, [math.inf, math.inf], "perplexity is inf throughout"),
        (PERPLEXITY, [math.inf, 20.0], ""),
        (RMSE, [math.nan], "rmse is nan throughout"),
        (RMSE, [], ""),
    ],
)
def test_values_without_a_meaning_are_named(
    metric: MetricSpec, values: list[float], words: str
) -> None:
    fault = metric.find_fault(values)
    assert fault.startswith(words)
    assert bool(fault) == bool(words)


@pytest.mark.parametrize(("chance", "number"), [(0.1, 360), (0.5, 150), (0.25, 40), (0.01, 900)])
def test_a_guess_is_seldom_taken_for_knowledge(chance: float, number: int) -> None:
    least = min(
        right
        for right in range(number + 1)
        if not guess(chance).find_chance_fault(right / number, number)
    )
    # The binomial tail, by its definition: how often guesses get as many right.
    tail = sum(
        math.comb(number, k) * chance**k * (1 - chance) ** (number - k)
        for k in range(least, number + 1)
    )
    assert 0.005 < tail < 0.05


def test_more_is_asked_of_values_that_are_no_shares() -> None:
    assert "50.5 on 9 items, no better than by chance (50)" in PERPLEXITY.find_chance_fault(50.5, 9)
    assert PERPLEXITY.find_chance_fault(49.6, 9)
    assert not PERPLEXITY.find_chance_fault(49.4, 9)
    assert PERPLEXITY.find_chance_fault(math.inf, 9)
    r2 = MetricSpec(name="r2", chance=0.0)
    assert [bool(r2.find_chance_fault(value, 9)) for value in (-0.5, 0.0, 0.1)] == [
        True,
        True,
        False,
    ]
    # Where nothing is known of chance nothing is said.
    assert not RMSE.find_chance_fault(1e9, 9)


def test_what_is_the_same_everywhere_is_named() -> None:
    assert "accuracy is 75.00% in all rounds" in find_constant(ACCURACY, [0.75] * 3)
    assert not find_constant(ACCURACY, [0.75] * 2), "two may agree by luck"
    assert not find_constant(ACCURACY, [0.75, 0.75, 0.74])


def test_two_measurements_differ_by_half_a_point_or_half_a_percent() -> None:
    assert not ACCURACY.has_gap(0.9, 0.9049)
    assert ACCURACY.has_gap(0.9, 0.9051)
    assert not PERPLEXITY.has_gap(20.0, 20.09)
    assert PERPLEXITY.has_gap(20.0, 20.11)
    assert not PERPLEXITY.has_gap(math.inf, math.inf)
    assert PERPLEXITY.has_gap(math.inf, 20.0)
