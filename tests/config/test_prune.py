from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gbp_ray.config.job import JobConfig, expand, load_job, trial_id
from gbp_ray.config.prune import SCHEDULES, PruneConfig, sparsity_schedule
from gbp_ray.config.schema import find_idle_options
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


# -- targets of whole units ------------------------------------------------------------------------

PRUNE = {"criterion": "taylor", "granularity": "channel"}


def make_job(prune: dict[str, object], **sections: object) -> JobConfig:
    return load_job({"name": "a", "workload": {"factory": "m:f"}, "prune": prune, **sections})


@pytest.mark.parametrize(
    ("granularity", "kinds"),
    [
        ("weight", ()),
        ("channel", ("channel",)),
        ("head", ("head",)),
        ("channel+head", ("channel", "head")),
    ],
)
def test_a_granularity_names_kinds_of_units(granularity: str, kinds: tuple[str, ...]) -> None:
    prune = PruneConfig(criterion="taylor", sparsity=0.5, granularity=granularity)
    assert (prune.unit_kinds, prune.pattern) == (kinds, None)


def test_a_target_of_a_cost_stands_for_the_sparsity_and_makes_it_idle() -> None:
    job = make_job(PRUNE | {"target": {"macs": 0.5}})
    assert trial_id(job).startswith("taylor-macs0.50-r1-")
    both = load_job(job, {"prune.sparsity": 0.9})
    assert trial_id(both) == trial_id(job)
    assert find_idle_options(both) == [("prune.sparsity", "prune.target.macs = 0.5")]
    # A record has all fields set.
    again = JobConfig.model_validate_json(job.model_dump_json())
    assert (trial_id(again), find_idle_options(again)) == (trial_id(job), [])
    other = load_job(job, {"prune.target": {"bytes": 2e6}})
    assert trial_id(other).startswith("taylor-bytes2000000-r1-")
    assert "to bytes 2000000 in 1 rounds" in repr(other)


def test_a_target_of_sparsity_is_the_sparsity() -> None:
    job = make_job(PRUNE | {"target": {"sparsity": 0.75}})
    assert job.prune.sparsity == 0.75
    assert trial_id(job) == trial_id(make_job(PRUNE | {"sparsity": 0.75}))
    assert load_job(job, {"prune.target.sparsity": 0.5}).prune.sparsity == 0.5


def test_options_of_units_are_idle_without_units() -> None:
    options = {"round_to": 8, "min_width": 2, "compact": False}
    job = make_job({"criterion": "taylor", "sparsity": 0.5, **options})
    reason = "prune.granularity = weight"
    assert find_idle_options(job) == [(f"prune.{name}", reason) for name in options]
    assert not find_idle_options(make_job(PRUNE | {"sparsity": 0.5, **options}))


@pytest.mark.parametrize(
    ("prune", "fault"),
    [
        ({}, "prune.sparsity: is required"),
        ({"target": {}}, "prune.sparsity: is required"),
        (
            {"granularity": "weight", "target": {"macs": 0.5}},
            'prune.target.macs = 0.5: is met by removing whole units, not with granularity = "weigh'
            't"; set granularity to channel, head or channel+head',
        ),
        (
            {"granularity": "2:4", "target": {"parameters": 1e6}},
            "prune.target.parameters = 1000000: is met by removing whole units, not with granularit"
            'y = "2:4"; set granularity to channel, head or channel+head',
        ),
        (
            {"target": {"macs": 0.5, "bytes": 0.5}},
            "prune.target.macs and bytes: are 2 targets; leave one",
        ),
        (
            {"sparsity": 0.9, "target": {"sparsity": 0.5}},
            "prune.target.sparsity = 0.5: contradicts sparsity = 0.9; leave one of them out",
        ),
        (
            {"target": {"latency_ms": 3}},
            "prune.target.latency_ms: is not offered, as a latency is measured after a decision; se"
            "t macs, and measure the result with gbp-ray export",
        ),
        (
            {"target": {"mac": 0.5}},
            "prune.target.mac: no such key, did you mean 'macs'? (allowed: sparsity, parameters, ma"
            "cs, bytes, uniform)",
        ),
        ({"target": {"macs": 0}}, "prune.target.macs = 0: should be greater than 0"),
        ({"target": {"sparsity": 1}}, "prune.target.sparsity = 1: should be less than 1"),
        ({"sparsity": 0.5, "round_to": 0}, "prune.round_to = 0: should be greater than or equal"),
    ],
)
def test_a_fault_of_a_target_is_one_line(prune: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_job(PRUNE | prune)
    assert str(caught.value).startswith(fault)
    assert "; prune." not in str(caught.value)


def test_a_sweep_varies_a_target_or_searches_a_sparsity() -> None:
    for name in ("macs", "sparsity"):
        job = make_job(dict(PRUNE), sweep={"space": {f"prune.target.{name}": [0.25, 0.5]}})
        assert [trial.prune.target.value for trial in expand(job)] == [0.25, 0.5]
    with pytest.raises(
        ConfigError, match=r"^sweep\.target: finds prune\.sparsity, which goes with"
    ):
        make_job(PRUNE | {"target": {"macs": 0.5}}, sweep={"target": {"max_drop": 0.01}})
