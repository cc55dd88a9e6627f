"""Through a network that spoils every fifth request: jobs end, and nothing half is ever seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FAULTS, FaultyProxy
from index_rows import untimed_rows
from sample_results import sample_job, write_trial
from watchful_reader import WatchfulReader

import gbp_ray
from gbp_ray.config.job import expand, load_job
from gbp_ray.errors import StoreError
from gbp_ray.results.maintenance import find_faults, find_garbage, remove_garbage
from gbp_ray.results.query import open_results
from gbp_ray.results.store import Store, locate_trials, open_objects
from gbp_ray.runtime.trial import run_solo

QUICK = {
    "cluster.num_workers": 0,
    "workload.options.width": 4,
    "pretrain.epochs": 0.1,
    "finetune.epochs": 0.1,
    "prune.rounds": 2,
    "prune.calibration_examples": 64,
}


def through(storage: str, proxy: FaultyProxy) -> str:
    """The same place, by way of the proxy."""
    place = storage.partition("?")[0]
    return f"{place}?endpoint_override={proxy.endpoint}&scheme=http"


def endpoint_of(storage: str) -> str:
    return storage.partition("endpoint_override=")[2].partition("&")[0]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the waits between attempts, which are for a network; this is none."""

    def delay_amount(*arguments: Any) -> float:
        return 0.0

    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", delay_amount)
    monkeypatch.setattr("gbp_ray.results.s3._pause", lambda attempt: None)


@pytest.mark.parametrize("seed", [1])
def test_a_job_ends_and_no_reader_sees_a_half_record(s3_storage: str, seed: int) -> None:
    with FaultyProxy(endpoint_of(s3_storage), 0.2, seed) as proxy:
        job = load_job(None, QUICK | {"storage": through(s3_storage, proxy), "name": "try"})
        with WatchfulReader(s3_storage, "try") as reader:
            result = gbp_ray.prune(job, is_quiet=True)
            others = [
                write_trial(Store(through(s3_storage, proxy), "samples"), sample_job(seed=seed))
                for seed in range(2)
            ]
    assert not reader.failures
    assert reader.num_looks > 3
    assert reader.num_seen > 0
    assert sum(proxy.seen.values()) > 60
    assert 0.1 < 1 - proxy.seen[""] / sum(proxy.seen.values()) < 0.3
    audit = find_faults(s3_storage)
    assert audit.faults == []
    assert (audit.num_trials, audit.num_rounds) == (3, 9)
    assert {name for _, name in locate_trials(s3_storage)} == {result.record.trial_id, *others}
    assert len(open_results(s3_storage)) == 9
    # An upload that was begun twice, because its answer was lost, is all that may be left.
    remove_garbage(find_garbage(s3_storage))
    assert find_garbage(s3_storage) == []


def test_trials_that_share_go_through_faults_to_the_same_index(
    s3_storage: str, tmp_path: Path
) -> None:
    # What a process of a sweep does; Ray's part in it is tried in runtime/test_sweep_faults.py.
    settings = QUICK | {"name": "try", "prune.rounds": 1, "prune.criterion": "taylor"}
    settings |= {"sweep.space": {"prune.sparsity": [0.5, 0.9]}}
    with FaultyProxy(endpoint_of(s3_storage), 0.2, 11) as proxy:
        jobs = expand(load_job(None, settings | {"storage": through(s3_storage, proxy)}))
        Store(through(s3_storage, proxy), "try").claim(jobs[0])
        with WatchfulReader(s3_storage, "try", pause_s=0.2) as reader:
            for job in jobs:
                list(run_solo(job))
    assert not reader.failures
    assert 0.1 < 1 - proxy.seen[""] / proxy.seen.total() < 0.3
    assert find_faults(s3_storage).faults == []
    store = Store(s3_storage, "try")
    assert len(store.objects.list_folders("dense/")) == 1
    assert len(store.objects.list_folders("scores/")) == 1
    here = str(tmp_path)
    for job in expand(load_job(None, settings | {"storage": here})):
        Store(here, "try").claim(job)
        list(run_solo(job))
    assert untimed_rows(s3_storage) == untimed_rows(here)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_is_survived(
    moto_storage: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("faulty_proxy.FAULTS", (fault,))
    monkeypatch.setattr("gbp_ray.results.s3._ATTEMPTS", 20)
    data = bytes(range(256)) * 100
    with FaultyProxy(endpoint_of(moto_storage), 0.3, 7) as proxy:
        objects = open_objects(through(moto_storage, proxy))
        objects.preflight()
        version: str | None = None
        for number in range(5):
            objects.put(f"data/{number}", data)
            assert objects.get(f"data/{number}") == data
            version = objects.put_if("mark", b"%d" % number, version)
            assert version is not None, "a write of ours was taken for another's"
            assert objects.put_if("mark", b"other", None) is None
            found = objects.get_version("mark")
            assert found is not None
            assert found[:2] == (b"%d" % number, version)
        assert [entry.key for entry in objects.entries()] == [f"data/{n}" for n in range(5)] + [
            "mark"
        ]
        assert objects.list_folders() == ["data"]
        assert list(objects.find_leftovers()) == []
        objects.delete([f"data/{number}" for number in range(5)])
        assert not objects.exists("data/0")
    assert proxy.seen[fault] > 3
    assert [entry.key for entry in open_objects(moto_storage).entries()] == ["mark"]


def test_a_large_object_goes_up_through_faults(
    moto_storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(251)) * (20 * 2**20 // 251)
    with FaultyProxy(endpoint_of(moto_storage), 0.4, 3) as proxy:
        objects = open_objects(through(moto_storage, proxy))
        objects.put("large", data)
        assert open_objects(moto_storage).get("large") == data
        assert objects.get("large") == data
    assert proxy.seen.total() - proxy.seen[""] - proxy.seen["delay"] > 1


def test_a_server_that_stays_broken_is_said_to_be(
    moto_storage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with FaultyProxy(endpoint_of(moto_storage), 1.0, 3) as proxy:
        job = load_job(None, QUICK | {"storage": through(moto_storage, proxy), "name": "try"})
        monkeypatch.setattr("faulty_proxy.FAULTS", ("503",))
        with pytest.raises(StoreError, match=r"kept failing at GetObject") as caught:
            gbp_ray.prune(job, is_quiet=True)
    assert caught.value.exit_code == 1
    assert "run the same command again" in str(caught.value)
    assert proxy.seen["503"] == 8
