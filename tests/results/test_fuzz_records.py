"""Stored bytes that anybody may have written: readers raise our own errors or read them whole.

GBP_RAY_FUZZ asks for another number of inputs of each kind.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from sample_results import sample_job, sample_round, write_trial
from test_names import BAD_NAMES, picture, seal, unseal

from gbp_ray.errors import StoreError, printable
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.results import lease
from gbp_ray.results.findings import Findings
from gbp_ray.results.index import INDEX, _dump, tabulate
from gbp_ray.results.maintenance import fetch_results, find_faults, find_garbage
from gbp_ray.results.query import open_results
from gbp_ray.results.records import (
    FailureRecord,
    FinalTest,
    JobRecord,
    RoundRecord,
    SharedRecord,
    StopRecord,
    TrialRecord,
    parse_record,
    seal_record,
)
from gbp_ray.results.store import Store
from gbp_ray.results.tensors import (
    count_nonzero,
    digest_masks,
    find_revived,
    read_mask_file,
    read_weight,
)

NUM_INPUTS = int(os.environ.get("GBP_RAY_FUZZ", "150"))
NUM_SLOW = int(os.environ.get("GBP_RAY_FUZZ", "10"))
"""Of those that take tens of milliseconds."""


def nest(depth: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(depth):
        tree = [tree]
    return tree


JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308),
    *(float("inf"), float("nan"), "", "x", "x" * 3000, "\ud800", "\x1b[2J", "a\nb\0", "1", "²"),
    *([], {}, [0], [-1, -8], [2**40, 2**40], {"a": 1}, [[1]], ["x"], {"": ""}, nest(150)),
    *("DEEP", *BAD_NAMES),
)
DEEP = "[" * 900 + "]" * 900
"""Deeper than a tree can be copied, so put in as text."""


@contextlib.contextmanager
def only_our_errors() -> Iterator[None]:
    """Lets through what is ours and says so in one line that does no harm to a terminal."""
    text = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except StoreError as error:
            text = str(error)
    assert printable(text) == text
    assert len(text) <= 1500


def spoil_tree(tree: Any, draws: random.Random) -> Any:
    """Puts junk in place of some part of a tree, or takes, doubles or renames a part."""
    tree = copy.deepcopy(tree)
    for _ in range(draws.choice((1, 1, 2))):
        places = [
            (node, key)
            for node in walk(tree)
            for key in (node if isinstance(node, dict) else range(len(node)))
        ]
        if not places:
            return draws.choice(JUNK)
        node, key = draws.choice(places)
        kind = draws.randrange(6)
        if kind == 0:
            node.pop(key)
        elif kind == 1 and isinstance(node, dict):
            node[str(draws.choice(JUNK))[:5000]] = node.pop(key)
        elif kind == 2:
            other, name = draws.choice(places)
            node[key] = copy.deepcopy(other[name]) if name in other or other is not node else 0
        else:
            node[key] = copy.deepcopy(draws.choice(JUNK))
    return tree


def walk(tree: Any, depth: int = 9) -> Iterator[Any]:
    if isinstance(tree, (dict, list)) and depth:
        yield tree
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from walk(item, depth - 1)


def spoil_bytes(data: bytes, draws: random.Random) -> bytes:
    """Flips, cuts, doubles or inserts some bytes."""
    spoilt = bytearray(data)
    for _ in range(draws.choice((1, 1, 3))):
        place = draws.randrange(len(spoilt) + 1)
        kind = draws.randrange(4)
        if kind == 0 and place < len(spoilt):
            spoilt[place] ^= 1 << draws.randrange(8)
        elif kind == 1:
            del spoilt[place : place + draws.choice((1, 8, 10**6))]
        elif kind == 2:
            spoilt[place:place] = spoilt[: draws.randrange(40)]
        else:
            spoilt[place:place] = draws.randbytes(draws.randrange(9))
    return bytes(spoilt)


def as_json(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).replace('"DEEP"', DEEP).encode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A job with something of everything."""
    store = Store(tmp_path_factory.mktemp("whole"), "try")
    trial = write_trial(store, sample_job())
    write_trial(store, sample_job(sparsity=0.9))
    dense, files = sample_round(0, 0.0, 0)
    store.write_shared("dense/h", files, {"seed": 0, "kernels": ["a"]}, dense)
    pictures = {"findings.json": b"{}", "pictures.safetensors": b""}
    store.write_shared(f"explained/{trial}", pictures, {"round": 2})
    return store


