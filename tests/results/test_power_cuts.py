"""Power cuts: what was acknowledged is there afterwards, and what is there is whole.

POSIX promises nothing of a file until it is flushed, and nothing of its name until the folder is.
So, after a cut, each name is what it was at the last flush of its folder or anything that it became
later, whatever the other names are; and each file holds what it held at its last flush, or a part
of it where there was none. The changes of real commits are recorded, and such states rebuilt.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sample_results import sample_job, sample_round

from gbp_ray.config.job import trial_id
from gbp_ray.results.maintenance import find_faults
from gbp_ray.results.records import TrialRecord
from gbp_ray.results.store import Store

JOB = sample_job()
TRIAL = trial_id(JOB)
NUM_DRAWS = max(1, int(os.environ.get("GBP_RAY_FUZZ", "0")) // 100)


class Change(NamedTuple):
    """A name in a folder becomes another file or folder, or nothing."""

    moment: int
    folder: int
    name: str
    inode: int | None


class Recording:
    """What the functions of `os` were asked to change below a folder."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root, self.base, self.moment = root, root.stat().st_ino, 0
        self.changes: list[Change] = []
        self.flushes: dict[int, list[int]] = {self.base: []}
        self.contents: dict[int, list[tuple[int, bytes]]] = {}
        self._held: list[int] = []

    def start(self, patch: pytest.MonkeyPatch) -> None:
        """Records from here on. Disks are not waited for: no power fails here."""
        for name in ("mkdir", "rmdir", "unlink", "link", "replace", "open"):
            patch.setattr(os, name, self._watch(name, getattr(os, name)))
        patch.setattr(os, "fsync", self._flush)

    def stop(self) -> None:
        """Lets go of what was held, so that no number was given to two files."""
        for handle in self._held:
            os.close(handle)

    def rebuild(self, target: Path, moment: int, draws: random.Random | None) -> None:
        """Makes a folder as it may be when the power is cut after `moment` changes and flushes.

        Args:
            draws: Choose among the states that it may be in; without them all is lost that may be.
        """
        names: dict[int, dict[str, int | None]] = {}
        for folder, name in dict.fromkeys((c.folder, c.name) for c in self.changes):
            own = [c for c in self.changes if (c.folder, c.name) == (folder, name)]
            own = [c for c in own if c.moment <= moment]
            flushed = max((m for m in self.flushes[folder] if m <= moment), default=0)
            sure = sum(c.moment <= flushed for c in own)
            count = sure if draws is None else draws.randint(sure, len(own))
            names.setdefault(folder, {})[name] = own[count - 1].inode if count else None
        self._fill(target, self.base, names, moment, draws)

    def _fill(self, target: Path, folder: int, names: Any, moment: int, draws: Any) -> None:
        target.mkdir()
        for name, inode in names.get(folder, {}).items():
            if inode in self.flushes:
                self._fill(target / name, inode, names, moment, draws)
            elif inode is not None:
                data = b""
                for when, content in self.contents.get(inode, ()):
                    if when <= moment:
                        data = content
                    elif not data and draws is not None:
                        data = content[: draws.randint(0, len(content))]
                (target / name).write_bytes(data)

    def _watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return function(*args, **options)
            number = 1 if name in ("link", "replace") else 0
            handle = options.get("dir_fd", options.get("dst_dir_fd"))
            target = self._locate(args[number], handle)
            before = os.path.lexists(target)
            result = function(*args, **options)
            if target.is_relative_to(self.root) and not (name == "open" and before):
                self.moment += 1
                self._note(target, is_new=name in ("open", "mkdir"))
                if name == "replace":
                    self._note(self._locate(args[0], options.get("src_dir_fd")), is_new=False)
            return result

        return watched

    def _locate(self, path: Any, handle: int | None) -> Path:
        folder = Path.cwd() if handle is None else Path(f"/proc/self/fd/{handle}").readlink()
        return folder / path

    def _note(self, path: Path, *, is_new: bool) -> None:
        inode = path.lstat().st_ino if path.exists() else None
        if is_new and inode is not None:
            self._held.append(os.open(path, os.O_RDONLY))
            if path.is_dir():
                self.flushes[inode] = []
        self.changes.append(Change(self.moment, path.parent.lstat().st_ino, path.name, inode))

    def _flush(self, handle: int) -> None:
        path = self._locate("", handle)
        if path.is_relative_to(self.root):
            self.moment += 1
            inode = os.fstat(handle).st_ino
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                self.flushes[inode].append(self.moment)
            else:
                self.contents.setdefault(inode, []).append((self.moment, path.read_bytes()))


def drive(store: Store, done: Callable[[str], None] = lambda what: None) -> None:
    """Does what a driver does, from wherever an earlier one was interrupted."""
    store.claim(JOB)
    done("claim")
    with store.hold(TRIAL):
        if store.read_trial(TRIAL) is not None:
            return
        for number in range(len(store.read_rounds(TRIAL)), 3):
            record, files = sample_round(number, 0.25 * number, 0)
            store.write_round(TRIAL, record, files)
            done(f"round {number}")
        if store.read_shared("dense/h") is None:
            store.write_shared("dense/h", {"w.safetensors": b"w", "shards/0.x": b"s"}, {})
        done("shared")
        rounds = tuple(store.read_rounds(TRIAL))
        store.write_trial(
            TrialRecord(trial_id=TRIAL, job=JOB, rounds=rounds, seconds=1, num_workers=0)
        )
        done("trial")


def check(store: Store, acknowledged: set[str]) -> None:
    """Makes sure that all that was acknowledged is there, and that all that is there is whole."""
    there = {f"round {record.round}" for record in store.read_rounds(TRIAL)}
    there |= {"claim"} if store.read_claim() is not None else set()
    there |= {"shared"} if store.read_shared("dense/h") is not None else set()
    there |= {"trial"} if store.read_trial(TRIAL) is not None else set()
    assert acknowledged <= there
    if store.objects.list_folders("trials/"):
        assert find_faults(store.uri).faults == []


def test_a_power_cut_takes_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "recorded")
    acknowledged: list[tuple[int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        recording.start(patch)
        drive(
            Store(recording.root / "new" / "results", "try"),
            lambda what: acknowledged.append((recording.moment, what)),
        )
    recording.stop()
    assert recording.moment > 60, "the store is not being watched"
    draws = random.Random(6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        for moment in range(recording.moment + 1):
            known = {what for when, what in acknowledged if when <= moment}
            for number in range(1 + NUM_DRAWS):
                place = tmp_path / f"{moment}-{number}"
                recording.rebuild(place, moment, draws if number else None)
                store = Store(place / "new" / "results", "try")
                check(store, known)
                if moment % 5 == 0:
                    drive(store)
                    check(store, {what for _, what in acknowledged})
