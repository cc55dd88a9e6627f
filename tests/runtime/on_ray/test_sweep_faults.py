"""Sweeps on Ray where things go wrong: a bad network, drivers and Ray killed, two drivers at once.

Each takes from half a minute to several. GBP_RAY_SWEEPS tries them, and says how many times a sweep
is killed; GBP_RAY_KILL_SEED picks other moments.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy
from index_rows import untimed_rows
from small_sweeps import find_children, name_of, run_alone, start_sweep, write_job
from watchful_reader import WatchfulReader

from gbp_ray.config.job import expand, load_job, trial_id
from gbp_ray.results.maintenance import find_faults
from gbp_ray.results.query import open_results
from gbp_ray.results.store import Store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(
        "GBP_RAY_SWEEPS" not in os.environ,
        reason="takes many minutes; set GBP_RAY_SWEEPS to a number of kills to try it",
    ),
]

logger = logging.getLogger(__name__)

NUM_KILLS = int(os.environ.get("GBP_RAY_SWEEPS", "0"))


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def alone(job_file: Path) -> list[dict[str, Any]]:
    """The index of the same trials, run one by one on a folder without Ray."""
    storage = str(job_file.parent / "alone")
    assert len(run_alone(job_file, storage)) == 12
    return untimed_rows(storage)


def endpoint_of(storage: str) -> str:
    return storage.partition("endpoint_override=")[2].partition("&")[0]


def end_sweep(process: subprocess.Popen[str], timeout_s: float = 600) -> dict[str, Any]:
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


# -- storages --------------------------------------------------------------------------------------


def check_a_sweep_into_s3(job_file: Path, alone: list[dict[str, Any]], s3_storage: str) -> None:
    """It has the index of a folder."""
    told = end_sweep(start_sweep(job_file, s3_storage))
    assert (told["num_finished"], told["num_new"]) == (12, 12)
    assert untimed_rows(s3_storage) == alone
    assert find_faults(s3_storage).faults == []
    again = end_sweep(start_sweep(job_file, s3_storage))
    assert (again["num_finished"], again["num_new"]) == (12, 0)


def check_a_bad_network(job_file: Path, alone: list[dict[str, Any]], s3_storage: str) -> None:
    with FaultyProxy(endpoint_of(s3_storage), 0.2, 5) as proxy:
        place = s3_storage.partition("?")[0]
        there = f"{place}?endpoint_override={proxy.endpoint}&scheme=http"
        with WatchfulReader(s3_storage, "tiny") as reader:
            told = end_sweep(start_sweep(job_file, there))
    logger.info("%d looks, %d rounds; requests: %s", reader.num_looks, reader.num_seen, proxy.seen)
    assert (told["num_finished"], told["num_failed"]) == (12, 0)
    assert not reader.failures
    assert reader.num_looks > 20
    assert reader.num_seen > 0
    assert 0.17 < 1 - proxy.seen[""] / proxy.seen.total() < 0.23
    assert find_faults(s3_storage).faults == []
    assert untimed_rows(s3_storage) == alone


def test_sweeps_into_s3_and_through_a_bad_network_have_the_index_of_a_folder(
    job_file: Path, alone: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    kinds = ["moto", "real"] if "GBP_RAY_S3_ENDPOINT" in os.environ else ["moto"]
    for kind in kinds:
        path, _, query = request.getfixturevalue(f"{kind}_storage").partition("?")
        check_a_sweep_into_s3(job_file, alone, f"{path}/good?{query}")
        check_a_bad_network(job_file, alone, f"{path}/bad?{query}")


# -- ends ------------------------------------------------------------------------------------------


VICTIMS = {
    "driver": (),
    "raylet": ("raylet",),
    "GCS": ("gcs_server",),
    # Idle and at work.
    "trial": ("ray::_TuneTrial", "ray::ResourceTrainable"),
}


def kill(process: subprocess.Popen[str], victim: str) -> dict[int, str]:
    """Kills the driver or one of the processes that it has started; gives all of these."""
    children = find_children(process.pid)
    chosen = [pid for pid, name in children.items() if name.startswith(VICTIMS[victim])]
    # What has not started yet cannot be killed.
    os.kill(chosen[0] if chosen else process.pid, signal.SIGKILL)
    return children


def test_a_sweep_killed_over_and_over_ends_with_the_same_records(
    job_file: Path, alone: list[dict[str, Any]], tmp_path: Path, moto_storage: str
) -> None:
    for place in (str(tmp_path), moto_storage):
        check_kills(job_file, alone, place)


def check_kills(job_file: Path, alone: list[dict[str, Any]], place: str) -> None:
    draws = random.Random(os.environ.get("GBP_RAY_KILL_SEED", "4"))
    num_kills = num_sweeps = 0
    storage = ""
    while num_kills < NUM_KILLS:
        if not storage:
            num_sweeps += 1
            path, _, query = place.partition("?")
            storage = f"{path}/{num_sweeps}" + (f"?{query}" if query else "")
        process = start_sweep(job_file, storage)
        victim = list(VICTIMS)[num_kills % len(VICTIMS)]
        # By trials rather than by the clock, which other work on the machine slows down.
        num_before, num_more = num_done(storage), draws.choice([0, 0, 1, 2, 3])
        while num_done(storage) < num_before + num_more and process.poll() is None:
            time.sleep(0.1)
        try:
            _, err = process.communicate(timeout=draws.uniform(0, 5 if num_more else 20))
        except subprocess.TimeoutExpired:
            children = kill(process, victim)
            began = time.monotonic()
            _, err = process.communicate(timeout=600)
            num_kills += 1
            await_ends(children)
            logger.info(
                "%s killed with %d trials done: ended with %d after %.1f s, %d done; %s",
                victim,
                num_before + num_more,
                process.returncode,
                time.monotonic() - began,
                num_done(storage),
                err.strip().splitlines()[-1:],
            )
            assert "Traceback" not in err
            assert process.returncode in (0, 1, -signal.SIGKILL)
        if process.returncode == 0:
            assert untimed_rows(storage) == alone
            assert find_faults(storage).faults == []
            storage = ""
    if storage:
        end_sweep(start_sweep(job_file, storage))
        assert untimed_rows(storage) == alone
        assert find_faults(storage).faults == []


def await_ends(processes: dict[int, str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while left := {pid: name for pid, name in processes.items() if name_of(pid)}:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)


def num_done(storage: str) -> int:
    store = Store(storage, "tiny")
    if store.read_claim() is None:
        return 0
    names = store.objects.list_folders("trials/")
    return sum(store.read_trial(name) is not None for name in names)


# -- company ---------------------------------------------------------------------------------------


def test_two_drivers_of_one_sweep_share_the_work(
    job_file: Path, alone: list[dict[str, Any]], tmp_path: Path, moto_storage: str
) -> None:
    for storage in (str(tmp_path), moto_storage):
        check_two_drivers(job_file, alone, storage)


def check_two_drivers(job_file: Path, alone: list[dict[str, Any]], storage: str) -> None:
    with WatchfulReader(storage, "tiny", pause_s=0.0) as reader:
        drivers = [start_sweep(job_file, storage) for _ in range(2)]
        told = [end_sweep(driver) for driver in drivers]
    assert not reader.failures
    assert [one["num_finished"] for one in told] == [12, 12]
    logger.info("new: %s", [one["num_new"] for one in told])
    # Nobody's work was done by the other as well.
    assert sum(one["num_new"] for one in told) == 12
    assert all(one["num_new"] for one in told)
    assert untimed_rows(storage) == alone


# -- schedulers ------------------------------------------------------------------------------------

SPREAD = {
    "sweep.space": {
        "prune.criterion": ["taylor", "random"],
        "seed": [0, 1, 2, 3],
    },
    "prune.rounds": 4,
    "prune.sparsity": 0.97,
}


def test_schedulers_stop_the_weak_and_loggers_are_told(job_file: Path, tmp_path: Path) -> None:
    for scheduler, num_workers in (("asha", 1), ("median", 1), ("asha", 2)):
        folder = tmp_path / f"{scheduler}-{num_workers}"
        folder.mkdir()
        check_scheduler(job_file, folder, scheduler, num_workers)
    if find_spec("mlflow") and find_spec("wandb"):
        check_loggers(job_file, tmp_path)


def check_scheduler(job_file: Path, tmp_path: Path, scheduler: str, num_workers: int) -> None:
    """The weak are stopped, and the others end as ever."""
    settings = SPREAD | {
        "sweep.scheduler": scheduler,
        "sweep.reduction_factor": 2,
        "cluster.num_workers": num_workers,
    }
    storage = str(tmp_path)
    told = end_sweep(start_sweep(job_file, storage, settings))
    logger.info("%s", told)
    jobs = {trial_id(job): job for job in expand(load_job(job_file, SPREAD))}
    stopped = {one["trial_id"]: one for one in told["stopped"]}
    assert told["num_finished"] + told["num_stopped"] == 8
    assert stopped
    # With so much gone no draw of luck keeps up with a criterion.
    assert {jobs[name].prune.criterion for name in stopped} == {"random"}
    store = Store(storage, "tiny")
    for name, one in stopped.items():
        record = store.read_stop(name)
        assert record is not None
        assert (record.round, record.scheduler) == (one["round"], scheduler)
        assert 1 <= record.round < 4
        assert len(store.read_rounds(name)) == record.round + 1
        assert store.read_trial(name) is None
    again = end_sweep(start_sweep(job_file, storage, settings))
    assert (again["num_new"], again["num_stopped"]) == (0, len(stopped))
    # What was stopped goes on where it was, once nobody stops it.
    last = end_sweep(start_sweep(job_file, storage, settings | {"sweep.scheduler": "fifo"}))
    assert (last["num_finished"], last["num_new"]) == (8, len(stopped))
    run_alone(job_file, str(tmp_path / "alone"), **SPREAD)
    mine, theirs = (
        {(r["trial_id"], r["round"]): r["weights_sha256"] for r in untimed_rows(place)}
        for place in (f"{storage}/tiny", str(tmp_path / "alone"))
    )
    assert mine == theirs


# -- who else is told ------------------------------------------------------------------------------


def check_loggers(job_file: Path, tmp_path: Path) -> None:
    storage = str(tmp_path / "results")
    settings = {
        "sweep.loggers": ["tensorboard", "mlflow", "wandb"],
        "sweep.space": {"seed": [0, 1]},
    }
    environment = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
    }
    told = end_sweep(start_sweep(job_file, storage, settings, environment))
    assert told["num_finished"] == 2
    names = sorted(told["finished"])
    store = Store(storage, "tiny")
    assert store.objects.list_folders("tune/") == names
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2
    import mlflow

    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    runs = mlflow.MlflowClient().search_runs(
        [mlflow.MlflowClient().get_experiment_by_name("tiny").experiment_id]
    )
    best = max(row["accuracy"] for row in open_results(storage).final().to_rows())
    assert len(runs) == 2
    assert max(run.data.metrics["accuracy"] for run in runs) == pytest.approx(best)
