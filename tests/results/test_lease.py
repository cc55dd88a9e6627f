"""Two drivers of one trial: the second is refused while the first lives, and no longer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gbp_ray.errors import StoreError
from gbp_ray.results import lease
from gbp_ray.results.lease import hold_lease, is_held
from gbp_ray.results.objects import Objects
from gbp_ray.results.store import Store, open_objects

TRIAL = "trials/taylor-s0.50-r2-00000000"


@pytest.fixture
def objects(storage: str) -> Objects:
    return open_objects(storage).child("try")


def test_a_second_driver_is_refused_until_the_first_has_ended(objects: Objects) -> None:
    assert not is_held(objects, TRIAL)
    with hold_lease(objects, TRIAL) as first:
        assert is_held(objects, TRIAL)
        with pytest.raises(StoreError, match="is at work on this trial") as caught:
            hold_lease(objects, TRIAL).__enter__()
        assert f"process {os.getpid()} on " in str(caught.value)
        assert "\n" not in str(caught.value)
        with hold_lease(objects, "trials/another"):
            pass
        first.check()
    assert not is_held(objects, TRIAL)
    assert list(objects.entries()) == []
    with hold_lease(objects, TRIAL):
        pass


def test_of_many_drivers_one_gets_the_trial(objects: Objects) -> None:
    outcomes: list[str] = []
    start, end = threading.Barrier(5), threading.Barrier(5)

    def drive() -> None:
        start.wait()
        try:
            with hold_lease(objects, TRIAL):
                outcomes.append("got it")
                end.wait(timeout=30)
        except StoreError as error:
            outcomes.append(str(error))
            end.wait(timeout=30)

    threads = [threading.Thread(target=drive) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("got it") == 1
    assert sum("at work on this trial" in text for text in outcomes) == 4


def test_a_holder_that_ends_while_it_is_looked_at_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = open_objects(str(tmp_path))
    with hold_lease(objects, TRIAL):
        monkeypatch.setattr(Path, "read_bytes", lambda path: Path("/nothing/there").stat())
        with pytest.raises(StoreError, match="is at work on this trial"):
            hold_lease(objects, TRIAL).__enter__()


def test_a_killed_driver_is_followed_at_once(objects: Objects) -> None:
    code = (
        "import sys, time\n"
        "from gbp_ray.results.lease import hold_lease\n"
        "from gbp_ray.results.store import open_objects\n"
        "with hold_lease(open_objects(sys.argv[1]), sys.argv[2]):\n"
        "    print('holds', flush=True)\n"
        "    time.sleep(60)\n"
    )
    arguments = [sys.executable, "-c", code, objects.uri_of(), TRIAL]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    assert is_held(objects, TRIAL)
    with pytest.raises(StoreError, match=f"process {process.pid} on "):
        hold_lease(objects, TRIAL).__enter__()
    # Not waited for: a shell may leave it a zombie for as long as it likes.
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while is_held(objects, TRIAL) and time.monotonic() < deadline:
        time.sleep(0.01)
    with hold_lease(objects, TRIAL):
        pass
    process.wait()
    process.stdout.close()
    assert list(objects.entries()) == []


def test_a_driver_of_another_machine_is_dead_after_a_while(
    moto_storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = open_objects(moto_storage)
    card = {"driver": "x", "host": "elsewhere", "pid": 1, "since": "noon", "machine": "other"}
    objects.put(f"{TRIAL}/driver.json", json.dumps(card).encode())
    with pytest.raises(StoreError, match="process 1 on elsewhere, since noon, is at work"):
        hold_lease(objects, TRIAL).__enter__()
    monkeypatch.setattr(lease, "DEAD_S", 0.5)
    deadline = time.monotonic() + 10
    while is_held(objects, TRIAL) and time.monotonic() < deadline:
        time.sleep(0.1)
    with hold_lease(objects, TRIAL):
        assert json.loads(objects.get(f"{TRIAL}/driver.json") or b"")["driver"] != "x"


def test_a_live_driver_beats_and_one_given_up_for_dead_learns_it(
    moto_storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    objects = open_objects(moto_storage)
    with hold_lease(objects, TRIAL) as held:
        for _ in range(50):
            time.sleep(0.1)
            card = json.loads(objects.get(f"{TRIAL}/driver.json") or b"{}")
            if card.get("beats", 0) >= 2:
                break
        assert card["beats"] >= 2
        held.check()
        objects.put(f"{TRIAL}/driver.json", json.dumps(card | {"driver": "other"}).encode())
        deadline = time.monotonic() + 5
        while held.is_sound and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(StoreError, match="another one took the trial over"):
            held.check()
    # What the other one wrote is the other one's.
    assert json.loads(objects.get(f"{TRIAL}/driver.json") or b"")["driver"] == "other"


def test_locks_of_processes_that_a_sweep_has_ended_are_removed(tmp_path: Path) -> None:
    # Here, as Ray takes a while to import.
    from gbp_ray.runtime.on_ray.tune import _tidied

    store = Store(tmp_path, "job")
    dead, live = (store.objects.uri_of(f"trials/{name}/driver.lock") for name in ("dead", "live"))
    with hold_lease(store.objects, "trials/live"):
        with _tidied(store):
            Path(dead).parent.mkdir()
            Path(dead).touch()
        assert not Path(dead).parent.exists()
        assert Path(live).exists()