def test_records(whole: Store) -> None:
    draws = random.Random(1)
    trial = whole.objects.list_folders("trials/")[0]
    finished = whole.read_trial(trial)
    assert finished is not None
    shared = whole.read_shared_record("dense/h")
    assert shared is not None
    records = [
        (finished, 3),
        (finished.rounds[1], 3),
        (shared, 2),
        (JobRecord(factory="a:b"), 1),
        (FailureRecord(trial_id=trial, cause="x", round=1), 1),
        (StopRecord(trial_id=trial, round=1, scheduler="asha"), 1),
        (FinalTest(round=1, accuracy=0.5, loss=1, dense_accuracy=0.5, dense_loss=1), 1),
    ]
    trees = [(type(record), unseal(seal_record(record)), weight) for record, weight in records]
    for _ in range(NUM_INPUTS):
        ((kind, tree, _),) = draws.choices(trees, [weight for _, _, weight in trees])
        spoilt = spoil_tree(tree, draws)
        data = as_json(spoilt)
        if isinstance(spoilt, dict):
            body = data.removesuffix(b"\n}")
            data = body + b',\n "sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()
        if draws.random() < 0.3:
            data = spoil_bytes(data, draws)
        with only_our_errors():
            record = parse_record(data, kind, "here")
            use(record)


def use(record: Any) -> None:
    """Does with a record what readers do."""
    again = parse_record(seal_record(record), type(record), "here")
    assert seal_record(again) == seal_record(record)
    if isinstance(record, TrialRecord):
        assert tabulate([record]).num_rows == len(record.rounds)
        assert record.chosen.sparsity <= 1
        assert record.dense is record.rounds[0]
    if isinstance(record, RoundRecord):
        assert record.cost.compression >= 0
    if isinstance(record, SharedRecord):
        assert all(record.files)


def test_masks_and_weights() -> None:
    draws = random.Random(2)
    _, files = sample_round(1, 0.5, 0)
    masks = files["masks.safetensors"]
    kept = read_mask_file(masks, "here").masks
    for _ in range(NUM_INPUTS):
        name = draws.choice(("masks.safetensors", "weights.safetensors"))
        data = files[name]
        if draws.random() < 0.8:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            if name == "masks.safetensors" and draws.random() < 0.7:
                metadata = header["__metadata__"]
                shapes = json.loads(metadata["shapes"])
                metadata["shapes"] = as_json(spoil_tree(shapes, draws)).decode()
            elif draws.random() < 0.3:
                kinds = ("F4", "F8_E8M0", "C64", "U16", "F16", "I8", "BOOL", "F64")
                header[draws.choice(sorted(header))] |= {"dtype": draws.choice(kinds)}
            else:
                header = spoil_tree(header, draws)
            text = as_json(header)
            data = len(text).to_bytes(8, "little") + text + data[8 + length :]
        else:
            data = spoil_bytes(data, draws)
        with only_our_errors():
            found = read_mask_file(data, "here").masks
            digest_masks(found)
            assert all(mask.unpack().sum() == mask.num_kept for mask in found.values())
        with only_our_errors():
            MaskSet.from_bytes(data, "here")
        for parameter in ("a.weight", "b.weight"):
            with only_our_errors():
                read_weight(data, parameter, "here")
        with only_our_errors():
            count_nonzero(data, "here")
        with only_our_errors():
            find_revived(data, kept, "here")


def test_findings() -> None:
    draws = random.Random(3)
    whole = Findings("t", 1, "taylor", 5, (), agreement={"same": 0.5}, left_out=("a",))
    files = whole.to_files()
    assert Findings.from_files(files, "here").to_dict() == whole.to_dict()
    for _ in range(NUM_INPUTS):
        tree = spoil_tree(json.loads(files["findings.json"]), draws)
        with only_our_errors():
            Findings.from_files(files | {"findings.json": as_json(tree)}, "here")
        name = draws.choice(sorted(files))
        with only_our_errors():
            Findings.from_files(files | {name: spoil_bytes(files[name], draws)}, "here")


