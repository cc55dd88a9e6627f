"""Results on disk: whole rounds or nothing, whatever happens between two writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_results import sample_job, sample_round

from gbp_ray.config.job import JobConfig
from gbp_ray.errors import StoreError
from gbp_ray.results.maintenance import find_faults
from gbp_ray.results.records import FileRecord, RoundRecord, TrialRecord
from gbp_ray.results.store import Store, locate_trials

TRIAL = "taylor-s0.50-r2-00000000"
FILES = {"weights.safetensors": b"w" * 5000, "masks.safetensors": b"m" * 70, "state.pt": b"s"}


def make_job(**top: Any) -> JobConfig:
    return JobConfig.model_validate(sample_job().model_dump(exclude_unset=True) | top)


def make_round(number: int, **changed: Any) -> RoundRecord:
    record, _ = sample_round(number, 0.25 * number, seed=0)
    return RoundRecord.model_validate(record.model_dump() | {"files": {}} | changed)


def make_trial(store: Store, rounds: int = 2) -> TrialRecord:
    records = store.read_rounds(TRIAL)
    assert len(records) == rounds + 1
    return TrialRecord(
        trial_id=TRIAL, job=make_job(), rounds=tuple(records), seconds=1.5, num_workers=0
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results", "try")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(StoreError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- whose folder ----------------------------------------------------------------------------------


def test_claim_marks_a_new_folder_and_knows_it_again(store: Store) -> None:
    store.claim(make_job())
    assert names_in(store.folder) == {"job.json"}
    store.claim(make_job())
    store.claim(make_job(seed=5))
    assert names_in(store.folder) == {"job.json"}


def test_claim_refuses_the_folder_of_another_job(store: Store) -> None:
    store.claim(make_job())
    text = refusal(lambda: store.claim(make_job(workload={"factory": "other:make"})))
    assert str(store.folder) in text
    assert "my_module:make" in text
    assert json.loads((store.folder / "job.json").read_text())["factory"] == "my_module:make"


def test_claim_refuses_a_folder_that_is_not_ours_and_leaves_it(store: Store) -> None:
    store.folder.mkdir(parents=True)
    (store.folder / "thesis.tex").write_text("precious")
    assert "not a results folder" in refusal(lambda: store.claim(make_job()))
    assert names_in(store.folder) == {"thesis.tex"}


def test_claim_takes_an_empty_folder_and_one_with_a_killed_claim(store: Store) -> None:
    store.folder.mkdir(parents=True)
    (store.folder / ".job.json.k1ll3d_0").write_text("{")
    store.claim(make_job())
    store.claim(make_job())


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '"x"'])
def test_claim_refuses_a_damaged_mark(store: Store, content: str) -> None:
    store.folder.mkdir(parents=True)
    (store.folder / "job.json").write_text(content)
    assert "is damaged" in refusal(lambda: store.claim(make_job()))


def test_claim_names_the_folder_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside_file = Store(tmp_path / "file", "try")
    assert str(tmp_path / "file") in refusal(lambda: inside_file.claim(make_job()))
    is_file = Store(tmp_path, "file")
    assert str(tmp_path / "file") in refusal(lambda: is_file.claim(make_job()))
    long = Store(tmp_path, "n" * 300)
    assert "too long" in refusal(lambda: long.claim(make_job()))


def test_storage_of_an_unknown_user_is_refused() -> None:
    assert "no such home" in refusal(lambda: Store("~no-such-user-here/x", "try"))


# -- write and read --------------------------------------------------------------------------------


def test_a_round_reads_back_as_written(store: Store) -> None:
    written = store.write_round(TRIAL, make_round(0), FILES)
    (read,) = store.read_rounds(TRIAL)
    assert read == written
    for name, data in FILES.items():
        assert store.read_file(TRIAL, read, name) == data
        assert read.files[name] == FileRecord(
            num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
    assert names_in(store.folder) == {*FILES, "round.json"}


def test_files_are_readable_for_the_group(store: Store) -> None:
    store.write_round(TRIAL, make_round(0), FILES)
    for path in Path(store.round_uri(TRIAL, 0)).iterdir():
        assert path.stat().st_mode & 0o777 == 0o644


def test_a_committed_round_is_never_replaced(store: Store) -> None:
    first = store.write_round(TRIAL, make_round(0), FILES)
    other = FILES | {"state.pt": b"other"}
    text = refusal(lambda: store.write_round(TRIAL, make_round(0, accuracy=0.5), other))
    assert "is there already, by another driver" in text
    assert store.read_rounds(TRIAL) == [first]
    assert names_in(store.folder) == {*FILES, "round.json"}


@pytest.mark.parametrize("num_bytes", [100, 20 * 2**20], ids=["small", "in parts"])
def test_a_driver_that_was_frozen_replaces_nothing(storage: str, num_bytes: int) -> None:
    frozen, other = Store(storage, "try"), Store(storage, "try")
    frozen.claim(make_job())
    frozen.begin_round(TRIAL, 0)
    written = frozen.put_files(TRIAL, 0, [("state.pt", b"a" * num_bytes)])
    # The other one takes the trial over and commits before the first goes on.
    files = {"state.pt": b"b" * num_bytes, "other.bin": b"B"}
    record = other.write_round(TRIAL, make_round(0), files)
    written |= frozen.put_files(TRIAL, 0, [("other.bin", b"A")])
    with pytest.raises(StoreError, match="is there already"):
        frozen.end_round(TRIAL, make_round(0, accuracy=0.1), written)
    assert {name: other.read_file(TRIAL, record, name) for name in files} == files
    assert other.read_round(TRIAL, 0) == record
    assert not find_faults(storage).faults


def test_each_file_is_let_go_before_the_next_is_made(store: Store) -> None:
    gone: list[int] = []

    class File(bytes):
        def __del__(self) -> None:
            gone.append(len(self))

    def files() -> Iterator[tuple[str, bytes]]:
        for number in range(3):
            assert len(gone) == number, "two files are in memory"
            yield f"{number}.bin", File(b"data")

    assert list(store.put_files(TRIAL, 0, files())) == ["0.bin", "1.bin", "2.bin"]


def test_a_driver_that_comes_too_late_writes_beside_what_is_there(store: Store) -> None:
    # It looked before the other one began, was frozen, and goes on after that one's commit.
    store.begin_round(TRIAL, 0)
    first = store.write_round(TRIAL, make_round(0), FILES)
    other = {name: data + b"other" for name, data in FILES.items()}
    late = store.put_files(TRIAL, 0, other.items())
    refusal(lambda: store.end_round(TRIAL, make_round(0, accuracy=0.5), late))
    assert store.read_rounds(TRIAL) == [first]
    for name, data in FILES.items():
        assert store.read_file(TRIAL, first, name) == data


def test_of_what_a_dead_driver_has_left_none_is_taken_for_a_result(store: Store) -> None:
    store.put_files(TRIAL, 0, [(name, b"dead" + data) for name, data in FILES.items()])
    record = store.write_round(TRIAL, make_round(0), FILES)
    assert store.read_rounds(TRIAL) == [record]
    for name, data in FILES.items():
        assert store.read_file(TRIAL, record, name) == data
    places = {file.stored_as for file in record.files.values()}
    assert names_in(store.folder) == {*places, "round.json"}
    store.put_files(TRIAL, 1, FILES.items())
    record = store.write_round(TRIAL, make_round(1), FILES)
    assert {file.stored_as for file in record.files.values()} == {""}


def test_reading_stops_at_the_first_missing_round(store: Store) -> None:
    for number in (0, 1, 3):
        store.write_round(TRIAL, make_round(number), FILES)
    assert [record.round for record in store.read_rounds(TRIAL)] == [0, 1]
    assert store.read_rounds("never-heard-of") == []
    assert store.read_trial(TRIAL) is None


def test_a_trial_reads_back_as_written(store: Store) -> None:
    for number in range(3):
        store.write_round(TRIAL, make_round(number), FILES)
    record = make_trial(store)
    store.write_trial(record)
    assert store.read_trial(TRIAL) == record
    assert (record.dense.round, record.final.round) == (0, 2)


def test_a_file_outside_the_record_is_not_read(store: Store) -> None:
    record = store.write_round(TRIAL, make_round(0), FILES)
    (Path(store.round_uri(TRIAL, 0)) / "extra.bin").write_bytes(b"x")
    assert "is not part of round 0" in refusal(lambda: store.read_file(TRIAL, record, "extra.bin"))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_a_cut_and_a_missing_file_are_noticed(store: Store, name: str) -> None:
    record = store.write_round(TRIAL, make_round(0), FILES)
    path = Path(store.round_uri(TRIAL, 0)) / name
    good = FILES[name]
    for position in {0, len(good) // 2, len(good) - 1}:
        for bit in (1, 128):
            bad = bytearray(good)
            bad[position] ^= bit
            path.write_bytes(bad)
            text = refusal(lambda: store.read_file(TRIAL, record, name))
            assert "checksum" in text
            assert str(path) in text
    for bad_length in (good[:-1], b"", good + b"\0"):
        path.write_bytes(bad_length)
        text = refusal(lambda: store.read_file(TRIAL, record, name))
        assert f"has {len(bad_length)} bytes, {len(good)} were written" in text
    path.unlink()
    assert "cannot be read" in refusal(lambda: store.read_file(TRIAL, record, name))
    path.write_bytes(good)
    assert store.read_file(TRIAL, record, name) == good


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\xff\x00" + text,
        lambda text: "[]",
        lambda text: text.replace('"accuracy"', '"acuracy"'),
        lambda text: text.replace('"num_weights": 40', '"num_weights": "many"'),
    ],
    ids=["empty", "half", "bytes", "list", "key", "value"],
)
@pytest.mark.parametrize("record", ["round_001/round.json", "trial.json"])
def test_a_damaged_record_is_refused_by_name(
    store: Store, damage: Callable[[str], str], record: str
) -> None:
    for number in range(3):
        store.write_round(TRIAL, make_round(number), FILES)
    store.write_trial(make_trial(store))
    path = Path(store.trial_uri(TRIAL)) / record
    path.write_text(damage(path.read_text()), "latin-1")
    read = store.read_trial if record == "trial.json" else store.read_rounds
    text = refusal(lambda: read(TRIAL))
    assert str(path) in text
    assert "is damaged" in text


def test_a_record_that_is_a_folder_is_refused(store: Store) -> None:
    (Path(store.round_uri(TRIAL, 0)) / "round.json").mkdir(parents=True)
    assert "cannot be read" in refusal(lambda: store.read_rounds(TRIAL))


def test_records_of_a_later_version_still_open(store: Store) -> None:
    for number in range(3):
        store.write_round(TRIAL, make_round(number), FILES)
    record = make_trial(store)
    store.write_trial(record)

    def add_fields(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                key: value if key == "unpruned" else add_fields(value)
                for key, value in node.items()
            } | {"later": [1, {}]}
        return [add_fields(value) for value in node] if isinstance(node, list) else node

    # Where keys are data and not fields (seconds, files, options), an addition is no new field.
    def grow(path: Path) -> None:
        tree = json.loads(path.read_text())
        grown = add_fields(tree)
        for one, two in zip(
            [tree, *tree.get("rounds", [])], [grown, *grown.get("rounds", [])], strict=False
        ):
            for key in ("seconds", "files", "versions", "sources", "fingerprints"):
                if key in one:
                    two[key] = one[key]
            two.pop("sha256", None)
        if "job" in grown:
            grown["job"]["workload"]["options"] = tree["job"]["workload"]["options"]
        body = json.dumps(grown, indent=1).removesuffix("\n}")
        digest = hashlib.sha256(body.encode()).hexdigest()
        path.write_text(f'{body},\n "sha256": "{digest}"\n}}\n')

    grow(Path(store.trial_uri(TRIAL)) / "trial.json")
    grow(Path(store.round_uri(TRIAL, 1)) / "round.json")
    assert store.read_trial(TRIAL) == record
    assert store.read_rounds(TRIAL) == list(record.rounds)


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=60)
@given(
    loss=finite,
    accuracy=finite,
    pruned=st.none() | st.floats(allow_nan=False),
    digest=st.text(max_size=20),
    held=st.lists(st.text(max_size=5)),
    seconds=st.dictionaries(st.text(max_size=5), finite),
)
def test_round_records_survive_json(
    loss: float,
    accuracy: float,
    pruned: float | None,
    digest: str,
    held: list[str],
    seconds: dict[str, float],
) -> None:
    record = make_round(
        1,
        loss=loss,
        accuracy=accuracy,
        loss_pruned=pruned,
        mask_digest=digest,
        held_back=tuple(held),
        seconds=seconds,
    )
    assert RoundRecord.model_validate_json(record.model_dump_json()) == record
    assert RoundRecord.model_validate(json.loads(record.model_dump_json())) == record


def test_sparsity_and_compression_are_counted() -> None:
    record = make_round(3)
    assert record.sparsity == pytest.approx(1 - 25 / 100)
    assert record.cost.compression == pytest.approx(110 / 35)
    assert [layer.sparsity for layer in record.cost.layers] == pytest.approx([0.75, 0.75])
    empty = record.cost.model_copy(update={"num_nonzero": 0})
    assert empty.compression == 110


# -- interruptions ---------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: from here on the process does nothing more."""


