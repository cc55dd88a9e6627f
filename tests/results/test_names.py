"""Names and links inside results: none leads outside, and what others wrote is left alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from sample_results import sample_job, sample_round, write_trial
from shell import Shell

from gbp_ray.config.address import S3Address
from gbp_ray.errors import BusyError, StoreError
from gbp_ray.results.lease import hold_lease, is_held
from gbp_ray.results.maintenance import fetch_results, find_faults, find_garbage, remove_garbage
from gbp_ray.results.objects import check_key, is_key
from gbp_ray.results.records import seal_record
from gbp_ray.results.store import Store, open_objects

BAD_NAMES = (
    *("..", ".", "", "/", "../x", "a/../../x", "a/..", "/etc/x", "//x", "a//b", "a/", "./a", "a/."),
    *("C:x", "c:/x", "a\\b", "..\\x", "a\0b", "a\nb", "\x1b[2Jx", "a\u202eb", "\ud800"),
    *("x" * 201, "/".join(["x" * 100] * 10), ".x.abcdefgh", "a/.x.json.0a1b2c3d"),
)
GOOD_NAMES = ("a", "a b/c+ü", "shards/x.safetensors", "...", "a..b", ".probe-1", "x" * 200)


def seal(tree: dict[str, Any]) -> bytes:
    """Seals any tree as a record: seals are no proof of who wrote it."""
    body = json.dumps(tree, indent=1).removesuffix("\n}").encode()
    return body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def unseal(data: bytes) -> dict[str, Any]:
    tree = json.loads(data)
    del tree["sha256"]
    return dict(tree)


def picture(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: bytes of files, targets of links."""
    found: dict[str, bytes | str] = {}
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(place) / name
            if path.is_symlink():
                found[str(path)] = str(path.readlink())
            elif path.is_file():
                found[str(path)] = path.read_bytes()
    return found


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(StoreError) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 1500
    return str(caught.value)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_outside_is_refused_everywhere(tmp_path: Path, name: str) -> None:
    assert not is_key(name)
    refusal(lambda: check_key(name))
    objects = open_objects(tmp_path / "store")
    below = f"trials/{name}"
    for key in (name, below) if name else (below,):
        for action in (
            lambda key=key: objects.get(key),
            lambda key=key: objects.put(key, b"x"),
            lambda key=key: objects.put_if(key, b"x", None),
            lambda key=key: objects.put_new(key, b"x"),
            lambda key=key: objects.delete([key]),
            lambda key=key: objects.exists(key),
            lambda key=key: hold_lease(objects, key).__enter__(),
        ):
            refusal(action)
    assert picture(tmp_path) == {}


def test_other_names_are_taken(tmp_path: Path) -> None:
    objects = open_objects(tmp_path)
    for name in GOOD_NAMES:
        objects.put(f"in/{check_key(name)}", b"x")
    assert {entry.key for entry in objects.entries()} == {f"in/{name}" for name in GOOD_NAMES}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_record_with_such_a_name_is_damaged(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path, "try")
    trial = write_trial(store, sample_job())
    store.write_shared("explained/x", {"findings.json": b"{}"}, {})
    for key in (f"trials/{trial}/round_001/round.json", "explained/x/shared.json"):
        good = store.objects.get(key) or b""
        tree = unseal(good)
        first = next(iter(tree["files"]))
        for files in (
            {name: tree["files"][first]},
            {first: tree["files"][first] | {"stored_as": name}} if name else {"": {}},
        ):
            store.objects.put(key, seal(tree | {"files": files}))
            assert "is damaged" in refusal(
                lambda: (store.read_round(trial, 1), store.read_shared("explained/x"))
            )
        store.objects.put(key, good)
    key = f"trials/{trial}/trial.json"
    store.objects.put(key, seal(unseal(store.objects.get(key) or b"") | {"trial_id": name}))
    assert "is damaged" in refusal(lambda: store.read_trial(trial))


def test_a_record_of_something_else_is_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path, "try")
    trial = write_trial(store, sample_job())
    other = write_trial(store, sample_job(sparsity=0.9))
    store.objects.put(
        f"trials/{trial}/trial.json", store.objects.get(f"trials/{other}/trial.json") or b""
    )
    assert f"trial_id is {other}" in refusal(lambda: store.read_trial(trial))
    data = store.objects.get(f"trials/{other}/round_002/round.json") or b""
    store.objects.put(f"trials/{trial}/round_001/round.json", data)
    assert "round is 2" in refusal(lambda: store.read_round(trial, 1))
    assert len(find_faults(tmp_path).faults) >= 2


