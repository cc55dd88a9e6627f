"""Sweeps from end to end on Ray: what comes back, what a failure and a kill leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gbp_ray.api import sweep
from gbp_ray.config import expand, load_job, trial_id
from gbp_ray.errors import WorkloadError
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.runtime.solo import finish_trial
from gbp_ray.runtime.worker import work_trial
from gbp_ray.store import Store
from gbp_ray.workload import add_import_paths

torch.set_num_threads(1)

WORKLOAD = '''
"""The digits, and what may go wrong with them."""
import os, signal
from pathlib import Path
from gbp_ray.zoo import digits_convnet


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


@pytest.mark.ray
def test_a_sweep_from_end_to_end(job_file: Path) -> None:
    flag = str(job_file.parent / "flag")
    space = {
        "prune.criterion": ["magnitude", "taylor"],
        "workload.options": [{}, {"fault": "raises"}, {"fault": "dies once", "flag": flag}],
        "prune.sparsity": [0.5, 0.9],
    }
    result = sweep(job_file, {"sweep.space": space}, is_quiet=True)
    assert Path(flag).exists(), "no process ever died"
    by_state = {state: result.by_state(state) for state in ("finished", "stopped", "failed")}
    assert [len(outcomes) for outcomes in by_state.values()] == [8, 0, 4]
    # In the order of the space, whatever ended first.
    assert [o.trial_id for o in result.outcomes] == [
        trial_id(job) for job in expand(load_job(job_file, {"sweep.space": space}))
    ]
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

    # What went wrong before is tried again, nothing else is.
    started = time.monotonic()
    again = sweep(job_file, {"sweep.space": space | {"workload.options": [{}]}}, is_quiet=True)
    assert time.monotonic() - started < 5
    assert again.num_new == 0
    assert {outcome.state for outcome in again.outcomes} == {"finished"}
    # What ails all of them is said once, and nothing starts.
    with pytest.raises(WorkloadError, match="out of luck"):
        sweep(job_file, {"sweep.space": {}, "workload.options": {"fault": "raises"}} | CRITERION)


SETTINGS = [
    "sweep.space.seed=[0, 1]",
    "sweep.space.prune.criterion=['taylor', 'magnitude']",
    "prune.sparsity=0.9",
    "pretrain.epochs=2",
]


def command(storage: Path) -> list[str]:
    settings = [f"--set={setting}" for setting in (*SETTINGS, f"storage={storage}")]
    return [sys.executable, "-m", "gbp_ray", "sweep", "job.toml", "--json", *settings]


@pytest.mark.ray
def test_a_sweep_killed_at_any_moment_ends_with_the_same_records(job_file: Path) -> None:
    # Each trial alone, without Ray and without anything shared.
    whole = str(job_file.parent / "whole")
    add_import_paths([str(job_file.parent)])
    for job in expand(load_job(job_file, [*SETTINGS, f"storage={whole}"])):
        work_trial(job, Ranks())
        finish_trial(job, Store(whole, job.name), 0.0)
    killed = job_file.parent / "killed"
    process = subprocess.Popen(
        command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(killed.glob("*/trials/*/trial.json")) and process.poll() is None:
        time.sleep(0.05)
    # The driver alone; what it started is to find out by itself.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(measured(killed)) < 4, "killed too early or too late to tell anything"
    again = subprocess.run(command(killed), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    assert told["num_finished"] == 4
    assert 0 < told["num_new"] < 4
    assert measured(killed) == measured(whole)