class Disk:
    """Counts what the store asks of the system, and fails it from the n-th request on.

    Args:
        fatal: The request that fails; None counts alone.
        error: What it fails with. After `Killed` all later requests fail, too, as a dead process
            cleans nothing up; after an OSError the disk works again.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, fatal: int | None, error: Callable[[], BaseException]
    ) -> None:
        self.count, self.fatal, self.error = 0, fatal, error
        self.failed = ""
        for module, name in (
            (os, "fsync"),
            (os, "replace"),
            (os, "link"),
            (os, "unlink"),
            (os, "mkdir"),
            (os, "fchmod"),
        ):
            patch.setattr(module, name, self._watch(getattr(module, name)))
        patch.setattr(os, "open", self._watch_open(os.open))
        patch.setattr(os, "fdopen", self._watch_file(os.fdopen))

    def request(self, name: str) -> None:
        self.count += 1
        if self.fatal is not None:
            error = self.error()
            is_dead = isinstance(error, Killed) and self.count > self.fatal
            if self.count == self.fatal or is_dead:
                self.failed = name
                raise error

    def _watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self.request(function.__name__)
            return function(*args, **options)

        return watched

    def _watch_open(self, function: Callable[..., int]) -> Callable[..., int]:
        def watched(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & os.O_CREAT:
                self.request("open")
            return function(path, flags, *args, **options)

        return watched

    def _watch_file(self, fdopen: Callable[..., Any]) -> Callable[..., Any]:
        disk = self

        class Halting:
            def __init__(self, *args: Any) -> None:
                self._file = fdopen(*args)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *exception: object) -> None:
                self._file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def write(self, data: bytes) -> int:
                # Half of it reaches the disk before the request fails.
                self._file.write(data[: len(data) // 2])
                self._file.flush()
                disk.request("write")
                return self._file.write(data[len(data) // 2 :])

        return Halting


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves flushing out: it takes 20 ms a file, and no power fails here."""

    def fsync(handle: int) -> None:
        pass

    monkeypatch.setattr(os, "fsync", fsync)


