from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gbp_ray.config.prune import SCHEDULES, PruneConfig, sparsity_schedule
from gbp_ray.errors import ConfigError

sparsities = st.floats(0, 1, exclude_max=True, allow_subnormal=False)


@given(kind=st.sampled_from(SCHEDULES), sparsity=sparsities, rounds=st.integers(1, 30))
def test_a_schedule_rises_to_the_sparsity_exactly(kind: str, sparsity: float, rounds: int) -> None:
    steps = sparsity_schedule(kind, sparsity, rounds)
    assert len(steps) == rounds
    assert steps[-1] == sparsity
    assert all(0 <= step < 1 for step in steps)
    assert all(b - a >= -1e-12 for a, b in itertools.pairwise(steps))


@given(
    kind=st.sampled_from(SCHEDULES),
    sparsity=sparsities,
    ramp=st.integers(1, 20),
    rest=st.integers(0, 10),
)
def test_a_ramp_is_a_whole_schedule_that_then_stays(
    kind: str, sparsity: float, ramp: int, rest: int
) -> None:
    steps = sparsity_schedule(kind, sparsity, ramp + rest, ramp)
    assert steps[:ramp] == sparsity_schedule(kind, sparsity, ramp)
    assert steps[ramp:] == [sparsity] * rest


@given(sparsity=sparsities, rounds=st.integers(1, 30))
def test_one_shot_is_there_at_once(sparsity: float, rounds: int) -> None:
    assert sparsity_schedule("one_shot", sparsity, rounds) == [sparsity] * rounds


@given(sparsity=sparsities, rounds=st.integers(1, 30))
def test_linear_removes_the_same_number_each_round(sparsity: float, rounds: int) -> None:
    steps = [0.0, *sparsity_schedule("linear", sparsity, rounds)]
    removed = [b - a for a, b in itertools.pairwise(steps)]
    assert removed == pytest.approx([sparsity / rounds] * rounds, abs=1e-12)


@given(sparsity=st.floats(0.01, 0.999), rounds=st.integers(1, 30))
def test_geometric_removes_the_same_share_of_what_is_left(sparsity: float, rounds: int) -> None:
    left = [1.0, *(1 - step for step in sparsity_schedule("geometric", sparsity, rounds))]
    shares = [b / a for a, b in itertools.pairwise(left)]
    assert shares == pytest.approx([math.exp(math.log(1 - sparsity) / rounds)] * rounds, rel=1e-6)


def test_cubic_is_that_of_zhu_and_gupta() -> None:
    """s_t = s_f + (s_i - s_f) (1 - t / n)^3 with s_i = 0, in fractions."""
    final = Fraction(9, 10)
    expected = [final - final * (1 - Fraction(t, 6)) ** 3 for t in range(1, 7)]
    assert sparsity_schedule("cubic", 0.9, 6) == pytest.approx([float(step) for step in expected])


def test_a_schedule_of_the_job_is_known_here_and_the_other_way_round() -> None:
    allowed = PruneConfig.model_fields["schedule"].annotation.__args__
    assert set(allowed) == set(SCHEDULES)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prune\.schedule = 'cubical': not a schedule"):
        sparsity_schedule("cubical", 0.5, 3)