def test_a_hostile_bucket_writes_nothing_outside(moto_storage: str, tmp_path: Path) -> None:
    address = S3Address.parse(moto_storage)
    client = boto3.client("s3", endpoint_url=address.endpoint, region_name="us-east-1")
    store = Store(moto_storage, "try")
    write_trial(store, sample_job())
    record, files = sample_round(0, 0.0, 0)
    for job, trial in (("..", "x"), ("try", ".."), ("try", "a\\b"), ("../..", "x")):
        for name, data in files.items():
            key = f"{address.prefix}/{job}/trials/{trial}/round_000/{name}"
            client.put_object(Bucket=address.bucket, Key=key, Body=data)
        written = {n: {"num_bytes": 1, "sha256": "0" * 64} for n in files}
        tree = unseal(seal_record(record)) | {"files": written}
        key = f"{address.prefix}/{job}/trials/{trial}/round_000/round.json"
        client.put_object(Bucket=address.bucket, Key=key, Body=seal(tree))
    before = picture(tmp_path)
    fetched = fetch_results(moto_storage, tmp_path / "a" / "b" / "to")
    assert fetched.num_trials == 1
    assert set(map(str, tmp_path.iterdir())) == {str(tmp_path / "a")}
    assert {name for name in picture(tmp_path) if "/a/b/to/try/" not in name} == set(before)


# -- links -----------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody's, which must stay as it is."""
    folder = tmp_path / "outside"
    (folder / "round_001").mkdir(parents=True)
    for name in ("driver.lock", "state.pt", "round_001/weights.safetensors", ".x.abcdefgh"):
        (folder / name).write_bytes(b"precious")
    return folder


PLACES = ("try", "try/trials", "try/trials/T", "try/trials/T/round_001", "try/unindexed")


@pytest.mark.parametrize("place", PLACES)
def test_no_link_is_followed_out_of_a_storage(tmp_path: Path, outside: Path, place: str) -> None:
    source = Store(tmp_path / "from", "try")
    trial = write_trial(source, sample_job())
    link = tmp_path / "to" / place.replace("T", trial)
    store = Store(tmp_path / "to", "try")
    if place != "try":
        store.claim(sample_job())
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    before = picture(outside)
    text = refusal(lambda: fetch_results(tmp_path / "from", tmp_path / "to"))
    assert "symbolic link" in text
    refusal(lambda: write_trial(store, sample_job()))
    with pytest.warns(UserWarning, match="symbolic link and is left out"):
        open_objects(link.parent).list_folders()
    assert picture(outside) == before


def test_removal_follows_no_link_and_loops_end(tmp_path: Path, outside: Path) -> None:
    store = Store(tmp_path / "results", "try")
    trial = write_trial(store, sample_job(), num_rounds=1)
    folder = Path(store.trial_uri(trial))
    for place in ("round_001", "round_000/shards", "loop/loop", "x"):
        (folder / place).parent.mkdir(exist_ok=True)
    (folder / "round_001").symlink_to(outside / "round_001")
    (folder / "x").symlink_to(outside)
    (folder / "loop" / "loop").symlink_to(folder)
    (folder / "state.pt").symlink_to(outside / "state.pt")
    (folder / "driver.lock").symlink_to(outside / "driver.lock")
    (store.folder / "dense").symlink_to(outside)
    (folder / "notes.txt").write_text("mine")
    (folder / "round_000" / "notes.json").write_text("mine")
    before = picture(outside)
    for is_unfinished_too in (False, True):
        found = find_garbage(store.uri, is_unfinished_too=is_unfinished_too)
        assert not [item for item in found if "notes" in item.uri or "outside" in item.uri]
        refusal(lambda found=found: (remove_garbage(found), store.hold(trial).__enter__()))
    assert picture(outside) == before
    assert (folder / "notes.txt").exists()
    assert (folder / "round_000" / "notes.json").exists()