def no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def not_allowed() -> OSError:
    return OSError(errno.EACCES, os.strerror(errno.EACCES))


def commit_all(store: Store) -> None:
    store.claim(make_job())
    for number in range(len(store.read_rounds(TRIAL)), 3):
        store.write_round(TRIAL, make_round(number), FILES)
    store.write_trial(make_trial(store))


def count_requests(store: Store) -> int:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, None, Killed)
        commit_all(store)
        return disk.count


def check_whole_or_nothing(store: Store) -> int:
    """Reads all that a reader would, and returns how many rounds there are."""
    rounds = store.read_rounds(TRIAL)
    for record in rounds:
        for name, data in FILES.items():
            assert store.read_file(TRIAL, record, name) == data
    if (trial := store.read_trial(TRIAL)) is not None:
        assert trial.rounds == tuple(rounds)
        assert len(rounds) == 3
    return len(rounds)


@pytest.mark.usefixtures("quick_disk")
def test_a_kill_at_any_moment_leaves_whole_rounds_and_a_rerun_repairs(tmp_path: Path) -> None:
    total = count_requests(Store(tmp_path / "count", "try"))
    assert total > 60, "the store is not being watched"
    seen = set()
    for moment in range(1, total + 1):
        store = Store(tmp_path / str(moment), "try")
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, moment, Killed)
            with pytest.raises(Killed):
                commit_all(store)
        seen.add(check_whole_or_nothing(store))
        commit_all(store)
        assert check_whole_or_nothing(store) == 3
        assert store.read_trial(TRIAL) is not None
        assert names_in(Path(store.trial_uri(TRIAL)) / "round_001") == {*FILES, "round.json"}
    assert seen == {0, 1, 2, 3}


