"""Jobs on machines that share nothing but the store, and what is left when one of them is lost."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from machines_of_its_own import NET, Machines, can_make_machines
from moto.server import ThreadedMotoServer

from gbp_ray.config.job import expand, load_job, trial_id
from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.results.store import Store
from gbp_ray.runtime.api import prune, sweep

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(
        "GBP_RAY_KILLS" not in os.environ,
        reason="takes minutes; set GBP_RAY_KILLS to try it",
    ),
]

QUICK = {
    "pretrain.epochs": 0.5,
    "finetune.epochs": 0.5,
    "prune.rounds": 2,
    "prune.calibration_examples": 128,
    "prune.calibration_batch_size": 16,
    "prune.batchnorm_examples": 64,
}
DOOMED_WORKLOAD = '''
"""The digits; where a file says so, a worker halts, tells its address, and is lost."""
import socket, time
from dataclasses import replace
from pathlib import Path

import torch
from gbp_ray.workloads import digits_convnet


def doomed(folder):
    workload = digits_convnet(width=8, augment=False)
    built, calls = [], {"score": 0, "train": 0}

    def build():
        built.append(workload.build_model())
        return built[-1]

    def loss(outputs, targets):
        if torch.is_grad_enabled():
            phase = "train" if built[-1].training else "score"
            calls[phase] += 1
            halt(phase)
        return workload.loss(outputs, targets)

    def halt(phase):
        place = Path(folder, phase)
        # The second time round, and the second worker where there are two.
        is_last = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 1
        if calls[phase] == 2 and is_last and place.exists() and is_first(place):
            place.write_text(own_address())
            time.sleep(600)

    def is_first(place):
        try:
            place.with_suffix(".taken").open("x").close()
        except FileExistsError:
            return False
        return True

    return replace(workload, build_model=build, loss=loss)


def own_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("@NET@.1", 9))
        return probe.getsockname()[0]
'''.replace("@NET@", NET)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A head without room."""
    if not can_make_machines():
        pytest.skip("needs the right to make namespaces")
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
    cluster = Machines({})
    for name, value in cluster.environment.items():
        patch.setenv(name, value)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        patch.undo()


@pytest.fixture(scope="module")
def bucket(machines: Machines) -> Iterator[str]:
    """A bucket that every machine reaches."""
    server = ThreadedMotoServer(ip_address=f"{NET}.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="gbp")
    yield f"s3://gbp/results?endpoint_override={host}:{port}&scheme=http"
    server.stop()


@pytest.fixture
def settings(
    machines: Machines, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    (tmp_path / "doomed_workload.py").write_text(DOOMED_WORKLOAD)
    monkeypatch.chdir(tmp_path)
    # The next test's module is another one of this name.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "doomed_workload", raising=False)
    return QUICK | {
        "storage": bucket,
        "workload.factory": "doomed_workload:doomed",
        "workload.options": {"folder": str(tmp_path)},
    }


def when_told(place: Path, then: Callable[[str], None]) -> None:
    """Waits in a thread until a worker has halted, and does something to its machine."""
    place.touch()

    def wait() -> None:
        deadline = time.monotonic() + 300
        while not (ip := place.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if ip:
            then(ip)

    threading.Thread(target=wait, daemon=True).start()


def digests(job: Any) -> list[tuple[Any, ...]]:
    store = Store(job.storage, job.name)
    record = store.read_trial(trial_id(job))
    assert record is not None
    return [
        (r.round, r.accuracy, r.mask_digest, r.files["weights.safetensors"].sha256)
        for r in record.rounds
    ]


def check_a_trial_outlives_two_losses(
    machines: Machines, settings: dict[str, Any], tmp_path: Path
) -> None:
    alone = load_job(None, settings | {"name": "alone", "cluster.num_workers": 0})
    prune(alone, is_quiet=True)
    for _ in range(3):
        machines.add()

    def lose_and_replace(ip: str) -> None:
        machines.lose(ip)
        machines.add()

    lost = tmp_path / "score", tmp_path / "train"
    job = load_job(
        None,
        settings
        | {
            "name": "lost",
            "cluster.num_workers": 2,
            "cluster.placement": "spread",
            "cluster.max_failures": 3,
            "cluster.address": machines.address,
        },
    )

    def then_the_other(ip: str) -> None:
        machines.lose(ip)
        when_told(lost[1], lose_and_replace)

    when_told(lost[0], then_the_other)
    prune(job, is_quiet=True)
    told = [place.read_text() for place in lost]
    assert all(told), "a machine was never lost"
    assert told[0] != told[1]
    assert digests(job) == digests(alone)


def check_a_sweep_outlives_a_loss(
    machines: Machines, settings: dict[str, Any], tmp_path: Path
) -> None:
    # Without training before, the first step is one of fine-tuning.
    space = {"sweep.space": {"prune.sparsity": [0.5, 0.8], "seed": [0, 1]}, "pretrain.epochs": 0}
    alone = expand(
        load_job(None, settings | space | {"name": "alone-swept", "cluster.num_workers": 0})
    )
    for trial in alone:
        prune(trial, is_quiet=True)
    for _ in range(2):
        machines.add()
    when_told(tmp_path / "train", machines.lose)
    base = load_job(
        None,
        settings
        | space
        | {"name": "swept", "cluster.num_workers": 1, "cluster.address": machines.address},
    )
    result = sweep(base, is_quiet=True)
    assert (tmp_path / "train").read_text(), "no machine was lost"
    assert len(result.by_state("finished")) == 4
    assert [digests(job) for job in expand(base)] == [digests(job) for job in alone]


def check_what_machines_do_not_share_is_refused_at_once(
    machines: Machines, settings: dict[str, Any]
) -> None:
    ip = machines.add()
    there = {"cluster.address": machines.address, "cluster.num_workers": 1}
    # Each machine has a folder of its own where Ray keeps its things.
    own = next(Path(machines.environment["RAY_AUTH_TOKEN_PATH"]).parent.glob("ray"))
    started = time.monotonic()
    with pytest.raises(StoreError, match=rf"machine {NET}\.\d+ does not see this folder"):
        prune(load_job(None, settings | there | {"storage": str(own / "results")}), is_quiet=True)
    with pytest.raises(ConfigError, match=r"cluster\.num_workers = 9: the cluster has room for"):
        prune(
            load_job(
                None,
                settings
                | there
                | {"cluster.num_workers": 9, "finetune.epochs": 0}
                | {"pretrain.epochs": 0},
            ),
            is_quiet=True,
        )
    assert time.monotonic() - started < 60
    machines.lose(ip)


def test_jobs_outlive_lost_machines_and_machines_that_share_nothing_are_refused(
    machines: Machines, settings: dict[str, Any], tmp_path: Path
) -> None:
    for check in (check_a_trial_outlives_two_losses, check_a_sweep_outlives_a_loss):
        folder = tmp_path / check.__name__
        folder.mkdir()
        check(machines, settings | {"workload.options": {"folder": str(folder)}}, folder)
    check_what_machines_do_not_share_is_refused_at_once(machines, settings)
