"""The space of a sweep: what an axis takes, what they span, and which trials come of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gbp_ray.config.job import JobConfig, expand, load_job, trial_id
from gbp_ray.config.sweep import SweepConfig, span
from gbp_ray.errors import ConfigError

BASE = {
    "name": "try",
    "workload": {"factory": "my_module:make", "options": {"width": 8}},
    "prune": {"criterion": "taylor", "sparsity": 0.5},
}


def job_with(space: dict[str, Any], **sweep: Any) -> JobConfig:
    return load_job(JobConfig.model_validate(BASE), {"sweep": {"space": space, **sweep}})


def values(axis: Any, key: str = "finetune.learning_rate", **sweep: Any) -> list[Any]:
    points = span(SweepConfig(space={key: axis}, **sweep), 7, lambda name: name == "prune.rounds")
    return [point[key] for point in points]


# -- axes ------------------------------------------------------------------------------------------


def test_ranges_include_their_ends_and_read_as_written() -> None:
    assert values({"linear": [0.5, 0.9], "num": 5}) == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert values({"log": [0.001, 10], "num": 5}) == [0.001, 0.01, 0.1, 1.0, 10.0]
    assert values({"log": [1, 16], "num": 5}, "prune.rounds") == [1, 2, 4, 8, 16]
    assert values({"linear": [1, 4], "num": 3}, "prune.rounds") == [1, 2, 4]
    assert all(isinstance(v, int) for v in values({"log": [1, 16], "num": 3}, "prune.rounds"))


@given(
    low=st.floats(1e-6, 1e3),
    factor=st.floats(1.001, 1e6),
    kind=st.sampled_from(["uniform", "loguniform", "linear", "log"]),
    num=st.integers(2, 40),
)
def test_values_of_a_range_stay_inside_it(low: float, factor: float, kind: str, num: int) -> None:
    high = low * factor
    drawn = kind.endswith("uniform")
    axis = {kind: [low, high]} if drawn else {kind: [low, high], "num": num}
    found = values(axis, num_samples=num)
    assert len(found) == num
    # Both are rounded, drawn ones to six digits.
    assert all(low * (1 - 1e-5) <= value <= high * (1 + 1e-5) for value in found)
    if not drawn:
        assert found == sorted(found)


@given(low=st.integers(1, 50), width=st.integers(1, 50), kind=st.sampled_from(["uniform", "log"]))
def test_whole_numbers_are_drawn_between_both_ends(low: int, width: int, kind: str) -> None:
    name = "loguniform" if kind == "log" else "uniform"
    found = values({name: [low, low + width]}, "prune.rounds", num_samples=300)
    assert set(found) <= set(range(low, low + width + 1))
    if width <= 3:
        assert set(found) == set(range(low, low + width + 1))


def test_draws_are_spread_over_the_range_as_asked() -> None:
    even = values({"uniform": [0.0, 1.0]}, num_samples=2000)
    assert sum(even) / 2000 == pytest.approx(0.5, abs=0.03)
    log = values({"loguniform": [1e-4, 1.0]}, num_samples=2000)
    # Half of them lie below the geometric mean.
    assert sum(value < 1e-2 for value in log) / 2000 == pytest.approx(0.5, abs=0.03)


def test_draws_depend_on_seed_name_and_number_alone() -> None:
    few = values({"uniform": [0.0, 1.0]}, num_samples=3)
    many = values({"uniform": [0.0, 1.0]}, num_samples=9)
    assert many[:3] == few
    both = span(
        SweepConfig(
            space={
                "prune.criterion": ["taylor", "snip"],
                "finetune.momentum": {"uniform": [0.0, 0.9]},
                "finetune.learning_rate": {"uniform": [0.0, 1.0]},
            },
            num_samples=3,
        ),
        7,
        lambda name: False,
    )
    assert [point["finetune.learning_rate"] for point in both] == few * 2
    assert values({"uniform": [0.0, 1.0]}, "finetune.momentum", num_samples=3) != few


def test_fields_can_vary_together() -> None:
    jobs = expand(job_with({"prune.rounds, finetune.epochs": [[1, 10], [5, 2]], "seed": [0, 1]}))
    found = [(job.prune.rounds, job.finetune.epochs, job.seed) for job in jobs]
    assert found == [(1, 10.0, 0), (1, 10.0, 1), (5, 2.0, 0), (5, 2.0, 1)]


def test_a_job_file_may_leave_out_the_quotes(tmp_path: Path) -> None:
    text = """
        name = "try"
        workload.factory = "my_module:make"
        [sweep.space]
        prune.criterion = ["taylor", "snip"]
        prune.sparsity = { linear = [0.5, 0.9], num = 3 }
        workload.options.width = [4, 8]
        """
    (tmp_path / "job.toml").write_text("\n".join(map(str.strip, text.splitlines())))
    job = load_job(tmp_path / "job.toml")
    # What varies is not asked for a second time.
    assert (job.prune.criterion, job.prune.sparsity) == ("taylor", 0.5)
    jobs = expand(job)
    assert len(jobs) == 12
    assert {job.workload.options["width"] for job in jobs} == {4, 8}


# -- trials ----------------------------------------------------------------------------------------


def test_trials_are_those_that_a_job_alone_would_be() -> None:
    space = {"prune.criterion": ["taylor", "fisher"], "prune.sparsity": [0.5, 0.9], "seed": [0, 1]}
    jobs = expand(job_with(space))
    expected = [
        trial_id(load_job(JobConfig.model_validate(BASE), dict(zip(space, point, strict=True))))
        for point in itertools.product(*space.values())
    ]
    assert [trial_id(job) for job in jobs] == expected
    assert all(job.sweep == SweepConfig() for job in jobs)


def test_an_empty_space_is_one_trial() -> None:
    (job,) = expand(job_with({}))
    assert trial_id(job) == trial_id(JobConfig.model_validate(BASE))


def test_equal_trials_are_one() -> None:
    jobs = expand(job_with({"prune.sparsity": [0.5, 0.9, 0.50], "seed": [0, 0]}))
    assert [job.prune.sparsity for job in jobs] == [0.5, 0.9]


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.sampled_from(["seed", "prune.rounds", "prune.calibration_examples"]),
        st.lists(st.integers(1, 99), min_size=1, max_size=4),
        min_size=1,
    )
)
def test_a_grid_has_every_combination_once(space: dict[str, list[int]]) -> None:
    jobs = expand(job_with(space))
    ids = {trial_id(job) for job in jobs}
    wanted = set(itertools.product(*(set(listed) for listed in space.values())))
    assert len(jobs) == len(ids) == len(wanted)


def test_a_sweep_does_not_change_what_a_trial_is_called() -> None:
    job = JobConfig.model_validate(BASE)
    assert trial_id(job_with({"seed": [1, 2]}, scheduler="asha")) == trial_id(job)


def test_a_target_spans_all_but_the_sparsity() -> None:
    job = job_with({"seed": [0, 1]}, target={"max_drop": 0.01, "highest": 0.95})
    assert [(one.seed, one.prune.sparsity) for one in expand(job)] == [(0, 0.95), (1, 0.95)]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "sweep", "expected"),
    [
        ({"prune.sparsity": []}, {}, "prune.sparsity: must list at least one value"),
        ({"prune.sparsity": 0.5}, {}, "must be a list, or a table with one of linear, log"),
        ({"prune.sparsity": {"linear": [0.5, 0.9]}}, {}, "linear needs num = 2 or more"),
        ({"prune.sparsity": {"linear": [0.9, 0.5], "num": 2}}, {}, "low must be below high"),
        ({"prune.sparsity": {"log": [0, 0.5], "num": 2}}, {}, "low must be above 0"),
        ({"prune.sparsity": {"uniform": [0, 0.5], "num": 2}}, {}, "'num' does not go with uniform"),
        ({"a.b, prune.rounds": [[1, 2], [3]]}, {}, "rows of 2 values"),
        ({"seed": [0], "seed, prune.rounds": [[1, 1]]}, {}, "seed: varies twice"),
        ({"cluster.num_workers": [0, 1]}, {}, "cluster.num_workers: does not change a result"),
        (
            {"prune.sparsity": [0.5]},
            {"target": {"max_drop": 0.01}},
            "the target finds the sparsity",
        ),
        ({}, {"target": {"max_drop": 0.01}, "scheduler": "asha"}, "scheduler = asha: would stop"),
        ({}, {"target": {"max_drop": 0.1, "lowest": 0.99}}, "highest = 0.99 is not tolerance"),
        ({}, {"search": "optuna"}, "space: is empty"),
    ],
)
def test_each_fault_of_a_space_is_one_line(
    space: dict[str, Any], sweep: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        job_with(space, **sweep)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_faults_of_trials_come_all_at_once_and_each_once() -> None:
    job = job_with({"prune.sparsity": [0.5, 1.5], "prune.rounds": [1, 0], "seed": [0, 1]})
    with pytest.raises(ConfigError) as caught:
        expand(job)
    message = str(caught.value)
    assert message.startswith("sweep.space: 6 of 8 trials are refused: ")
    assert message.count("prune.sparsity = 1.5") == message.count("prune.rounds = 0") == 1


def test_a_misspelt_field_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="no such key, did you mean 'sparsity'"):
        expand(job_with({"prune.sparsty": [0.5]}))


def test_a_space_too_large_to_be_meant_is_refused() -> None:
    axes = {"seed": list(range(1000)), "prune.rounds": list(range(1, 999))}
    with pytest.raises(ConfigError, match="makes 998,000 trials"):
        expand(job_with(axes))


def test_both_ends_of_a_search_are_checked() -> None:
    job = load_job(
        JobConfig.model_validate(BASE),
        {"prune.layer_max_sparsity": 0.6, "sweep.target.max_drop": 0.01},
    )
    with pytest.raises(ConfigError, match="layer_max_sparsity"):
        expand(job)