def test_a_lock_that_is_a_link_empties_nothing(tmp_path: Path, outside: Path) -> None:
    objects = open_objects(tmp_path / "results")
    (tmp_path / "results/trials/t").mkdir(parents=True)
    (tmp_path / "results/trials/t/driver.lock").symlink_to(outside / "driver.lock")
    assert "symbolic link" in refusal(lambda: hold_lease(objects, "trials/t").__enter__())
    assert not is_held(objects, "trials/t")
    assert (outside / "driver.lock").read_bytes() == b"precious"


def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    store = Store(tmp_path, "try")
    trial = write_trial(store, sample_job())
    path = Path(store.round_uri(trial, 1)) / "round.json"
    path.unlink()
    os.mkfifo(path)
    assert "no regular file" in refusal(lambda: store.read_rounds(trial))
    path.unlink()
    path.symlink_to(path.with_name("weights.safetensors"))
    assert "symbolic link" in refusal(lambda: store.read_rounds(trial))
    assert find_faults(tmp_path).faults


def test_the_storage_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "disk")
    write_trial(Store(tmp_path / "results", "try"), sample_job())
    assert find_faults(tmp_path / "results").faults == []
    assert fetch_results(tmp_path / "results", tmp_path / "copy").num_rounds == 3


def test_folders_nested_without_end_are_refused(tmp_path: Path) -> None:
    place = tmp_path
    for _ in range(60):
        place = place / "d"
        place.mkdir()
    (place / "x").write_text("")
    assert "nested" in refusal(lambda: list(open_objects(tmp_path).entries()))


# -- what is there already -------------------------------------------------------------------------


def test_fetch_replaces_no_other_results_of_a_trial(tmp_path: Path) -> None:
    source, target = Store(tmp_path / "from", "try"), Store(tmp_path / "to", "try")
    trial = write_trial(source, sample_job())
    write_trial(target, sample_job())
    for number in (0, 1):
        path = Path(target.round_uri(trial, number)) / "round.json"
        tree = unseal(path.read_bytes())
        path.write_bytes(seal(tree | {"loss": 9.0}))
    before = picture(tmp_path / "to")
    text = refusal(lambda: fetch_results(tmp_path / "from", tmp_path / "to"))
    assert "holds other results of the same trial" in text
    assert picture(tmp_path / "to") == before


def test_fetch_leaves_a_running_trial_alone(tmp_path: Path) -> None:
    source, target = Store(tmp_path / "from", "try"), Store(tmp_path / "to", "try")
    trial = write_trial(source, sample_job())
    target.claim(sample_job())
    with target.hold(trial), pytest.raises(BusyError):
        fetch_results(tmp_path / "from", tmp_path / "to")
    assert target.read_rounds(trial) == []
    assert fetch_results(tmp_path / "from", tmp_path / "to").num_rounds == 3


def test_shards_of_what_trials_share_are_no_garbage(tmp_path: Path) -> None:
    store = Store(tmp_path, "try")
    write_trial(store, sample_job())
    store.write_shared("dense/h", {"shards/0.safetensors": b"rows"}, {})
    assert find_garbage(store.uri) == []


# -- reports ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_report_removes_what_a_report_wrote_and_nothing_else(
    tmp_path: Path, shell: Shell
) -> None:
    write_trial(Store(tmp_path / "results", "try"), sample_job())
    page = tmp_path / "page"
    report = ("report", str(tmp_path / "results"), "--to", str(page))
    assert shell(*report).code == 0
    first = set(picture(page))
    (page / "index.html").write_bytes(
        (page / "index.html").read_bytes().replace(b'content="', b'content="gone.png=0 ', 1)
    )
    assert shell(*report).code == 0
    assert set(picture(page)) == first
    (tmp_path / "thesis.tex").write_text("mine")
    digest = hashlib.sha256(b"mine").hexdigest()[:16]
    for number, name in enumerate(("thesis.tex", f"{tmp_path}/thesis.tex", "../thesis.tex")):
        folder = tmp_path / f"crafted{number}"
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine, too")
        mark = f'<meta name="gbp-ray-report" content="index.html {name}={digest} {name}">'
        (folder / "index.html").write_text(mark)
        assert shell("report", report[1], "--to", str(folder)).code == 2
        assert (folder / "thesis.tex").read_text() == "mine, too"
    (folder / "thesis.tex").unlink()
    assert shell("report", report[1], "--to", str(folder)).code == 0
    assert (tmp_path / "thesis.tex").read_text() == "mine"
