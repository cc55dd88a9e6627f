"""Verify finds whatever was altered and names it; gc takes what is dead and nothing else."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load, save
from sample_results import copy_results, sample_job, sample_round, write_trial

from gbp_ray.config.address import S3Address
from gbp_ray.errors import StoreError
from gbp_ray.results.index import INDEX, _dump, read_stored
from gbp_ray.results.maintenance import fetch_results, find_faults, find_garbage, remove_garbage
from gbp_ray.results.query import open_results
from gbp_ray.results.records import FailureRecord, StopRecord, seal_record
from gbp_ray.results.store import Store
from gbp_ray.results.tensors import count_nonzero


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("written"), "try")
    write_trial(store, sample_job())
    write_trial(store, sample_job(sparsity=0.9))
    return store


@pytest.fixture
def store(storage: str, written: Store) -> Store:
    """Two trials, copied: that they are written alike anywhere is tested elsewhere."""
    return copy_results(written, storage)


def read_all(store: Store) -> None:
    """Reads as a reader does, with no intention to verify."""
    store.read_claim()
    open_results(store.uri)
    for trial in store.objects.list_folders("trials/"):
        store.read_trial(trial)
        for record in store.read_rounds(trial):
            for name in record.files:
                store.read_file(trial, record, name)


# -- verify ----------------------------------------------------------------------------------------


def test_whole_results_are_as_claimed(store: Store) -> None:
    audit = find_faults(store.uri)
    assert audit.faults == []
    assert (audit.num_jobs, audit.num_trials, audit.num_rounds, audit.num_files) == (1, 2, 6, 18)
    assert audit.num_bytes == sum(
        entry.num_bytes
        for entry in store.objects.entries()
        if entry.key.endswith((".pt", "tensors"))
    )


def test_a_flipped_byte_in_any_object_is_found_named_and_refused(storage: str) -> None:
    # Every byte of the records on a folder; elsewhere, where it takes longer, one of each object.
    store = Store(storage, "try")
    write_trial(store, sample_job())
    draws = random.Random(4)
    is_folder = store.folder is not None
    kinds = set()
    for entry in list(store.objects.entries()):
        good = store.objects.get(entry.key) or b""
        assert good
        # On a server, where all is slower, one of each kind of file.
        kind = entry.key.rpartition("/")[2]
        if kind in kinds and not is_folder:
            continue
        kinds.add(kind)
        is_record = entry.key.endswith(".json")
        places = draws.sample(range(len(good)), 20 if is_folder and is_record else 1)
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << draws.randrange(8)
            store.objects.put(entry.key, bytes(bad))
            faults = find_faults(store.uri).faults
            assert store.objects.uri_of(entry.key) in [uri for uri, _ in faults], (place, faults)
            with pytest.raises(StoreError, match=r"is damaged|checksum|bytes"):
                read_all(store)
        store.objects.put(entry.key, good)
    assert find_faults(store.uri).faults == []
    read_all(store)


def test_what_a_sweep_and_shards_add_is_checked_and_refused_too(storage: str) -> None:
    store = Store(storage, "try")
    write_trial(store, sample_job())
    broken = write_trial(store, sample_job(sparsity=0.9), num_rounds=1)
    record, files = sample_round(1, 0.9, 0)
    shards = {
        f"shards/{name}": b"a part of the network" for name in ("0.safetensors", "state.json")
    }
    store.write_round(broken, record, files | shards)
    store.write_failure(FailureRecord(trial_id=broken, cause="out of luck", round=0))
    store.write_stop(StopRecord(trial_id=broken, round=0, scheduler="asha"))
    dense, dense_files = sample_round(0, 0.0, 0)
    store.write_shared("dense/de45e0", dense_files, {"seed": 0}, dense)
    store.write_shared("scores/5c04e5", {"scores.safetensors": b"the scores"}, {"seed": 0})

    def read_besides() -> None:
        for item in store.read_rounds(broken):
            for name in item.files:
                store.read_file(broken, item, name)
        store.read_failure(broken)
        store.read_stop(broken)
        for folder in ("dense/de45e0", "scores/5c04e5"):
            assert store.read_shared(folder) is not None

    read_besides()
    assert find_faults(store.uri).faults == []
    draws = random.Random(5)
    kept = (f"trials/{broken}/", "scores/", "dense/")
    names = {entry.key for entry in store.objects.entries() if entry.key.startswith(kept)}
    names -= {key for key in names if "/round_000/" in key}
    assert {key.rpartition("/")[2] for key in names} == {
        *("weights.safetensors", "masks.safetensors", "state.pt", "round.json"),
        *("0.safetensors", "state.json", "failure.json", "stopped.json"),
        *("scores.safetensors", "shared.json"),
    }
    good = {key: store.objects.get(key) or b"" for key in sorted(names)}
    bad = {key: bytearray(data) for key, data in good.items()}
    for key, data in bad.items():
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        store.objects.put(key, bytes(data))
        with pytest.raises(StoreError, match=r"is damaged|checksum|bytes"):
            read_besides()
        store.objects.put(key, good[key])
    # Found all at once; but a damaged record hides what is wrong with its files.
    kinds = ("/round.json", "/failure.json", "/stopped.json", "/shared.json")
    records = {key for key in names if key.endswith(kinds)}
    for damaged in (names - records, records):
        for key in damaged:
            store.objects.put(key, bytes(bad[key]))
        for place, prefix in ((store.uri, ""), (store.trial_uri(broken), "trials/")):
            found = {uri for uri, _ in find_faults(place).faults}
            wanted = {store.objects.uri_of(key) for key in damaged if key.startswith(prefix)}
            assert wanted <= found
        for key in damaged:
            store.objects.put(key, good[key])
    assert find_faults(store.uri).faults == []


def test_a_missing_object_is_found_and_named(store: Store) -> None:
    trial = store.objects.list_folders("trials/")[0]
    for name in ("weights.safetensors", "state.pt", "round.json"):
        key = f"trials/{trial}/round_001/{name}"
        good = store.objects.get(key) or b""
        store.objects.delete([key])
        ((uri, fault), *_) = find_faults(store.uri).faults
        assert uri.startswith(store.round_uri(trial, 1).partition("?")[0])
        assert "missing" in fault or "no such file" in fault
        store.objects.put(key, good)
    key = f"trials/{trial}/trial.json"
    store.objects.delete([key])
    ((uri, fault),) = find_faults(store.uri).faults
    assert (uri, trial in fault) == (store.objects.uri_of("index.parquet"), True)


def test_an_index_of_an_earlier_version_is_no_fault_and_a_spoiled_one_is(store: Store) -> None:
    table = read_stored(store.objects)
    assert table is not None
    store.objects.put(INDEX, _dump(table.drop_columns(["loss_recalibrated"])))
    assert find_faults(store.uri).faults == []
    loss = table.column_names.index("loss")
    words = table.set_column(loss, "loss", pa.array(["low"] * len(table)))
    store.objects.put(INDEX, _dump(words))
    assert [uri for uri, _ in find_faults(store.uri).faults] == [store.objects.uri_of(INDEX)]


def test_a_sparsity_that_is_not_in_the_weights_is_found(tmp_path: Path) -> None:
    # All checksums are right; the claim is not.
    store = Store(tmp_path, "try")
    trial = write_trial(store, sample_job())
    record = store.read_rounds(trial)[2]
    files = {name: store.read_file(trial, record, name) for name in record.files}
    weights = load(files["weights.safetensors"])
    zero = np.flatnonzero(weights["a.weight"].reshape(-1) == 0)[0]
    weights["a.weight"].reshape(-1)[zero] = 1e-30
    finished = store.read_trial(trial)
    assert finished is not None
    # Nothing that is committed is ever replaced, so it goes first.
    kept = ("weights.safetensors", "round.json", "../trial.json")
    for path in (Path(store.round_uri(trial, 2), name) for name in kept):
        path.unlink()
    written = store.write_round(trial, record, files | {"weights.safetensors": save(weights)})
    store.write_trial(finished.model_copy(update={"rounds": (*finished.rounds[:2], written)}))
    faults = find_faults(tmp_path).faults
    assert [fault for _, fault in faults] == [
        "'a.weight' has 21 weights other than zero, 20 are claimed",
        "'a.weight' has weights that its mask removes",
    ]
    assert {uri for uri, _ in faults} == {store.round_uri(trial, 2)}


def test_records_that_disagree_are_found(tmp_path: Path) -> None:
    store = Store(tmp_path, "try")
    trial = write_trial(store, sample_job())
    finished = store.read_trial(trial)
    assert finished is not None
    better = finished.rounds[2].model_copy(update={"score": 1.0})
    boast = finished.model_copy(update={"rounds": (*finished.rounds[:2], better)})
    store.objects.put(f"trials/{trial}/trial.json", seal_record(boast))
    faults = [fault for _, fault in find_faults(tmp_path).faults]
    assert faults[0] == "does not agree with the record of round 2"
    assert "does not agree with the record of trial" in faults[1]


def test_zeros_are_counted_in_every_type() -> None:
    values = np.array([0.0, -0.0, 1.0, -2.0, np.nan, 1e-45])
    for kind, expected in (("float64", 4), ("float32", 4), ("float16", 3), ("int8", 2)):
        with np.errstate(all="ignore"):
            data = save(
                {"w": np.nan_to_num(values, nan=1 if kind == "int8" else np.nan).astype(kind)}
            )
        found = count_nonzero(data, "here")["w"]
        assert found == ((6,), expected + (kind == "int8"))


# -- gc --------------------------------------------------------------------------------------------


def leave_garbage(store: Store) -> tuple[str, set[str]]:
    """Leaves what a killed driver leaves; gives its trial and the names of it all."""
    trial = write_trial(store, sample_job(seed=7), num_rounds=2)
    left = {
        f"trials/{trial}/round_002/weights.safetensors": b"w" * 100,
        f"trials/{trial}/round_002/masks.safetensors": b"m" * 10,
        f"unindexed/{trial}": b"",
        f"ray/{trial}/ray-file": b"r",
        f"trials/{trial}/driver.{'json' if store.folder is None else 'lock'}": (
            b'{"driver": "x", "machine": null}'
        ),
    }
    for key, data in left.items():
        store.objects.put(key, data)
    return trial, set(left)


def test_garbage_is_listed_then_removed_and_the_job_goes_on(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(storage, "try")
    write_trial(store, sample_job())
    whole = {entry.key for entry in store.objects.entries()}
    trial, left = leave_garbage(store)
    monkeypatch.setattr("gbp_ray.results.lease.DEAD_S", -1.0)
    before = {entry.key for entry in store.objects.entries()}
    found = find_garbage(store.uri)
    assert {item.key for item in found} == left
    assert {entry.key for entry in store.objects.entries()} == before, "listing changed something"
    assert {item.key for item in remove_garbage(found)} == left
    assert {entry.key for entry in store.objects.entries()} == before - left
    assert find_garbage(store.uri) == []
    assert find_faults(store.uri).faults == []
    assert len(store.read_rounds(trial)) == 2
    unfinished = find_garbage(store.uri, is_unfinished_too=True)
    assert {item.key for item in unfinished} == before - left - whole
    remove_garbage(unfinished)
    assert {entry.key for entry in store.objects.entries()} == whole


def test_of_what_trials_share_only_the_uncommitted_and_abandoned_is_garbage(storage: str) -> None:
    store = Store(storage, "try")
    write_trial(store, sample_job())
    store.write_shared("dense/whole", {"weights.safetensors": b"weights"}, {})
    store.objects.put("dense/dead/weights.safetensors", b"weights")
    store.objects.put("scores/live/scores.safetensors", b"scores")
    with store.await_lease("scores/live"):
        found = find_garbage(store.uri)
        assert [item.key for item in found] == ["dense/dead/weights.safetensors"]
        assert len(remove_garbage(found)) == 1
    assert store.read_shared("dense/whole") is not None
    assert [item.key for item in find_garbage(store.uri)] == ["scores/live/scores.safetensors"]


def test_what_a_live_driver_works_on_is_left_alone(storage: str) -> None:
    store = Store(storage, "try")
    trial = write_trial(store, sample_job(), num_rounds=1)
    store.objects.put(f"trials/{trial}/round_001/weights.safetensors", b"w")
    found = find_garbage(store.uri)
    assert len(found) == 1
    with store.hold(trial):
        assert find_garbage(store.uri, is_unfinished_too=True) == []
        assert remove_garbage(found) == []
    store.objects.put(f"trials/{trial}/round_001/round.json", b"committed")
    assert remove_garbage(found) == [], "a round that was committed since was taken"
    assert store.objects.exists(f"trials/{trial}/round_001/weights.safetensors")


def test_shards_of_a_round_belong_to_it(storage: str) -> None:
    store = Store(storage, "try")
    trial = write_trial(store, sample_job(), num_rounds=1)
    shard = f"trials/{trial}/round_001/shards/__0_0.safetensors"
    store.objects.put(shard, b"rows")
    assert [item.key for item in find_garbage(store.uri)] == [shard]
    store.objects.put(f"trials/{trial}/round_001/round.json", b"committed")
    assert find_garbage(store.uri) == []


def test_folders_that_merely_look_like_results_are_left_alone(tmp_path: Path) -> None:
    write_trial(Store(str(tmp_path), "try"), sample_job())
    theirs = tmp_path / "other" / "trials" / "r1" / "round_9" / "x"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    assert find_garbage(str(tmp_path), is_unfinished_too=True) == []
    for place in (str(tmp_path / "other"), "", " "):
        with pytest.raises(StoreError, match=r"holds no results|must name a folder"):
            find_garbage(place)


def test_interrupted_writes_are_garbage(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(storage, "try")
    trial = write_trial(store, sample_job(), num_rounds=1)
    if store.folder is not None:
        (store.folder / f"trials/{trial}/round_000/.weights.safetensors.x1y2x1y2").write_bytes(
            b"w" * 9
        )
    else:
        address = S3Address.parse(store.uri)
        client = boto3.client("s3", endpoint_url=address.endpoint, region_name="us-east-1")
        key = f"{address.prefix}/trials/{trial}/round_000/weights.safetensors"
        begun = client.create_multipart_upload(Bucket=address.bucket, Key=key)
        client.upload_part(
            Bucket=address.bucket,
            Key=key,
            UploadId=begun["UploadId"],
            PartNumber=1,
            Body=b"w" * 9,
        )
    (item,) = find_garbage(store.uri)
    assert (item.num_bytes, item.why) == (9, "its writing never ended")
    assert item.uri == store.objects.uri_of(f"trials/{trial}/round_000/weights.safetensors")
    assert remove_garbage([item]) == [item]
    assert find_garbage(store.uri) == []
    assert find_faults(store.uri).faults == []


# -- fetch -----------------------------------------------------------------------------------------


def test_fetched_results_are_the_same_and_are_fetched_once(
    store: Store, storage: str, tmp_path: Path
) -> None:
    write_trial(store, sample_job(seed=7), num_rounds=2)
    fetched = fetch_results(storage, tmp_path / "copy")
    assert (fetched.num_trials, fetched.num_rounds) == (3, 8)
    copy = Store(tmp_path / "copy", "try")
    here = {entry.key: copy.objects.get(entry.key) for entry in copy.objects.entries()}
    there = {entry.key: store.objects.get(entry.key) for entry in store.objects.entries()}
    assert here == there
    assert fetch_results(storage, tmp_path / "copy").num_rounds == 0
    path = tmp_path / "copy/try/trials" / store.objects.list_folders("trials/")[0]
    (path / "round_001/state.pt").write_bytes(b"damaged")
    assert fetch_results(storage, tmp_path / "copy").num_rounds == 1
    assert find_faults(tmp_path / "copy").faults == []


def test_damage_is_not_fetched(tmp_path: Path) -> None:
    store = Store(tmp_path / "from", "try")
    trial = write_trial(store, sample_job())
    (Path(store.round_uri(trial, 1)) / "state.pt").write_bytes(b"x" * 64)
    with pytest.raises(StoreError, match="does not match its checksum"):
        fetch_results(tmp_path / "from", tmp_path / "to")
    with contextlib.suppress(StoreError):
        assert find_faults(tmp_path / "to").faults == []
    assert len(Store(tmp_path / "to", "try").read_rounds(trial)) == 1
