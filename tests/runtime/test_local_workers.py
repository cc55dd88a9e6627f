"""Workers without Ray: the same bits, the same words when one ends, and no process left behind."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, session_of, start, stop_by
from quick_trials import QUICK, quick_job, results_of
from shell import Shell

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.config.job import trial_id
from gbp_ray.errors import ConfigError, GbpError, PruneError, TrialError, WorkloadError
from gbp_ray.runtime import local_workers
from gbp_ray.runtime.api import prune
from gbp_ray.runtime.failures import KILLED, Failure
from gbp_ray.runtime.placement import launches_locally
from gbp_ray.runtime.worker import Account

logger = logging.getLogger(__name__)

LOCAL = {"cluster.launcher": "local"}
HANG_TIMEOUT_S = 30
"""More than a slow machine needs to start with its first batch."""

WORKLOAD = '''
"""The digits workload; each group of workers meets another fate in a batch of its own."""
import os, signal, time
from dataclasses import replace
from pathlib import Path

import torch
from gbp_ray.workloads import digits_convnet


def _with(action):
    workload, calls = digits_convnet(width=8, augment=False), [0]

    def augment(inputs):
        if torch.distributed.is_initialized():
            calls[0] += 1
            action(calls[0], torch.distributed.get_rank())
        return inputs

    return replace(workload, augment=augment)


def unlucky(folder):
    groups = Path(folder, "groups")
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
        with groups.open("a") as file:
            file.write("x")

    def meet(call, rank):
        # In the first group after the dense network is whole, in the second while fine-tuning.
        group = len(groups.read_text())
        if rank == 1 and group == 1 and call == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and group == 2 and call == 2:
            time.sleep(600)

    return _with(meet)


def failing():
    def fail(call, rank):
        if call == 3 and rank == 1:
            raise ZeroDivisionError("the data ran out of luck")

    return _with(fail)


def dying():
    def die(call, rank):
        os.kill(os.getpid(), signal.SIGKILL)

    return _with(die)
'''


@pytest.fixture
def workloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "local_workload.py").write_text(WORKLOAD)
    monkeypatch.delitem(sys.modules, "local_workload", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(factory: str, **options: Any) -> dict[str, Any]:
    return {"workload.factory": f"local_workload:{factory}", "workload.options": options}


@pytest.mark.slow
def test_workers_reach_the_bits_of_one_process_though_one_is_killed_and_one_hangs(
    workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = of("unlucky", folder=str(workloads))
    alone = quick_job(workloads / "alone", **settings)
    prune(alone, is_quiet=True)
    capfd.readouterr()
    workers = {"cluster.num_workers": 2, "cluster.hang_timeout_s": HANG_TIMEOUT_S}
    job = quick_job(workloads / "together", **settings, **workers, **LOCAL)
    prune(job)
    told = capfd.readouterr().err
    assert "starting 2 workers on this machine" in told
    assert len((workloads / "groups").read_text()) == 3
    for pattern in (
        rf"worker 1 {re.escape(KILLED)} in \w+ of round \d; starting the workers again \(1 of "
        r"cluster.max_failures = 2\)",
        r"worker 1 made no progress for \d\d s after .* at local_workload.py:\d+ in meet; starting "
        r"the workers again \(2 of cluster.max_failures = 2\)",
    ):
        assert re.search(pattern, told), told
    assert results_of(job) == results_of(alone)
    assert trial_id(job) == trial_id(alone)


@pytest.mark.slow
def test_what_a_worker_raises_arrives_as_one_line(
    workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(kind: type[GbpError], **changed: Any) -> str:
        with pytest.raises(kind) as caught:
            prune(quick_job(workloads / kind.__name__, **changed, **LOCAL))
        told = capfd.readouterr().err
        assert "starting the workers again" not in told
        assert "\n" not in str(caught.value)
        return str(caught.value)

    failing = of("failing")
    text = fail(WorkloadError, **failing, **{"cluster.num_workers": 2})
    assert "ZeroDivisionError: the data ran out of luck" in text
    text = fail(PruneError, **{"cluster.num_workers": 1, "pretrain.learning_rate": 1e30})
    assert text.startswith("pretrain: ")
    text = fail(TrialError, **of("dying"), **{"cluster.num_workers": 1, "cluster.max_failures": 0})
    assert f"worker 0 {KILLED}" in text
    assert text.endswith(
        "; cluster.max_failures = 0 allows no more restarts; run the job again to go on after its "
        "last whole round"
    )


def words(storage: Path, **changed: Any) -> list[str]:
    settings = QUICK | {"storage": storage, "pretrain.epochs": 2, "finetune.epochs": 3} | changed
    return ["prune", *(f"--set={key}={value}" for key, value in settings.items())]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_no_process_outlives_its_command_and_the_job_goes_on(shell: Shell, tmp_path: Path) -> None:
    together = {"cluster.num_workers": 2, **LOCAL}
    process = start(tmp_path, *words(tmp_path, **together))
    assert process.stderr is not None
    for line in process.stderr:
        if "dense  " in line:
            break
    assert len(session_of(process.pid)) == 3
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    deadline_s = time.monotonic() + PATIENCE_S
    while session_of(process.pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert session_of(process.pid) == set()
    process = start(tmp_path, *words(tmp_path, **together))
    assert process.stderr is not None
    for line in process.stderr:
        if "goes on after round 0" in line:
            break
    for line in process.stderr:
        if " finetune " in line:
            break
    stop_by(process, signal.SIGINT, tmp_path)
    # Any number of workers may go on.
    again = shell(*words(tmp_path), "--json")
    assert "goes on after round" in again.err
    whole = shell(*words(tmp_path / "whole"), "--json")
    assert [r["mask_digest"] for r in json.loads(again.out)["rounds"]] == [
        r["mask_digest"] for r in json.loads(whole.out)["rounds"]
    ]


# -- the driver, and processes that only speak to it -----------------------------------------------

SPEAK = """
import os, signal, subprocess, sys
from multiprocessing.connection import Connection
driver = Connection(int(sys.argv[1]))
driver.recv_bytes()
driver.send(None)
{act}
"""


class ToldAllError(Exception):
    pass


class Told(Account):
    def __init__(self, enough: int | None) -> None:
        self.messages: list[Any] = []
        self.enough = enough

    def show(self, message: Any) -> None:
        self.messages.append(message)
        if len(self.messages) == self.enough:
            raise ToldAllError


def attend(
    monkeypatch: pytest.MonkeyPatch,
    act: str,
    *,
    hang_timeout_s: float = 60.0,
    enough: int | None = None,
) -> tuple[Any, list[Any], list[subprocess.Popen[bytes]]]:
    """Starts two workers that act so; returns how it ended, what was told, and the processes.

    It ends with as many messages as are enough, if not before.
    """
    monkeypatch.setattr(local_workers, "_PROGRAM", SPEAK.replace("{act}", act))
    job = quick_job(
        "unused", **{"cluster.num_workers": 2, "cluster.hang_timeout_s": hang_timeout_s}
    )
    account, end = Told(enough), None
    with local_workers._start_group(job, is_debug=False) as group:
        processes = group._processes
        with suppress(ToldAllError):
            end = group.attend(account)
    assert all(process.poll() is not None for process in processes)
    return end, account.messages, processes


@pytest.mark.parametrize(
    ("death", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", KILLED),
        ("os._exit(3)", "ended with exit code 3 before it could tell why; see --debug"),
    ],
)
def test_a_process_that_dies_is_told_at_once_also_where_its_child_lives_on(
    monkeypatch: pytest.MonkeyPatch, death: str, words: str
) -> None:
    act = f"""
