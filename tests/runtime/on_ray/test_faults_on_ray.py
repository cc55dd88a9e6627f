"""A trial on a cluster that shrinks under it, with workers that hang, freeze and are killed."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from gbp_ray.config.job import load_job
from gbp_ray.runtime.api import prune

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(
        "GBP_RAY_KILLS" not in os.environ,
        reason="takes two minutes and more; set GBP_RAY_KILLS to try it",
    ),
]

logger = logging.getLogger(__name__)

HANG_TIMEOUT_S = 20
"""More than a slow machine needs to start with its first batch."""

QUICK = {
    "pretrain.epochs": 1,
    "finetune.epochs": 0.5,
    "prune.rounds": 2,
    "prune.calibration_examples": 128,
    "prune.batchnorm_examples": 256,
}
UNLUCKY_WORKLOAD = '''
"""The digits workload; each group of workers meets another fate in its 15th part of a batch."""
import os, signal, time
from dataclasses import replace
from pathlib import Path

import torch
from gbp_ray.workloads import digits_convnet


def unlucky(folder):
    workload = digits_convnet(width=8, augment=False)
    groups, calls = Path(folder, "groups"), [0]
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
        with groups.open("a") as file:
            file.write(f"{torch.distributed.get_world_size()}\\n")

    def augment(inputs):
        if torch.distributed.is_initialized():
            calls[0] += 1
            if calls[0] == 15:
                meet(len(groups.read_text().splitlines()), torch.distributed.get_rank())
        return inputs

    def meet(group, rank):
        if group == 1 and rank == 0:
            Path(folder, "lose a machine").touch()
            time.sleep(600)
        if rank == 1:
            if group == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if group == 3:
                time.sleep(600)
            if group == 4:
                os.kill(os.getpid(), signal.SIGSTOP)

    return replace(workload, augment=augment)
'''


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room, a machine for two workers and one for a third."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=2)
    cluster.machine_to_lose = cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def lose_a_machine(cluster: Cluster, when: Path) -> None:
    while not when.exists():
        time.sleep(0.1)
    cluster.remove_node(cluster.machine_to_lose, allow_graceful=False)


def test_a_trial_outlives_a_lost_machine_and_every_end_of_a_worker(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "unlucky_workload.py").write_text(UNLUCKY_WORKLOAD)
    monkeypatch.chdir(tmp_path)
    settings = QUICK | {
        "storage": str(tmp_path / "results"),
        "workload.factory": "unlucky_workload:unlucky",
        "workload.options": {"folder": str(tmp_path)},
    }
    alone = prune(
        load_job(None, settings | {"name": "alone", "cluster.num_workers": 0}), is_quiet=True
    )
    capfd.readouterr()
    job = load_job(
        None,
        settings
        | {
            "name": "unlucky",
            "cluster.num_workers": [1, 3],
            "cluster.max_failures": 4,
            "cluster.hang_timeout_s": HANG_TIMEOUT_S,
            "cluster.address": cluster.address,
        },
    )
    threading.Thread(
        target=lose_a_machine, args=(cluster, tmp_path / "lose a machine"), daemon=True
    ).start()
    result = prune(job)
    told = capfd.readouterr().err
    logger.info(told)
    assert (tmp_path / "groups").read_text().split() == ["3", "2", "2", "2", "2"]
    for number, what in enumerate(
        (
            # What Ray has learnt of a lost machine by then differs.
            r"worker \d (is out of reach|was lost|was killed)",
            r"worker 1 was killed, perhaps for memory",
            r"worker 1 made no progress for [23]\d s after .* at unlucky_workload.py:\d+ in meet",
            r"worker 1 did not answer for [23]\d s \(its process was stopped",
        ),
        start=1,
    ):
        pattern = rf"{what}.*; starting the workers again \({number} of cluster.max_failures = 4\)"
        assert re.search(pattern, told), f"{pattern}\n{told}"
    assert [
        (r.mask_digest, r.files["weights.safetensors"].sha256) for r in result.record.rounds
    ] == [(r.mask_digest, r.files["weights.safetensors"].sha256) for r in alone.record.rounds]
