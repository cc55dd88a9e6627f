"""What a job claims of a cluster, and what is said of one that can never run it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.config.job import load_job
from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.runtime.on_ray import machines as machines_module
from gbp_ray.runtime.on_ray.machines import (
    NodeReport,
    check_folder,
    find_fault,
    is_autoscaling,
    probe_node,
)
from gbp_ray.runtime.placement import (
    Machine,
    check_placeable,
    count_trials,
    count_workers,
    find_misfit,
    pretend_cpus,
    worker_resources,
)

HEAD = Machine("head", {"CPU": 0.0, "memory": 1e9})
SMALL = Machine("small", {"CPU": 4.0})
T4 = Machine("t4", {"CPU": 8.0, "GPU": 2.0, "accelerator_type:T4": 1.0})
A100 = Machine("a100", {"CPU": 32.0, "GPU": 4.0, "accelerator_type:A100": 1.0})
ALL = [HEAD, SMALL, T4, A100]


def cluster(**fields: Any) -> ClusterConfig:
    return ClusterConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "claim", "num_workers"),
    [
        ({}, {"CPU": 1.0}, 44),
        ({"threads_per_worker": 3}, {"CPU": 3.0}, 1 + 2 + 10),
        # Threads are clamped to the largest machine, CPUs that are asked for are not.
        ({"threads_per_worker": 64}, {"CPU": 32.0}, 1),
        ({"cpus_per_worker": 0.5}, {"CPU": 0.5}, 88),
        ({"use_gpu": True}, {"CPU": 1.0, "GPU": 1.0}, 6),
        ({"use_gpu": True, "gpus_per_worker": 0.25}, {"CPU": 1.0, "GPU": 0.25}, 8 + 16),
        # Too few CPUs beside the GPUs of one machine.
        ({"use_gpu": True, "cpus_per_worker": 6}, {"CPU": 6.0, "GPU": 1.0}, 1 + 4),
        (
            {"use_gpu": True, "accelerator_type": "T4"},
            {"CPU": 1.0, "GPU": 1.0, "accelerator_type:T4": 0.001},
            2,
        ),
        # Three tenths of 1 are three and not two, whatever floats say.
        ({"use_gpu": True, "gpus_per_worker": 0.1}, {"CPU": 1.0, "GPU": 0.1}, 8 + 32),
    ],
)
def test_a_worker_claims_what_it_is_given(
    fields: dict[str, Any], claim: dict[str, float], num_workers: int
) -> None:
    config = cluster(**fields)
    assert worker_resources(config, ALL) == claim
    assert count_workers(config, ALL) == num_workers


def test_as_many_trials_as_find_room_for_all_their_workers() -> None:
    assert count_trials(cluster(num_workers=0), ALL) == 44
    assert count_trials(cluster(num_workers=3, use_gpu=True), ALL) == 2
    assert count_trials(cluster(num_workers=7, use_gpu=True), ALL) == 0
    # Of a range the most is kept free, and one trial goes on with the least.
    assert count_trials(cluster(num_workers=[1, 3], use_gpu=True), ALL) == 2
    assert count_trials(cluster(num_workers=[2, 9], use_gpu=True), ALL) == 1
    assert count_trials(cluster(), []) == 0


@pytest.mark.parametrize(
    ("fields", "machines", "part"),
    [
        (
            {"num_workers": 7, "use_gpu": True},
            ALL,
            "cluster.num_workers = 7: the cluster has room for 6 (1 CPU and 1 GPU each, of 44 CPUs "
            "and 6 GPUs on 4 machines); lower it or add machines",
        ),
        ({"use_gpu": True}, [HEAD, SMALL], "cluster.use_gpu = true: none of the cluster's 2 mach"),
        (
            {"use_gpu": True, "accelerator_type": "H100"},
            ALL,
            "cluster.accelerator_type = H100: no machine of the cluster has it (allowed: A100, T4)",
        ),
        (
            {"cpus_per_worker": 33},
            ALL,
            "cluster.cpus_per_worker = 33: the largest machine has 32 CPUs; lower it",
        ),
        (
            {"cpus_per_worker": 9, "use_gpu": True, "accelerator_type": "T4"},
            ALL,
            "cluster.cpus_per_worker = 9: the largest machine with such a GPU has 8 CPUs",
        ),
        ({}, [HEAD], "no machine has a CPU for a worker"),
    ],
)
def test_a_job_that_can_never_be_placed_says_so(
    fields: dict[str, Any], machines: list[Machine], part: str
) -> None:
    config = cluster(**fields)
    fault = find_misfit(config, machines)
    assert fault is not None
    assert part in fault
    assert "\n" not in fault
    with pytest.raises(ConfigError, match=r"cluster\.autoscale = true waits"):
        check_placeable(config, machines, is_autoscaling=False)
    check_placeable(config, machines, is_autoscaling=True)


def test_the_least_of_a_range_is_enough() -> None:
    assert find_misfit(cluster(num_workers=[6, 40], use_gpu=True), ALL) is None
    assert find_misfit(cluster(num_workers=[7, 40], use_gpu=True), ALL) is not None
    assert find_misfit(cluster(num_workers=0), [SMALL]) is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_workers": 7},
        {"num_workers": 3, "threads_per_worker": 2},
        {"cpus_per_worker": 9.5, "num_workers": 2},
        {"cpus_per_worker": 0.5, "num_workers": 2},
    ],
)
def test_a_private_cluster_has_room_for_the_job(fields: dict[str, Any]) -> None:
    config = cluster(**fields)
    machine = Machine("own", {"CPU": float(pretend_cpus(config, num_cores=2))})
    assert find_misfit(config, [machine]) is None


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"accelerator_type": "A100"}, "accelerator_type = A100: is a kind of GPU"),
        ({"gpus_per_worker": 0.5}, "gpus_per_worker = 0.5: set use_gpu = true"),
        ({"use_gpu": True, "gpus_per_worker": 0.5, "num_workers": 2}, "NCCL joins no two workers"),
        ({"use_gpu": True, "gpus_per_worker": 2}, "gpus_per_worker"),
        ({"cpus_per_worker": 0}, "cpus_per_worker"),
        ({"placement": "strict"}, "placement"),
    ],
)
def test_what_cannot_be_claimed_is_refused(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(None, {f"cluster.{name}": value for name, value in fields.items()})
    assert part in str(caught.value)


# -- what Ray tells of its autoscaler --------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "told", "expected"),
    [
        ({"address": None}, None, False),
        # As seen on a head that was started by hand, and in the source of `ray up`.
        ({}, {"autoscaler_report": {"active_nodes": {"node_b9f5": 1}}}, False),
        ({}, {"autoscaler_report": {"active_nodes": {"ray.head.default": 1}}}, True),
        ({}, {}, False),
        ({"autoscale": True}, {"autoscaler_report": {"active_nodes": {"node_b9f5": 1}}}, True),
        ({"autoscale": False}, {"autoscaler_report": {"active_nodes": {"gpu": 1}}}, False),
    ],
)
def test_an_autoscaler_is_told_by_the_types_of_its_machines(
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    told: dict[str, Any] | None,
    expected: bool,
) -> None:
    kept = {"__autoscaling_status": None if told is None else json.dumps(told).encode()}
    monkeypatch.setattr(machines_module.internal_kv, "_internal_kv_get", kept.get)
    monkeypatch.setattr(machines_module, "_AUTOSCALER_TIMEOUT_S", 0.0)
    assert is_autoscaling(cluster(**{"address": "auto", **fields})) is expected


# -- what a machine lacks --------------------------------------------------------------------------


def test_a_machine_is_asked_for_package_modules_and_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "module_of_a_test.py").write_text("raise ZeroDivisionError('nobody imports it')\n")
    (tmp_path / "probe").touch()
    modules, folder = ["gbp_ray", "module_of_a_test"], [str(tmp_path)]
    job = load_job(
        None, {"workload.factory": "module_of_a_test:make", "storage": str(tmp_path / "results")}
    )
    whole = probe_node(modules, folder, str(tmp_path / "probe"))
    assert find_fault(job, SMALL, whole) is None
    assert find_fault(job, SMALL, probe_node(modules, folder, None)) is None

    without = find_fault(job, SMALL, probe_node(modules, [], None))
    assert isinstance(without, ConfigError)
    assert "machine small has no module 'module_of_a_test'; gbp-ray submit takes" in str(without)
    blind = find_fault(job, SMALL, probe_node(modules, folder, str(tmp_path / "nothing")))
    assert isinstance(blind, StoreError)
    assert "machine small does not see this folder; give s3://bucket/prefix" in str(blind)
    other = find_fault(job, SMALL, NodeReport({**whole.versions, "torch": "1.0"}, (), True))
    assert isinstance(other, ConfigError)
    assert "machine small has torch 1.0, this one " in str(other)

    # A worker on a machine that came later finds out by itself.
    with pytest.raises(StoreError, match="does not see this folder"):
        check_folder(job)
