"""The verbs that read results back: one JSON object, tables, true exit codes."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from sample_results import copy_results, sample_job, write_trial
from shell import Shell

from gbp_ray.results.query import open_results
from gbp_ray.results.store import Store

READING_VERBS = ["results", "report", "index", "diff", "fetch", "verify", "gc"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four trials, for the tests to copy."""
    return write_results(str(tmp_path_factory.mktemp("written")))


@pytest.fixture
def store(written: Store, tmp_path: Path) -> Store:
    return copy_results(written, str(tmp_path / "results"))


@pytest.fixture(params=["folder", "moto"])
def any_store(request: pytest.FixtureRequest, written: Store, tmp_path: Path) -> Store:
    """For the verbs that do more with a storage than to open its results."""
    if request.param == "moto":
        return copy_results(written, request.getfixturevalue("moto_storage"))
    return copy_results(written, str(tmp_path / "results"))


def write_results(storage: str) -> Store:
    store = Store(storage, "try")
    for criterion in ("taylor", "magnitude"):
        for sparsity in (0.5, 0.9):
            write_trial(store, sample_job(criterion=criterion, sparsity=sparsity))
    return store


def test_results_are_listed_best_first(shell: Shell, store: Store) -> None:
    rows = shell.json("results", store.uri)["results"]
    assert [row["round"] for row in rows] == [2] * 4
    accuracies = [row["accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert len(shell.json("results", store.uri, "--rounds")["results"]) == 12
    code, out, _ = shell("results", store.uri)
    assert code == 0
    places = [out.index(row["trial_id"]) for row in rows]
    assert places == sorted(places)
    assert "prune.criterion" in out
    assert "finetune.epochs" not in out, "a field in which none differs"


def test_a_long_table_is_cut_and_says_so(shell: Shell, store: Store) -> None:
    rows = shell.json("results", store.uri)["results"]
    assert shell.json("results", store.uri, "--limit=3")["results"] == rows[:3]
    _, out, _ = shell("results", store.uri, "--limit=3")
    assert "and 1 more" in out
    assert [row["trial_id"] in out for row in rows] == [True, True, True, False]


def test_results_are_filtered(shell: Shell, store: Store) -> None:
    arguments = ["results", store.uri, "--where", "criterion=taylor", "--where=sparsity>=0.9"]
    (row,) = shell.json(*arguments)["results"]
    assert (row["prune.criterion"], row["prune.sparsity"]) == ("taylor", 0.9)
    code, out, _ = shell(*arguments, "--csv")
    assert code == 0
    (line,) = csv.DictReader(io.StringIO(out))
    assert line["trial_id"] == row["trial_id"]
    assert float(line["accuracy"]) == row["accuracy"]
    assert set(line) == set(row)


def test_the_best_is_the_best(shell: Shell, store: Store) -> None:
    found = shell.json("results", store.uri, "--best", "accuracy@sparsity>=0.9")
    assert found == open_results(store.uri).best("accuracy@sparsity>=0.9")
    _, out, _ = shell("results", store.uri, "--best", "accuracy@sparsity>=0.9")
    assert found["uri"] in out.replace("\n", "")


def test_diff_tells_what_differs(shell: Shell, store: Store) -> None:
    trials = [store.trial_uri(name) for name in store.objects.list_folders("trials/")[:2]]
    found = shell.json("diff", *trials)
    assert found["trials"] == trials
    code, out, _ = shell("diff", *trials)
    assert code == 0
    assert f"{found['overlap']:.2%}" in out
    for part in ("prune.sparsity", "accuracy", "a.weight", *trials):
        assert part in out


def test_fetch_verify_index_and_gc(shell: Shell, any_store: Store, tmp_path: Path) -> None:
    copy = str(tmp_path / "copy")
    assert shell.json("fetch", any_store.uri, copy)["num_rounds"] == 12
    audit = shell.json("verify", copy)
    assert (audit["num_trials"], audit["num_rounds"], audit["faults"]) == (4, 12, [])
    assert shell.json("index", copy) == {"indexed": {f"{copy}/try": 4}}
    assert shell.json("gc", copy) == {"garbage": [], "num_bytes": 0, "num_removed": 0}
    for verb in (["verify"], ["index"], ["gc"]):
        code, out, errors = shell(*verb, copy)
        assert (code, errors) == (0, "")
        assert out.strip()


def test_verify_names_the_fault_and_exits_1(shell: Shell, any_store: Store) -> None:
    trial = any_store.objects.list_folders("trials/")[0]
    key = f"trials/{trial}/round_001/state.pt"
    any_store.objects.put(key, b"\0" * 64)
    uri = any_store.objects.uri_of(key)
    (fault,) = shell.json("verify", any_store.uri, code=1)["faults"]
    assert fault["uri"] == uri
    assert "does not match its checksum" in fault["fault"]
    code, out, errors = shell("verify", any_store.uri)
    assert code == 1
    assert uri in out.replace("\n", "")
    assert errors == f"error: '{any_store.uri}': 1 faults, the first in {uri}\n"


@pytest.mark.usefixtures("undrawn")
def test_report_writes_a_page(shell: Shell, any_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    made = shell.json("report", any_store.uri, "--to", str(folder))
    assert made["page"] == str(folder / "index.html")
    assert made["num_trials"] == 4
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == set(made["files"])
    code, out, errors = shell(
        "report", any_store.uri, "--to", str(folder), "--where=criterion=taylor"
    )
    assert (code, errors) == (0, "")
    assert out.replace("\n", "").endswith(f"{folder / 'index.html'}: 2 trials, 7 files")


def test_gc_lists_before_it_removes(shell: Shell, any_store: Store) -> None:
    key = f"trials/{write_trial(any_store, sample_job(seed=1), num_rounds=1)}/round_001/state.pt"
    any_store.objects.put(key, b"s" * 9)
    expected = {"uri": any_store.objects.uri_of(key), "num_bytes": 9}
    found = shell.json("gc", any_store.uri)
    assert [{name: row[name] for name in expected} for row in found["garbage"]] == [expected]
    code, out, _ = shell("gc", any_store.uri)
    assert code == 0
    assert "nothing removed (--remove does)" in out
    assert any_store.objects.exists(key)
    code, out, _ = shell("gc", any_store.uri, "--remove")
    assert expected["uri"] in out.replace("\n", "")
    assert "1 removed" in out
    assert not any_store.objects.exists(key)


def test_show_reads_any_storage(shell: Shell, any_store: Store) -> None:
    rows = shell.json("show", any_store.uri)["trials"]
    assert [row["trial"] for row in rows] == any_store.objects.list_folders("trials/")
    tree = shell.json("show", rows[0]["uri"])
    assert tree["trial_id"] == rows[0]["trial"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["results", "nowhere"], "no such folder"),
        (["results", "{uri}", "--where", "acuracy>0.5"], "did you mean 'accuracy'"),
        (["results", "{uri}", "--best", "accuracy@sparsity>=0.99"], "the greatest sparsity is 0.9"),
        (["results", "{uri}", "--sort", "colour"], "there is no such one"),
        (["results", "{uri}", "--json", "--csv"], "cannot be given together"),
        (["results", "s3://b"], "must read s3://bucket/prefix"),
        (["diff", "{uri}", "{uri}"], "holds 4 trials"),
        (["verify", "nowhere"], "no such folder"),
        (["gc", "nowhere"], "no such folder"),
        (["fetch", "{uri}", "/dev/null/x"], "Not a directory"),
        (["index", "nowhere"], "no such folder"),
        (["report", "nowhere"], "no such folder"),
        (["report", "{uri}", "--to", "{uri}"], "which is of no earlier report"),
        (["report", "{uri}", "--where", "sparsity>2"], "no trial ends with"),
    ],
)
def test_mistakes_are_one_line(
    shell: Shell, tmp_path: Path, arguments: list[str], part: str
) -> None:
    store = Store(tmp_path, "try")
    for sparsity in (0.5, 0.6, 0.7, 0.9):
        write_trial(store, sample_job(sparsity=sparsity))
    assert part in shell.refusal(*(text.format(uri=store.uri) for text in arguments))


@pytest.mark.parametrize("verb", READING_VERBS)
def test_help_teaches_by_an_example(shell: Shell, verb: str) -> None:
    code, out, _ = shell(verb, "--help")
    assert code == 0
    assert f"gbp-ray {verb} " in out.partition("Examples:")[2]