@pytest.mark.usefixtures("quick_disk")
def test_a_kill_beside_the_files_of_a_dead_driver_leaves_whole_rounds(tmp_path: Path) -> None:
    moment = 0
    is_over = False
    other = {name: data + b"new" for name, data in FILES.items()}
    while not is_over:
        moment += 1
        store = Store(tmp_path / str(moment), "try")
        store.write_round(TRIAL, make_round(0), FILES)
        store.put_files(TRIAL, 1, FILES.items())
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, moment, Killed)
            try:
                store.write_round(TRIAL, make_round(1), other)
                is_over = True
            except Killed:
                pass
        records = store.read_rounds(TRIAL)
        assert records[0].round == 0
        for record in records[1:]:
            for name in FILES:
                store.read_file(TRIAL, record, name)
    assert moment > 15


@pytest.mark.parametrize("error", [no_room, not_allowed])
@pytest.mark.usefixtures("quick_disk")
def test_a_failing_disk_is_a_store_error_that_leaves_nothing_half_written(
    tmp_path: Path, error: Callable[[], OSError]
) -> None:
    total = count_requests(Store(tmp_path / "count", "try"))
    messages = []
    for moment in range(1, total + 1):
        store = Store(tmp_path / str(moment), "try")
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, moment, error)
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    commit_all(store)
                # What is there already does not have to be made, what has finished has finished.
                assert disk.failed == "mkdir" or "has finished" in str(caught[0].message)
            except StoreError as failure:
                messages.append((store.folder, str(failure)))
        assert not [name for name in names_in(store.folder) if name.startswith(".")]
        check_whole_or_nothing(store)
        commit_all(store)
        assert check_whole_or_nothing(store) == 3
    assert len(messages) > total * 0.8
    expected = "no room on disk" if error is no_room else "cannot write"
    for folder, message in messages:
        assert str(folder) in message
        assert expected in message


