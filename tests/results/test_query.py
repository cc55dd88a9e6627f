"""Reading back: the index agrees with the records, whatever wrote it, and answers questions."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_results import copy_results, sample_job, sample_round, sample_trial, write_trial
from sample_units import units_cost

import gbp_ray
from gbp_ray.cli.tables import results_table
from gbp_ray.config.job import trial_id
from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.results.index import (
    INDEX,
    UNINDEXED,
    read_index,
    rebuild_index,
    refresh_index,
    tabulate,
)
from gbp_ray.results.objects import Objects
from gbp_ray.results.query import Results, open_results
from gbp_ray.results.records import seal_record
from gbp_ray.results.s3 import S3Objects
from gbp_ray.results.store import Store
from gbp_ray.runtime.progress import Screen


def copy_some(storage: str, tmp_path: Path) -> Store:
    """The same, copied where writing takes longer and is not what is tested."""
    if "://" not in storage:
        return write_some(storage)
    return copy_results(write_some(str(tmp_path / "copied")), storage)


def write_some(storage: str) -> Store:
    """Four trials of one job, of which one has not finished."""
    store = Store(storage, "try")
    for criterion, sparsity in (("taylor", 0.5), ("taylor", 0.9), ("magnitude", 0.9)):
        write_trial(store, sample_job(criterion=criterion, sparsity=sparsity))
    write_trial(store, sample_job(seed=3), num_rounds=2)
    return store


def expected_rows(store: Store) -> list[dict[str, Any]]:
    """What the index should say, from the records by another way."""
    rows = []
    for trial in store.objects.list_folders("trials/"):
        record = store.read_trial(trial)
        for item in record.rounds if record else ():
            rows.append(
                {
                    "trial_id": trial,
                    "round": item.round,
                    "is_final": item.round == 2,
                    "sparsity": item.sparsity,
                    "accuracy": item.accuracy,
                    "accuracy_pruned": item.accuracy_pruned,
                    "macs_nonzero": item.cost.macs_nonzero,
                    "mask_digest": item.mask_digest,
                    "weights_sha256": item.files["weights.safetensors"].sha256,
                    "prune.criterion": record.job.prune.criterion,
                    "workload.options.width": 8,
                    "seconds.score": item.seconds.get("score"),
                }
            )
    return rows


def pick(rows: list[dict[str, Any]], names: Any) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]


# -- the index -------------------------------------------------------------------------------------


def test_the_index_is_what_the_records_say(storage: str) -> None:
    store = write_some(storage)
    expected = expected_rows(store)
    assert len(expected) == 9
    results = open_results(store.uri)
    assert pick(results.to_rows(), expected[0]) == expected
    stored = pq.read_table(io.BytesIO(store.objects.get(INDEX) or b"")).to_pylist()
    assert pick(stored, expected[0]) == expected
    assert [e.key for e in store.objects.entries(UNINDEXED)] == []
    before = store.objects.get(INDEX)
    assert rebuild_index(store.objects) == 3
    assert store.objects.get(INDEX) == before, "an index grown and one made anew differ"


def test_the_index_is_the_same_on_every_storage(tmp_path: Path, s3_storage: str) -> None:
    stores = [write_some(storage) for storage in (str(tmp_path), s3_storage)]
    rows = [open_results(store.uri).table.to_pylist() for store in stores]
    assert rows[0] == rows[1]
    assert len({store.objects.get(INDEX) for store in stores}) == 1


def test_others_read_the_index_as_it_is(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    polars = pytest.importorskip("polars")
    pandas = pytest.importorskip("pandas")
    store = write_some(str(tmp_path))
    path = f"{store.uri}/{INDEX}"
    expected = pytest.approx([row["accuracy"] for row in expected_rows(store)])
    column = [row[0] for row in duckdb.sql(f"select accuracy from '{path}'").fetchall()]
    assert column == expected
    assert polars.read_parquet(path)["accuracy"].to_list() == expected
    assert pandas.read_parquet(path)["accuracy"].to_list() == expected


def test_a_trial_that_finished_without_its_index_is_seen(storage: str, tmp_path: Path) -> None:
    # As after a kill between the record and the index.
    store = copy_some(storage, tmp_path)
    job = sample_job(seed=4)
    name = write_trial(store, job, num_rounds=3)
    record = sample_trial(job, tuple(store.read_rounds(name)))
    store.objects.put(f"{UNINDEXED}{name}", b"")
    assert len(open_results(store.uri)) == 9, "announced, and not finished"
    store.objects.put(f"trials/{name}/trial.json", seal_record(record))
    assert read_index(store.objects)[1], "the index is up to date all by itself"
    assert len(open_results(store.uri)) == 12
    assert not read_index(store.objects)[1], "what was read was not written"


def test_results_without_an_index_are_read_and_indexed(storage: str, tmp_path: Path) -> None:
    store = copy_some(storage, tmp_path)
    before = store.objects.get(INDEX)
    store.objects.delete([INDEX])
    assert len(open_results(store.uri)) == 9
    assert store.objects.get(INDEX) == before


def test_a_trial_made_again_replaces_its_rows(storage: str, tmp_path: Path) -> None:
    store = copy_some(storage, tmp_path)
    trial = store.objects.list_folders("trials/")[0]
    record = store.read_trial(trial)
    assert record is not None
    # What has finished is never replaced, so it goes first.
    store.objects.delete([f"trials/{trial}/trial.json"])
    store.write_trial(record.model_copy(update={"seconds": 99.0}))
    rows = open_results(store.uri).to_rows()
    assert len(rows) == 9
    assert {row["trial_seconds"] for row in rows if row["trial_id"] == trial} == {99.0}


def test_many_writers_of_one_index_lose_nothing(storage: str) -> None:
    jobs = [sample_job(seed=seed) for seed in range(4)]
    Store(storage, "try").claim(jobs[0])
    threads = [threading.Thread(target=write_trial, args=(Store(storage, "try"), j)) for j in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(storage, "try")
    assert len(open_results(store.uri)) == 12
    assert list(store.objects.entries(UNINDEXED)) == []


def test_a_big_index_is_not_written_at_every_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_some(str(tmp_path))
    size = len(store.objects.get(INDEX) or b"")
    monkeypatch.setattr("gbp_ray.results.index._BYTES_PER_FINISH", (size - 1) // 3)
    before = store.objects.get(INDEX)
    for seed in range(10, 13):
        write_trial(store, sample_job(seed=seed))
        assert store.objects.get(INDEX) == before
        refresh_index(store.objects, is_lazy=True)
        assert store.objects.get(INDEX) == before
    write_trial(store, sample_job(seed=13))
    assert store.objects.get(INDEX) != before
    assert len(open_results(store.uri)) == 9 + 12


def test_columns_of_mixed_kinds_become_text() -> None:
    def trial(**options: Any) -> Any:
        job = sample_job()
        workload = job.workload.model_copy(update={"options": options})
        job = job.model_copy(update={"workload": workload})
        rounds = tuple(sample_round(number, 0.25 * number, 1)[0] for number in range(3))
        return sample_trial(job, rounds)

    table = tabulate([trial(a=1, b=1, c=None), trial(a="x", b=0.5, d=[1, 2])])
    found = {name: set(table[f"workload.options.{name}"].to_pylist()) for name in "abcd"}
    assert found == {"a": {"1", "x"}, "b": {1.0, 0.5}, "c": {None}, "d": {None, "[1, 2]"}}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_byte_in_the_index_is_noticed(tmp_path: Path, share: float) -> None:
    store = write_some(str(tmp_path))
    path = Path(store.uri) / INDEX
    good = path.read_bytes()
    place = min(int(share * len(good)), len(good) - 1)
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    with pytest.raises(StoreError, match=r"index\.parquet': is damaged; gbp-ray index"):
        open_results(store.uri)
    rebuild_index(store.objects)
    assert path.read_bytes() == good


def test_a_finish_mends_a_damaged_index(tmp_path: Path) -> None:
    store = write_some(str(tmp_path))
    (Path(store.uri) / INDEX).write_bytes(b"PAR1")
    write_trial(store, sample_job(seed=9))
    assert len(open_results(store.uri)) == 12


# -- questions -------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return open_results(write_some(str(tmp_path)).uri)


def test_where_keeps_what_meets_all_conditions(results: Results) -> None:
    rows = results.to_rows()

    def count(condition: Any) -> int:
        return sum(map(condition, rows))

    assert len(results.where()) == 9
    assert len(results.where("prune.criterion=taylor")) == 6
    assert len(results.where("criterion != 'taylor'")) == 3
    assert len(results.where("round>=1", "criterion=taylor")) == 4
    assert len(results.where("round>=1,criterion=taylor")) == 4
    assert len(results.where("accuracy<0.75")) == count(lambda row: row["accuracy"] < 0.75) > 0
    assert len(results.where("is_final=true")) == len(results.final()) == 3
    assert len(results.where("accuracy_pruned=0.25")) == 6


def test_a_sparsity_within_a_weight_is_reached(results: Results) -> None:
    # 0.45 of 40 and of 60 weights are whole numbers; 0.456 would take 45.6 of 100.
    assert len(results.where("sparsity>=0.45")) == 5
    assert len(results.where("sparsity>=0.456")) == 5
    assert len(results.where("sparsity>=0.461")) == 3
    assert len(results.where("sparsity=0.9")) == 2
    assert len(results.where("sparsity>0.9")) == 0


def test_best_is_the_best_by_another_way(results: Results) -> None:
    rows = results.to_rows()
    sparse = [row for row in rows if row["sparsity"] >= 0.89]
    assert results.best("accuracy@sparsity>=0.9") == max(sparse, key=lambda row: row["accuracy"])
    assert results.best("loss") == min(rows, key=lambda row: row["loss"])
    best = results.best("accuracy@sparsity>=0.9,criterion=magnitude")
    assert best["prune.criterion"] == "magnitude"
    assert best["uri"].endswith(f"trials/{best['trial_id']}/round_002")
    with pytest.raises(StoreError, match=r"none of 9 rounds .* the greatest sparsity is 0\.9"):
        results.best("accuracy@sparsity>=0.99")


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [(0.0, "none is best: accuracy is 0 throughout"), (79.0, "accuracy 79 is no share")],
)
def test_none_is_best_by_an_accuracy_that_tells_nothing(
    results: Results, accuracy: float, words: str
) -> None:
    number = results.table.column_names.index("accuracy")
    values = pa.array([accuracy] * len(results), pa.float64())
    odd = Results("here", results._stores, results.table.set_column(number, "accuracy", values))
    with pytest.raises(StoreError, match=words):
        odd.best("accuracy@sparsity>=0.9")
    assert odd.best("loss")["loss"] == results.best("loss")["loss"]


def test_sort_puts_the_best_first(results: Results) -> None:
    accuracies = [row["accuracy"] for row in results.sort("accuracy").to_rows()]
    assert accuracies == sorted(accuracies, reverse=True)
    losses = [row["loss"] for row in results.sort("loss").to_rows()]
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("acuracy@sparsity>=0.9", "did you mean 'accuracy'"),
        ("accuracy@sparsity", "must read COLUMN"),
        ("accuracy@sparsity>=many", "must compare with a number"),
        ("accuracy@epochs=1", "it may be pretrain.epochs, finetune.epochs"),
        ("accuracy@is_final=1", "true or false"),
    ],
)
def test_a_wrong_question_says_what_is_wrong(results: Results, question: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        results.best(question)
    assert part.replace("pretrain.epochs, finetune.epochs", "") in str(caught.value)


def test_iterating_gives_the_records(tmp_path: Path) -> None:
    store = write_some(str(tmp_path))
    records = list(open_results(store.uri).where("criterion=taylor"))
    assert [record.trial_id for record in records] == [
        trial_id(sample_job(criterion="taylor", sparsity=sparsity)) for sparsity in (0.5, 0.9)
    ]
    assert all(store.read_trial(record.trial_id) == record for record in records)


def test_several_jobs_of_a_storage_are_one_table(storage: str) -> None:
    for name, width in (("one", 8), ("two", "wide")):
        job = sample_job(name)
        workload = job.workload.model_copy(update={"options": {"width": width}})
        write_trial(Store(storage, name), job.model_copy(update={"workload": workload}))
    results = open_results(storage)
    assert {row["job"] for row in results.to_rows()} == {"one", "two"}
    assert set(results.table["workload.options.width"].to_pylist()) == {"8", "wide"}
    assert [record.job.name for record in results] == ["one", "two"]
    (row,) = results.where("job=two").final().to_rows()
    alone = open_results(Store(storage, "two").trial_uri(row["trial_id"]))
    assert alone.to_rows() == open_results(Store(storage, "two").uri).to_rows()
    assert len(alone) == 3


def test_only_rounds_of_one_workload_are_ranked_together(tmp_path: Path) -> None:
    def write(name: str, seed: int, **workload: Any) -> None:
        job = sample_job(name, seed=seed)
        changed = job.workload.model_copy(update=workload)
        write_trial(Store(tmp_path, name), job.model_copy(update={"workload": changed}))

    for seed, width in enumerate((8, 16)):
        write("one", seed, options={"width": width})
    # A sweep may vary its options, and asks for the best of them.
    assert open_results(tmp_path / "one").best("accuracy")["job"] == "one"
    write("two", 0, options={"width": 8})
    write("three", 0, factory="other:make", options={"depth": 2})
    results = open_results(tmp_path)
    assert [
        (title, set(part.table["job"].to_pylist())) for title, part in results.by_workload()
    ] == [
        ("my_module:make, width 8", {"one", "two"}),
        ("my_module:make, width 16", {"one"}),
        ("other:make, depth 2", {"three"}),
    ]
    with pytest.raises(ConfigError, match=r"3 workloads .*other:make, depth 2\); add .* job=one"):
        results.best("accuracy@round>=1")
    assert results.best("accuracy@job=three")["job"] == "three"
    assert results.best("accuracy@factory=my_module:make,width=8")["job"] in ("one", "two")
    assert repr(results) == f"<Results of {tmp_path}: 12 rounds of 4 trials>"


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_tables_keep_words_whole_at_any_width(tmp_path: Path, width: int) -> None:
    results = open_results(write_some(str(tmp_path)).uri).final()
    fields = [*results.find_varying(), "workload.options.width", "finetune.weight_decay"]
    table, left_out = results_table(results.to_rows(), fields, width)
    out = io.StringIO()
    Screen(file=out, width=width).print(table)
    lines = out.getvalue().splitlines()
    headings = [column.header for column in table.columns]
    assert headings[0] == "trial"
    assert {"sparsity", "accuracy"} <= set(headings)
    everything = ["trial", "round", "sparsity", "accuracy", "loss", "weights left", "MACs left"]
    assert sorted([*headings, *left_out]) == sorted([*everything, *fields])
    if width > 40:
        assert lines[1].split() == " ".join(map(str, headings)).split()
    # A rule, a heading, a line for each trial: nothing is folded.
    assert len([line for line in lines if line.strip()]) == 2 + len(results)


def test_what_holds_no_results_says_so(storage: str) -> None:
    if storage.startswith("s3://"):
        with pytest.raises(StoreError, match="holds no results"):
            open_results(storage)
    else:
        with pytest.raises(StoreError, match="no such folder"):
            open_results(storage)
    store = Store(storage, "try")
    name = write_trial(store, sample_job(), num_rounds=1)
    for uri in (storage, store.uri, store.trial_uri(name)):
        with pytest.raises(StoreError, match="holds no finished trial"):
            open_results(uri)


def test_results_open_without_torch_and_ray(tmp_path: Path) -> None:
    store = write_some(str(tmp_path))
    code = (
        "import sys, gbp_ray\n"
        "results = gbp_ray.open_results(sys.argv[1])\n"
        "assert len(results) == 9\n"
        "assert results.best('accuracy@sparsity>=0.9') and list(results)\n"
        "from gbp_ray.results import compare, maintenance\n"
        "assert not maintenance.find_faults(sys.argv[1]).faults\n"
        "sys.exit(str({'torch', 'ray'} & set(sys.modules) or ''))"
    )
    command = [sys.executable, "-c", code, store.uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


# -- many ------------------------------------------------------------------------------------------


class CountingObjects(S3Objects):
    """Counts requests as they leave."""

    def __init__(self, uri: str) -> None:
        opened = S3Objects.open(uri)
        super().__init__(opened._address, opened._client)
        self.num_requests = 0
        self._client.meta.events.register("before-send.s3", self._count)

    def _count(self, **parts: Any) -> None:
        self.num_requests += 1


def write_many(objects: Objects, number: int) -> None:
    """Leaves what a job of so many trials leaves for a reader: claim and index."""
    rounds = tuple(sample_round(number, 0.25 * number, 1)[0] for number in range(3))
    records = []
    for seed in range(number):
        job = sample_job(seed=seed)
        varied = tuple(
            item.model_copy(update={"score": 0.5 + 0.5 * math.sin(seed) ** 2}) for item in rounds
        )
        records.append(sample_trial(job, varied))
        if seed % 100 == 0:
            objects.put(f"trials/{trial_id(job)}/trial.json", seal_record(records[-1]))
    from gbp_ray.results.index import _dump

    objects.put("job.json", b"")
    objects.put(INDEX, _dump(tabulate(records)))


def test_an_index_is_read_in_a_handful_of_requests(moto_storage: str) -> None:
    objects = CountingObjects(moto_storage)
    write_many(objects.child("try"), 2000)
    objects.num_requests = 0
    uri = f"{moto_storage.partition('?')[0]}/try?{moto_storage.partition('?')[2]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gbp_ray.results.s3.S3Objects.open", lambda uri: objects.child("try"))
        results = open_results(uri)
    assert len(results) == 6000
    assert results.best("accuracy@round=2")["accuracy"] > 0.99
    # Two thousand trials: whose it is, what is not in the index, the index.
    assert objects.num_requests <= 3


def test_the_package_offers_them() -> None:
    assert gbp_ray.open_results is open_results
    assert gbp_ray.Results is Results


def test_kept_weights_that_happen_to_be_zero_are_left_where_whole_units_go() -> None:
    cost = units_cost(6, 3, is_compact=True)
    with_zeros = cost.model_copy(update={"num_nonzero": cost.num_nonzero - 5})
    assert with_zeros.left == cost.left
    assert with_zeros.reached == cost.reached