def test_indexes(whole: Store, tmp_path: Path) -> None:
    draws = random.Random(4)
    folder = tmp_path / "copy"
    shutil.copytree(str(whole.folder), folder / "try")
    store = Store(folder, "try")
    good = store.objects.get(INDEX) or b""
    table = tabulate(
        [r for t in store.objects.list_folders("trials/") if (r := store.read_trial(t))]
    )
    for _ in range(NUM_SLOW):
        data = spoil_bytes(good, draws)
        if draws.random() < 0.8:
            names = draws.sample(table.column_names, draws.randrange(1, table.num_columns))
            part = table if draws.random() < 0.7 else table.select(names)
            place = draws.randrange(part.num_columns)
            junk = draws.choice(JUNK)
            with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError):
                name = draws.choice((part.column_names[place], str(junk)[:3000]))
                part = part.set_column(place, name, pa.array([junk] * len(part)))
            if draws.random() < 0.3:
                part = pa.concat_tables([part, part])
            with contextlib.suppress(pa.ArrowException, UnicodeError):
                data = _dump(part)
        (store.folder / INDEX).write_bytes(data)
        with only_our_errors():
            find_faults(folder)
        with only_our_errors():
            open_results(folder).chosen().to_rows()


def test_leases_and_claims(tmp_path: Path) -> None:
    draws = random.Random(5)
    store = Store(tmp_path, "try")
    store.claim(sample_job())
    card = lease._describe_self()
    for _ in range(NUM_INPUTS):
        data = as_json(spoil_tree(card, draws))
        if draws.random() < 0.4:
            data = spoil_bytes(data, draws)
        for key in ("trials/t/driver.lock", "job.json"):
            (store.folder / key).parent.mkdir(parents=True, exist_ok=True)
            (store.folder / key).write_bytes(data)
        with only_our_errors():
            store.read_claim()
        with only_our_errors():
            store.read_driver("t")
            with store.hold("t"):
                pass
        holder = lease._parse(data)
        assert lease._is_alive(holder, 1.0) in (True, False)
        with only_our_errors():
            raise lease._refusal("here", holder)


def test_names_and_places(whole: Store, tmp_path: Path) -> None:
    """Fetches from storages in which names, records and files were spoilt and sealed again."""
    draws = random.Random(6)
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "precious").write_text("mine")
    target = tmp_path / "watched" / "in" / "to"
    records = [e.key for e in whole.objects.entries() if e.key.endswith(".json")]
    for _ in range(NUM_SLOW):
        source = tmp_path / "from"
        shutil.copytree(str(whole.folder), source / "try")
        for key in draws.sample(records, 2):
            path = source / "try" / key
            with contextlib.suppress(ValueError, RecursionError, AttributeError, KeyError):
                tree = unseal(path.read_bytes())
                files = tree.get("files")
                if files and draws.random() < 0.6:
                    name = draws.choice(sorted(files))
                    bad = draws.choice(BAD_NAMES)
                    if draws.random() < 0.5:
                        files[bad] = files.pop(name)
                    else:
                        files[name]["stored_as"] = bad
                else:
                    tree = spoil_tree(tree, draws)
                path.write_bytes(seal(tree))
        if draws.random() < 0.5:
            path = source / "try" / draws.choice(records)
            path.unlink()
            path.symlink_to(tmp_path / "watched" / "precious")
        with only_our_errors():
            fetch_results(source, target)
        with only_our_errors():
            find_faults(source)
        with only_our_errors():
            find_garbage(source, is_unfinished_too=True)
        found = picture(tmp_path / "watched")
        outside = {name for name in found if not name.startswith(f"{target}/")}
        assert outside == {str(tmp_path / "watched" / "precious")}
        assert found[outside.pop()] == b"mine"
        shutil.rmtree(source)
        shutil.rmtree(target, ignore_errors=True)
