"""One driver at a time: who may work on a trial, and how a dead driver is told from a live one.

On a folder a driver locks `driver.lock` in the trial's folder. The kernel gives the lock back the
moment the process ends, however it ends.

On an object store it writes `driver.json`, on condition that there is none, and rewrites it every
`BEAT_S` seconds. Whoever finds it looks at its age, by the server's clock: older than `DEAD_S`, its
driver is dead. A driver that ran on this machine is asked after directly, so that a killed command
can be run again at once. All others are taken to be alive. Taking over is conditional on the
version that was looked at, so of several only one succeeds, and the beat of a driver that was given
up for dead fails: it learns that the trial is no longer its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gbp_ray.errors import BusyError, StoreError
from gbp_ray.results.folder import FolderObjects
from gbp_ray.results.objects import Objects

__all__ = [
    "BEAT_S",
    "DEAD_S",
    "MARKS",
    "Lease",
    "await_lease",
    "hold_lease",
    "is_held",
    "read_driver",
]

MARKS = ("driver.lock", "driver.json")
"""Files that name the driver of a folder in that folder."""

BEAT_S = 5.0
"""Seconds between two signs of life."""

DEAD_S = 30.0
"""Seconds without one after which a driver is dead."""

_MOST_BYTES = 10_000
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Lease:
    """The right to work on a trial."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._is_lost = threading.Event()

    @property
    def is_sound(self) -> bool:
        """Whether it still holds, as far as this process knows."""
        return not self._is_lost.is_set()

    def check(self) -> None:
        """Makes sure that it still holds.

        Raises:
            StoreError: Another driver has taken the trial over.
        """
        if not self.is_sound:
            raise StoreError(
                f"storage: '{self._place}': this driver gave no sign of life for {DEAD_S:.0f} s "
                "and another one took the trial over; wait for that one"
            )

    def lose(self) -> None:
        """Notes that another driver has it."""
        self._is_lost.set()


@contextlib.contextmanager
def hold_lease(objects: Objects, trial: str) -> Iterator[Lease]:
    """Keeps a trial from other drivers while the block runs.

    Args:
        trial: Name of the trial's folder among the objects.

    Raises:
        BusyError: Another driver is at work on it.
    """
    lease = Lease(objects.uri_of(trial))
    held = (
        _lock_file(objects, trial)
        if isinstance(objects, FolderObjects)
        else _beat(objects, trial, lease)
    )
    with held:
        yield lease


@contextlib.contextmanager
def await_lease(objects: Objects, trial: str) -> Iterator[Lease]:
    """Hold a lease as `hold_lease`, waiting while another driver has it."""
    pause_s = 0.1 if isinstance(objects, FolderObjects) else 2.0
    with contextlib.ExitStack() as stack:
        while True:
            try:
                lease = stack.enter_context(hold_lease(objects, trial))
                break
            except BusyError:
                time.sleep(pause_s)
        yield lease


def is_held(objects: Objects, trial: str) -> bool:
    """Check whether a live driver is at work on a trial; change nothing."""
    if isinstance(objects, FolderObjects):
        try:
            with objects.open_file(_lock_of(trial), os.O_RDONLY) as file:
                return not _try_lock(file, objects.uri_of(trial))
        except OSError:
            return False
    found = objects.get_version(_mark(trial))
    return found is not None and _is_alive(_parse(found[0]), found[2])


def read_driver(objects: Objects, trial: str) -> str:
    """Reads the token of the driver that took a trial last and has not ended; "" where none has."""
    key = _lock_of(trial) if isinstance(objects, FolderObjects) else _mark(trial)
    return str(_parse(objects.get(key) or b"").get("driver", ""))


# -- on a folder -----------------------------------------------------------------------------------


def _lock_of(trial: str) -> str:
    return f"{trial}/driver.lock"


@contextlib.contextmanager
def _lock_file(objects: FolderObjects, trial: str) -> Iterator[None]:
    key = _lock_of(trial)
    with _open_locked(objects, key, objects.uri_of(trial)):
        try:
            yield
        finally:
            # Removed while it is still locked, so that it is nobody else's.
            with contextlib.suppress(StoreError):
                objects.delete([key])


