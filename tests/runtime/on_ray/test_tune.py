"""Sweeps from end to end on Ray: what comes back, what a failure and a kill leave."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from shell import Shell
from small_sweeps import run_alone, start_sweep

from gbp_ray.config.job import expand, load_job, trial_id
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import WorkloadError
from gbp_ray.results.store import Store
from gbp_ray.runtime.api import sweep
from gbp_ray.runtime.trial import finish_trial, work_trial
from gbp_ray.workloads.code import add_import_paths

WORKLOAD = '''
"""The digits, and what may go wrong with them."""
import os, signal
from pathlib import Path
from gbp_ray.workloads import digits_convnet


def digits(fault="", flag=""):
    if fault == "raises":
        raise ZeroDivisionError("the data ran out of luck")
    if fault == "dies once" and not Path(flag).exists():
        if os.environ.get("GBP_RAY_TEST_DRIVER") != str(os.getpid()):
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return digits_convnet(width=4)
'''

JOB = """
name = "tiny"
workload.factory = "digits_of_a_test:digits"
pretrain.epochs = 0.3
prune.rounds = 2
prune.calibration_examples = 64
prune.batchnorm_examples = 64
finetune.epochs = 0.2
cluster.num_workers = 1
"""


CRITERION = {"prune.criterion": "taylor", "prune.sparsity": 0.5}


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "digits_of_a_test.py").write_text(WORKLOAD)
    (tmp_path / "job.toml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    # The next test's module is another one of this name.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "digits_of_a_test", raising=False)
    monkeypatch.setenv("GBP_RAY_TEST_DRIVER", str(os.getpid()))
    return tmp_path / "job.toml"


def measured(storage: Path | str) -> dict[str, list[tuple[Any, ...]]]:
    """Everything of the finished trials that does not tell the time."""
    store = Store(storage, "tiny")
    found = {}
    for name in store.objects.list_folders("trials/"):
        record = store.read_trial(name)
        if record is not None:
            found[name] = [
                (r.round, r.accuracy, r.loss, r.mask_digest, r.files["weights.safetensors"].sha256)
                for r in record.rounds
            ]
    return found


def test_what_ails_the_rest_of_a_sweep_does_not_refuse_it(
    job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_import_paths([str(job_file.parent)])
    run_alone(job_file, "gbp-results", **CRITERION)
    left = []

    def run_sweep(job: Any, feeder: Any, *arguments: Any, **options: Any) -> None:
        left.append(feeder.next().workload.options)

    monkeypatch.setattr("gbp_ray.runtime.on_ray.tune.run_sweep", run_sweep)
    raises = {"fault": "raises"}
    space = {"sweep.space": {"workload.options": [{}, raises]}} | CRITERION
    (outcome,) = sweep(job_file, space, is_quiet=True).outcomes
    assert outcome.state == "finished"
    assert left == [raises]


@pytest.mark.ray
def test_a_sweep_killed_and_run_again_ends_with_the_records_of_its_trials_alone(
    job_file: Path, shell: Shell
) -> None:
    flag = job_file.parent / "flag"
    sound, raises, dies_once = {}, {"fault": "raises"}, {"fault": "dies once", "flag": str(flag)}
    # What is sound comes first, so that a process dies in the sweep that nobody kills.
    space = {
        "workload.options": [sound, raises, dies_once],
        "prune.criterion": ["magnitude", "taylor"],
        "prune.sparsity": [0.5, 0.9],
    }
    job_file.write_text(JOB + tomli_w.dumps({"sweep": {"space": space}}))
    process = start_sweep(job_file, "gbp-results")
    while not measured("gbp-results") and process.poll() is None:
        time.sleep(0.05)
    # The driver alone; what it started is to find out by itself.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    num_before = len(measured("gbp-results"))
    assert 0 < num_before < 8, "killed too early or too late to tell anything"
    flag.unlink(missing_ok=True)

    result = sweep(job_file, is_quiet=True)
    assert flag.exists(), "no process ever died"
    by_state = {state: result.by_state(state) for state in ("finished", "stopped", "failed")}
    assert [len(outcomes) for outcomes in by_state.values()] == [8, 0, 4]
    assert 0 < result.num_new <= 12 - num_before
    # In the order of the space, whatever ended first.
    jobs = expand(load_job(job_file))
    assert [outcome.trial_id for outcome in result.outcomes] == [trial_id(job) for job in jobs]
    for outcome in by_state["failed"]:
        assert "ZeroDivisionError: the data ran out of luck" in outcome.cause
        record = Store("gbp-results", "tiny").read_failure(outcome.trial_id)
        assert record is not None
        assert record.cause == outcome.cause
    results = result.finished
    assert len(results) == 8 * 3
    assert {row["sparsity"] >= 0.49 for row in results.final().to_rows()} == {True}
    described = result.describe()
    assert json.loads(json.dumps(described)) == described
    assert [line["num_seeds"] for line in described["summary"]] == [1] * 8

    # Each trial alone, without Ray and without anything shared.
    whole = str(job_file.parent / "whole")
    for job in expand(load_job(job_file, {"storage": whole})):
        if job.workload.options != raises:
            work_trial(job, Ranks())
            finish_trial(job, Store(whole, job.name), 0.0)
    assert measured("gbp-results") == measured(whole)

    # What went wrong before is tried again, nothing else is.
    started = time.monotonic()
    again = shell.json("sweep", "job.toml", "--set=sweep.space.workload.options=[{}]")
    assert time.monotonic() - started < 5
    assert (again["num_new"], again["num_finished"]) == (0, 4)
    assert (again["num_stopped"], again["num_failed"]) == (0, 0)
    # What ails all of them is said once, and nothing starts.
    with pytest.raises(WorkloadError, match="out of luck"):
        sweep(job_file, {"sweep.space": {}, "workload.options": raises} | CRITERION)
