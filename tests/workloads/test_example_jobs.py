"""The job files that come with the repository."""

from __future__ import annotations

import pytest
import torch
from small_data import REPOSITORY

from gbp_ray.config.job import load_job
from gbp_ray.config.workload import WorkloadConfig
from gbp_ray.workloads.checks import check_workload
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.loading import load_workload


def test_byo_job_meets_the_contract(monkeypatch):
    folder = REPOSITORY / "jobs" / "byo"
    monkeypatch.syspath_prepend(str(folder))
    job = load_job(folder / "job.toml")
    workload = load_workload(job.workload)
    model = workload.build_model()
    check_workload(workload, model, 64)
    inputs, targets = take_batch(workload, workload.train, torch.arange(64), augment_seed=0)
    import my_workload

    scores = my_workload.my_criterion(model, inputs, targets, workload.loss(model(inputs), targets))
    assert {name: s.shape for name, s in scores.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    again = load_workload(job.workload)
    assert torch.equal(again.train[0], workload.train[0])


@pytest.mark.parametrize("path", ["cifar10_resnet20.toml", "cifar10_convnet.toml"])
def test_cifar_jobs_need_only_their_data(tiny, path):
    overrides = {"workload.options.data": str(tiny)}
    job = load_job(REPOSITORY / "jobs" / path, overrides)
    options = {k: v for k, v in job.workload.options.items() if k != "checkpoint"}
    workload = load_workload(WorkloadConfig(factory=job.workload.factory, options=options))
    check_workload(workload, workload.build_model(), 4)