@contextlib.contextmanager
def _open_locked(objects: FolderObjects, key: str, place: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        while True:
            try:
                opened = objects.open_file(key, os.O_RDWR | os.O_CREAT, is_made=True)
                file = stack.enter_context(opened)
                if not _try_lock(file, place):
                    raise _refusal(place, _parse(file.read(_MOST_BYTES)))
                # The holder before us may have removed the file between our two steps.
                path = objects.path(key)
                if os.fstat(file.fileno()).st_ino == os.lstat(path).st_ino:
                    os.ftruncate(file.fileno(), 0)
                    os.pwrite(file.fileno(), _dump(_describe_self()), 0)
                    # So that workers on other machines read it, too.
                    os.fsync(file.fileno())
                    break
            except FileNotFoundError:
                # Another driver has just removed the file, or the empty folder.
                pass
            except OSError as error:
                reason = "no room on disk" if error.errno in _FULL else error.strerror
                raise StoreError(
                    f"storage: cannot write '{objects.uri_of(key)}': {reason}; make room or choose "
                    "a storage folder you can write"
                ) from None
            stack.close()
        yield


def _try_lock(file: IO[bytes], place: str) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        warnings.warn(
            f"storage: '{place}' cannot be locked ({error.strerror}); make sure yourself that "
            "no other driver runs this trial",
            stacklevel=2,
        )
    return True


# -- on an object store ----------------------------------------------------------------------------


def _mark(trial: str) -> str:
    return f"{trial}/driver.json"


@contextlib.contextmanager
def _beat(objects: Objects, trial: str, lease: Lease) -> Iterator[None]:
    key = _mark(trial)
    card = _describe_self()
    version = _take(objects, key, card, objects.uri_of(trial))
    is_over = threading.Event()

    def beat() -> None:
        nonlocal version
        beats = 0
        while not is_over.wait(BEAT_S):
            beats += 1
            try:
                new = objects.put_if(key, _dump(card | {"beats": beats}), version)
            except StoreError:
                # The storage does not answer; if it stays so, the next commit says it better.
                continue
            if new is None:
                lease.lose()
                return
            version = new

    thread = threading.Thread(target=beat, name="gbp-ray-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=DEAD_S)
        found = objects.get(key)
        if found is not None and _parse(found).get("driver") == card["driver"]:
            objects.delete([key])


def _take(objects: Objects, key: str, card: dict[str, Any], place: str) -> str:
    # Each time round the mark has changed hands in the meantime.
    for _ in range(9):
        found = objects.get_version(key)
        if found is not None:
            data, seen, age_s = found
            holder = _parse(data)
            if _is_alive(holder, age_s):
                raise _refusal(place, holder)
        else:
            seen = None
        version = objects.put_if(key, _dump(card), seen)
        if version is not None:
            return version
    raise StoreError(f"storage: '{place}': several drivers want this trial; run the job again")


def _is_alive(holder: dict[str, Any], age_s: float) -> bool:
    if age_s > DEAD_S:
        return False
    machine = _machine()
    if machine is None or holder.get("machine") != machine:
        return True
    started = _process_start(holder.get("pid", 0))
    return started is not None and started == holder.get("started")


# -- whose it is -----------------------------------------------------------------------------------


def _describe_self() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "driver": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": pid,
        "machine": _machine(),
        "started": _process_start(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _machine() -> str | None:
    """Names what process numbers refer to: this boot of this machine, and the container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """Return the start of a live process in clock ticks since boot, or None."""
    try:
        # The name, in brackets, may hold spaces; state is the first field after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _dump(card: dict[str, Any]) -> bytes:
    return (json.dumps(card, indent=1) + "\n").encode()


def _parse(data: bytes) -> dict[str, Any]:
    """Reads what a driver has written of itself, as far as it is that."""
    try:
        card = json.loads(data[:_MOST_BYTES])
    except (ValueError, RecursionError):
        return {}
    if not isinstance(card, dict):
        return {}
    kinds = {"pid": int, "beats": int}
    return {name: v for name, v in card.items() if type(v) is kinds.get(name, str)}


def _refusal(place: str, holder: dict[str, Any]) -> BusyError:
    who = "another driver"
    if {"pid", "host", "since"} <= set(holder):
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    return BusyError(
        f"storage: '{place}': {who} is at work on this trial; wait until it has ended, or stop it, "
        "and run the job again"
    )
