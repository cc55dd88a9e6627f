"""Curves and fronts: against oracles that are slow and plain."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_sweep import CRITERIA, SPARSITIES, sweep_job, write_sweep, write_sweep_trial

from gbp_ray.config.sweep import SweepConfig
from gbp_ray.report.captions import sketch_workload
from gbp_ray.report.checklist import Check, answer_checklist
from gbp_ray.report.curves import WorkloadCurves, find_front, gather_curves
from gbp_ray.report.page import _find_within_a_point
from gbp_ray.report.spreads import Spread
from gbp_ray.results.query import open_results
from gbp_ray.results.store import Store
from gbp_ray.runtime.search import TrialHistory

numbers = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=30))
def test_the_front_is_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    def is_beaten(one: tuple[float, float]) -> bool:
        return any(o[0] >= one[0] and o[1] >= one[1] and o != one for o in pairs)

    front = find_front(pairs)
    assert sorted(front) == [i for i, pair in enumerate(pairs) if not is_beaten(pair)]
    assert [pairs[i][0] for i in front] == sorted(pairs[i][0] for i in front)


@given(st.lists(st.none() | st.floats(-1e6, 1e6) | st.just(math.nan), max_size=9))
def test_a_spread_is_mean_and_sample_deviation(values: list[float | None]) -> None:
    known = [v for v in values if v is not None]
    spread = Spread.of(values)
    if not known:
        assert spread is None
        return
    assert spread is not None
    assert spread.num == len(known)
    if any(map(math.isnan, known)):
        # Left out, it would make the others look like all there are.
        assert math.isnan(spread.mean)
        assert spread.deviation is None
        return
    assert spread.mean == pytest.approx(sum(known) / len(known), abs=1e-6)
    if len(known) == 1:
        assert spread.deviation is None
    else:
        mean = sum(known) / len(known)
        expected = math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1))
        assert spread.deviation == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Store:
    small = {"a.weight": (32, 8), "b.weight": (8, 16), "c.weight": (4, 8)}
    return write_sweep(tmp_path_factory.mktemp("sweep"), shapes=small)


@pytest.fixture
def curves(sweep: Store) -> WorkloadCurves:
    (found,) = gather_curves(open_results(sweep.uri))
    return found


def test_points_are_those_of_the_records(sweep: Store, curves: WorkloadCurves) -> None:
    records = [sweep.read_trial(name) for name in sweep.objects.list_folders("trials/")]
    assert {curve.label for curve in curves.curves} == set(CRITERIA)
    for curve in curves.curves:
        assert [point.target for point in curve.points] == list(SPARSITIES)
        for point in curve.points:
            own = [
                r
                for r in records
                if r
                and (r.job.prune.criterion, r.job.prune.sparsity) == (curve.label, point.target)
            ]
            assert point.seeds == (0, 1, 2)
            accuracies = [r.final.accuracy for r in own]
            assert point.score.mean == pytest.approx(statistics.fmean(accuracies))
            assert point.score.deviation == pytest.approx(statistics.stdev(accuracies))
            drops = [r.final.accuracy - r.dense.accuracy for r in own]
            assert point.drop.mean == pytest.approx(statistics.fmean(drops))
            assert point.drop.deviation == pytest.approx(statistics.stdev(drops))
            ratios = [r.final.cost.macs / r.final.cost.macs_nonzero for r in own]
            assert point.speedup.mean == pytest.approx(statistics.fmean(ratios))
            compressions = [r.final.cost.compression for r in own]
            assert point.compression.mean == pytest.approx(statistics.fmean(compressions))
            spent = [sum(sum(item.seconds.values()) for item in r.rounds) for r in own]
            assert point.worker_seconds.mean == pytest.approx(statistics.fmean(spent))
            assert sum(point.phases.values()) == pytest.approx(statistics.fmean(spent))


def test_points_are_compared_with_the_better_measurement_of_the_dense_network(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path, "stale")
    for seed, anew in enumerate((0.6, 0.7, 0.05)):
        dense = {"score": 0.1, "loss": 3.0, "score_recalibrated": anew}
        write_sweep_trial(
            store,
            sweep_job("stale", seed=seed, rounds=1),
            dense={**dense, "loss_recalibrated": 1.0},
            final={"score": 0.4},
        )
    (found,) = gather_curves(open_results(store.uri))
    ((point,),) = (curve.points for curve in found.curves)
    assert found.dense.mean == pytest.approx((0.6 + 0.7 + 0.1) / 3)
    assert {way: spread.mean for way, spread in found.dense_ways.items()} == {
        "as stored": pytest.approx(0.1),
        "with BatchNorm re-estimated": pytest.approx(0.45),
    }
    assert point.drop.mean == pytest.approx((-0.2 - 0.3 + 0.3) / 3)
    outcome = TrialHistory(store, SweepConfig())(sweep_job("stale", seed=0, rounds=1))
    assert outcome is not None
    assert (outcome.dense_accuracy, outcome.dense_is_recalibrated) == (0.6, True)


def test_seconds_count_once_per_worker(tmp_path: Path) -> None:
    store = Store(tmp_path, "sweep")
    for workers in (0, 1, 3):
        job = sweep_job(seed=workers).model_copy(
            update={"cluster": sweep_job().cluster.model_copy(update={"num_workers": workers})}
        )
        write_sweep_trial(store, job)
    (found,) = gather_curves(open_results(store.uri))
    (curve,) = found.curves
    for trial, factor in zip(curve.points[0].trials, (1, 1, 3), strict=True):
        record = store.read_trial(trial.trial_id)
        assert record is not None
        seconds = sum(sum(item.seconds.values()) for item in record.rounds)
        assert sum(trial.worker_seconds.values()) == pytest.approx(factor * seconds)


def test_a_trial_of_two_jobs_is_one_seed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_sweep(Store(tmp_path, name), criteria=("taylor",), sparsities=(0.9,), seeds=(0, 1))
    (found,) = gather_curves(open_results(tmp_path))
    assert len(found.trials) == 2
    assert found.num_repeats == 2
    assert found.curves[0].points[0].score.num == 2


def test_curves_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    store = Store(tmp_path, "sweep")
    for rounds in (1, 2):
        write_sweep(store, criteria=("taylor",), sparsities=(0.5,), seeds=(0,), rounds=rounds)
    options = {"factory": "gbp_ray.zoo:digits_convnet", "options": {"width": 8}}
    write_sweep(store, criteria=("taylor",), sparsities=(0.5,), seeds=(0,), workload=options)
    found = gather_curves(open_results(store.uri))
    assert {len(one.curves): [c.label for c in one.curves] for one in found} == {
        1: ["taylor"],
        2: ["rounds 1", "rounds 2"],
    }
    assert any("width 8" in one.title for one in found)


def test_names_say_what_there_is_and_no_two_are_the_same(tmp_path: Path) -> None:
    small = {"a.weight": (8, 8), "b.weight": (8,)}
    for kind in ("a", "b"):
        store = Store(tmp_path, kind)
        options = {"kind": kind, f"only_{kind}": 3}
        for rate in (0.01, 0.01 + 1e-9):
            job = sweep_job(
                kind,
                workload={"factory": "module:make", "options": options},
                finetune={"epochs": 2, "learning_rate": rate},
                rounds=1,
            )
            write_sweep_trial(store, job, shapes=small)
    found = gather_curves(open_results(tmp_path))
    assert [w.title for w in found] == [
        "module:make, kind a, only_a 3",
        "module:make, kind b, only_b 3",
    ]
    for workload in found:
        labels = [curve.label for curve in workload.curves]
        assert labels == ["learning_rate 0.01", "learning_rate 0.01 (2)"]
        # One curve's point is nothing to look at beside no other, two are.
        names = [sketch.name for sketch in sketch_workload(workload, [])]
        assert names[:2] == ["accuracy", "tradeoffs"]
    single = open_results(tmp_path / "a").where("finetune.learning_rate=0.01")
    (alone,) = gather_curves(single)
    assert [s.name for s in sketch_workload(alone, [])] == ["rounds", "cost"]


def test_of_equally_sparse_points_the_most_accurate_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, "ties")
    measured = {"fisher": (0.985, 0.1), "taylor": (0.99, 0.3), "snip": (0.99, 0.2)}
    for criterion, (accuracy, loss) in measured.items():
        write_sweep_trial(
            store,
            sweep_job("ties", criterion=criterion, rounds=1),
            shapes={"a.weight": (8, 8)},
            dense={"score": 0.99},
            final={"score": accuracy, "loss": loss},
        )
    (found,) = gather_curves(open_results(store.uri))
    close = _find_within_a_point(found)
    assert close is not None
    assert close[0].label == "snip"


def test_rounds_on_the_way_stand_apart(curves: WorkloadCurves) -> None:
    for curve in curves.curves:
        assert [point.round for point in curve.on_the_way] == [1, 2, 3]
        assert {point.target for point in curve.on_the_way} == {max(SPARSITIES)}
        assert not curve.has_own_schedules
    on_front = [point for _, point in curves.front]
    assert all(point.round is None for point in on_front)


def check_of(curves: WorkloadCurves, part: str, **known: int) -> Check:
    counts = {"num_workloads": 1, "num_unfinished": 0} | known
    checks = answer_checklist(curves, versions=["torch 2"], **counts)  # type: ignore[arg-type]
    (found,) = [check for check in checks if part in check.question]
    return found


def test_the_checklist_follows_what_was_run(curves: WorkloadCurves, tmp_path: Path) -> None:
    assert check_of(curves, "Baselines").state == "partly"
    assert check_of(curves, "same dense").state == "yes"
    assert check_of(curves, "seeds or more").state == "yes"
    assert check_of(curves, "sparsities").state == "yes"
    assert check_of(curves, "Nothing is missing").state == "yes"
    missing = check_of(curves, "Nothing is missing", num_unfinished=2)
    assert (missing.state, "2 trials" in missing.answer) == ("partly", True)
    assert check_of(curves, "pairs of data", num_workloads=3).state == "yes"

    store = write_sweep(tmp_path, criteria=("taylor", "fisher"), sparsities=(0.5,), seeds=(0,))
    write_sweep(store, criteria=("taylor",), sparsities=(0.8,), seeds=(0, 1))
    (poor,) = gather_curves(open_results(store.uri))
    baselines = check_of(poor, "Baselines")
    assert (baselines.state, "Missing: random, magnitude" in baselines.answer) == ("no", True)
    assert check_of(poor, "seeds or more").state == "partly"
    assert check_of(poor, "larger than the spread").state == "no"
    # Of 2 curves x 2 sparsities x 2 seeds, these are not there.
    grid = check_of(poor, "Nothing is missing")
    assert grid.answer.startswith("4 of 8 combinations")
    assert "fisher at 0.8, seed 1" in grid.answer