def test_an_interrupt_while_writing_leaves_no_temporary_file(store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.write_round(TRIAL, make_round(0), FILES)
    assert names_in(store.folder) == set()


def test_leftovers_of_a_killed_writer_are_no_results_and_are_cleared(store: Store) -> None:
    folder = Path(store.round_uri(TRIAL, 0))
    folder.mkdir(parents=True)
    (folder / ".weights.safetensors.abcdefgh").write_bytes(b"half")
    (folder / ".round.json.xyzxyz12").write_bytes(b"{}")
    assert store.read_rounds(TRIAL) == []
    with pytest.raises(StoreError):
        locate_trials(store.folder)
    for number in range(3):
        store.write_round(TRIAL, make_round(number), FILES)
    (Path(store.trial_uri(TRIAL)) / ".trial.json.xyzxyz12").write_bytes(b"{}")
    store.write_trial(make_trial(store))
    assert names_in(store.folder) == {*FILES, "round.json", "trial.json", "index.parquet"}
    assert check_whole_or_nothing(store) == 3


def test_a_file_that_vanishes_while_it_is_written_is_explained(store: Store) -> None:
    def vanish(handle: int) -> None:
        for path in store.folder.rglob(".weights*"):
            path.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", vanish)
        text = refusal(lambda: store.write_round(TRIAL, make_round(0), FILES))
    assert "is another process running this job?" in text
    assert store.read_rounds(TRIAL) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=777", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system of 64 kB needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    store = Store(tiny_disk, "try")
    store.claim(make_job())
    store.write_round(TRIAL, make_round(0), FILES)
    big = FILES | {"weights.safetensors": b"w" * 200_000}
    text = refusal(lambda: store.write_round(TRIAL, make_round(1), big))
    assert "no room on disk" in text
    assert str(store.folder) in text
    assert "MB are free" in text
    assert check_whole_or_nothing(store) == 1
    assert not [name for name in names_in(store.folder) if name.startswith(".")]
    # The disk is not left full: what fits, fits.
    store.write_round(TRIAL, make_round(1), FILES)
    assert check_whole_or_nothing(store) == 2


def test_a_disk_that_is_read_only(tiny_disk: Path) -> None:
    store = Store(tiny_disk, "try")
    store.claim(make_job())
    store.write_round(TRIAL, make_round(0), FILES)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    assert "cannot write" in refusal(lambda: store.write_round(TRIAL, make_round(1), FILES))
    assert "cannot write" in refusal(lambda: Store(tiny_disk, "new").claim(make_job()))
    store.claim(make_job())
    assert check_whole_or_nothing(store) == 1


# -- finding ---------------------------------------------------------------------------------------


def test_trials_are_found_from_every_folder_above(tmp_path: Path) -> None:
    for job, trial in (("a", "one"), ("a", "two"), ("b", "one")):
        store = Store(tmp_path, job)
        store.claim(make_job(name=job))
        store.write_round(trial, make_round(0), FILES)
    (tmp_path / "a" / "trials" / "empty").mkdir()
    (tmp_path / "unrelated").mkdir()

    def found(uri: str | Path) -> list[tuple[str, str]]:
        return [(store.folder.name, trial) for store, trial in locate_trials(uri)]

    assert found(tmp_path) == [("a", "one"), ("a", "two"), ("b", "one")]
    assert found(tmp_path / "a") == [("a", "one"), ("a", "two")]
    assert found(tmp_path / "a" / "trials" / "two") == [("a", "two")]
    assert found(f"file://{tmp_path}/b") == [("b", "one")]
    assert found(f"{tmp_path}/a/trials/two/round_000/..") == [("a", "two")]
    for store, trial in locate_trials(tmp_path):
        assert len(store.read_rounds(trial)) == 1


def test_trials_are_found_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, "try")
    store.write_round(TRIAL, make_round(0), FILES)
    monkeypatch.chdir(Path(store.round_uri(TRIAL, 0)))
    assert [name for _, name in locate_trials("..")] == [TRIAL]
    monkeypatch.chdir(Path(store.trial_uri(TRIAL)))
    assert [name for _, name in locate_trials(".")] == [TRIAL]


def test_a_folder_without_results_says_so(tmp_path: Path) -> None:
    assert "no such folder" in refusal(lambda: locate_trials(tmp_path / "nowhere"))
    assert "holds no results" in refusal(lambda: locate_trials(tmp_path))
    (tmp_path / "file").write_text("")
    assert "no such folder" in refusal(lambda: locate_trials(tmp_path / "file"))
    assert refusal(lambda: locate_trials("a\0b"))
    assert refusal(lambda: locate_trials("~no-such-user-here"))
    (tmp_path / "trials" / "t").mkdir(parents=True)
    assert "holds no results" in refusal(lambda: locate_trials(tmp_path / "trials" / "t"))