child = subprocess.Popen(["sleep", "20"], pass_fds=[driver.fileno()])
driver.send(child.pid)
{death}
"""
    started_s = time.monotonic()
    end, told, _ = attend(monkeypatch, act)
    assert isinstance(end, Failure)
    assert end.words == words
    assert time.monotonic() - started_s < 30
    # What has lost its parent is not found; it is no worker's.
    for pid in told:
        os.kill(pid, signal.SIGKILL)


def test_a_process_that_is_stopped_is_told_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    end, _, processes = attend(
        monkeypatch, "os.kill(os.getpid(), signal.SIGSTOP)", hang_timeout_s=1.0
    )
    assert isinstance(end, Failure)
    assert re.fullmatch(r"did not answer for \d s \(its process was stopped, or .*", end.words)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_signals_end_what_a_worker_has_started_and_not_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    act = """
import multiprocessing
from gbp_ray.runtime.local_workers import _pass_over_signals
_pass_over_signals()
for _ in range(4):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(abs, range(50))
os.kill(os.getpid(), signal.SIGTERM)
driver.send("alive")
os.kill(os.getpid(), signal.SIGSTOP)
"""
    end, told, _ = attend(monkeypatch, act, enough=2)
    assert end is None
    assert told == ["alive"] * 2


def test_what_a_worker_has_started_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    act = """
child = subprocess.Popen(["sleep", "600"])
driver.send(child.pid)
os.kill(os.getpid(), signal.SIGSTOP)
"""
    _, told, _ = attend(monkeypatch, act, hang_timeout_s=1.0)
    assert len(told) == 2
    for pid in told:
        status = Path(f"/proc/{pid}/stat")
        # One that has no parent left may still be listed.
        assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


# -- the choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "is_local"),
    [
        ({"num_workers": 2}, True),
        ({"launcher": "ray"}, False),
        ({"launcher": "local", "use_gpu": True}, True),
        ({"num_workers": [1, 2]}, False),
        ({"address": "auto"}, False),
        ({"autoscale": True}, False),
        ({"autoscale": False}, True),
        ({"use_gpu": True, "accelerator_type": "L4"}, False),
        ({"use_gpu": True, "gpus_per_worker": 0.5}, False),
        ({"use_gpu": True}, True),
    ],
)
def test_ray_starts_workers_only_where_it_is_asked_for(
    settings: dict[str, Any], is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert launches_locally(ClusterConfig(**settings)) == is_local


def test_ray_starts_workers_where_a_cluster_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ray:
        @staticmethod
        def is_initialized() -> bool:
            return True

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", Ray)  # type: ignore[arg-type]
    assert not launches_locally(ClusterConfig())
    monkeypatch.setitem(sys.modules, "ray", None)
    assert launches_locally(ClusterConfig())
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert not launches_locally(ClusterConfig())
    assert launches_locally(ClusterConfig(launcher="local"))


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    job = quick_job("unused", **{"cluster.use_gpu": True, "cluster.num_workers": 2}, **LOCAL)
    with pytest.raises(ConfigError, match=r"cluster\.num_workers = 2: each needs a CUDA device"):
        local_workers.run_local_trial(job, None)  # type: ignore[arg-type]
