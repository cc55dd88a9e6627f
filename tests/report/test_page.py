"""The report: every number on the page again from the records; nothing from outside; whole or not.

The page is read with the standard library's parser alone.
"""

from __future__ import annotations

import html
import math
import re
import statistics
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy
from sample_sweep import (
    make_sweep_round,
    make_sweep_trial,
    sweep_job,
    write_sweep,
    write_sweep_trial,
)
from typer.testing import CliRunner

from gbp_ray.cli.app import app
from gbp_ray.config.job import load_job, trial_id
from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.report import page
from gbp_ray.report.drawing import count_spare_processes
from gbp_ray.report.page import write_report
from gbp_ray.results.index import rebuild_index
from gbp_ray.results.records import FailureRecord, TrialRecord, seal_record
from gbp_ray.results.s3 import S3Objects
from gbp_ray.results.store import Store

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page as lists: elements with their attributes, rows of each table, balanced or not."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._table = ""
        self.feed(self.text)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = dict(attrs).get("class") or ""
            self.tables.setdefault(self._table, [])
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and ({"td", "th"} & set(self._open)):
            self.tables[self._table][-1][-1] += data

    def rows(self, table: str) -> list[dict[str, str]]:
        head, *body = self.tables[table]
        return [dict(zip(head, row, strict=True)) for row in body]


def read_records(store: Store) -> list[TrialRecord]:
    records = [store.read_trial(name) for name in store.objects.list_folders("trials/")]
    return [record for record in records if record is not None]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_sweep(
        tmp_path_factory.mktemp("sweep"), sparsities=(0.5, 0.9, 0.98), seeds=range(3), rounds=3
    )


@pytest.fixture(scope="module")
def report(sweep: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "page"
    # As the command does.
    return write_report(sweep.uri, folder, num_processes=count_spare_processes()).page


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A sweep whose report takes little time."""
    return write_sweep(
        tmp_path_factory.mktemp("small"),
        criteria=("taylor", "random"),
        sparsities=(0.5, 0.9),
        seeds=(0, 1),
        shapes={"a.weight": (8, 8), "b.weight": (8,)},
        rounds=1,
    )


def written(values: list[float], digits: int = 2, scale: float = 100, sign: str = "") -> str:
    mean = f"{scale * statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def test_the_points_are_those_of_the_records(sweep: Store, report: Path) -> None:
    records = read_records(sweep)
    rows = Page(report).rows("points")
    assert len(rows) == 12
    expected = {}
    for record in records:
        key = record.job.prune.criterion, record.job.prune.sparsity
        expected.setdefault(key, []).append(record)
    means = {
        key: (
            statistics.fmean(r.final.sparsity for r in own),
            statistics.fmean(r.final.accuracy for r in own),
        )
        for key, own in expected.items()
    }
    seen = set()
    for row in rows:
        targets = [t for c, t in expected if c == row["curve"]]
        target = min(targets, key=lambda t: abs(100 * t - float(row["sparsity, %"].split()[0])))
        own = expected[row["curve"], target]
        seen.add((row["curve"], target))
        assert row["seeds"] == "3"
        assert row["accuracy, %"] == written([r.final.accuracy for r in own])
        drops = [r.final.accuracy - r.dense.accuracy for r in own]
        assert row["against dense"] == written(drops, sign="+")
        pruned = [r.final.accuracy_pruned or 0.0 for r in own]
        assert row["before fine-tuning, %"] == written(pruned)
        assert row["loss"] == written([r.final.loss for r in own], digits=4, scale=1)
        compression = statistics.fmean(r.final.cost.compression for r in own)
        assert row["compression"] == f"{compression:.2f}x"
        spent = statistics.fmean(sum(sum(i.seconds.values()) for i in r.rounds) for r in own)
        assert row["worker-seconds"] == f"{spent:,.1f}"
        mine = means[row["curve"], target]
        is_beaten = any(o[0] >= mine[0] and o[1] >= mine[1] and o != mine for o in means.values())
        assert row["front"] == ("" if is_beaten else "yes")
    assert seen == set(expected)


def test_the_trials_are_those_of_the_records(sweep: Store, report: Path) -> None:
    records = {record.trial_id: record for record in read_records(sweep)}
    rows = Page(report).rows("trials")
    assert {row["trial"] for row in rows} == set(records)
    for row in rows:
        final = records[row["trial"]].final
        assert row["accuracy, %"] == f"{100 * final.accuracy:.2f}"
        assert row["parameters left"] == f"{final.cost.num_nonzero:,}"
        assert row["multiply-adds left"] == f"{final.cost.macs_nonzero:,}"
    accuracies = [float(row["accuracy, %"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)


def test_each_command_makes_the_trial_that_it_stands_for(sweep: Store, report: Path) -> None:
    text = html.unescape(
        re.findall(r'<pre class="commands">(.*?)</pre>', report.read_text(), re.S)[0]
    )
    lines = text.strip().splitlines()
    assert len(lines) == 2 * 36
    for name, command in zip(lines[::2], lines[1::2], strict=True):
        words = command.split()
        assert words[:2] == ["gbp-ray", "prune"]
        assert words[3::2] == ["--set", "--set"]
        job = load_job(report.parent / words[2], words[4::2])
        assert name == f"# {sweep.name}/{trial_id(job)}"
        assert "storage" not in tomllib.loads((report.parent / words[2]).read_text())


def test_nothing_comes_from_outside_and_figures_speak(report: Path) -> None:
    found = Page(report)
    for tag, attributes in found.elements:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), f"{tag} {name}={value}"
        assert not any(name.startswith("on") for name in attributes)
    style = found.text[found.text.index("<style>") : found.text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    references = re.findall(r"url\(([^)]*)\)", found.text)
    assert all(reference.startswith("#") for reference in references)
    # Of accuracy, trade-offs, rounds, layers, overlaps and cost.
    panels = [len(re.findall("<svg", part)) for part in found.text.split("<figure")[1:]]
    assert panels == [2, 2, 6, 3, 3, 1]
    images = [a for tag, a in found.elements if a.get("role") == "img"]
    assert len(images) == 6
    for attributes in images:
        assert len(attributes["aria-label"] or "") > 40
    assert sum(tag == "th" and a.get("scope") == "col" for tag, a in found.elements) > 20
    assert all(a.get("scope") for tag, a in found.elements if tag == "th")
    assert dict(found.elements)["html"] == {"lang": "en"}
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', found.text))
    assert used <= set(ids)


def test_the_figures_lie_beside_the_page(report: Path) -> None:
    names = {"accuracy", "tradeoffs", "rounds", "layers", "overlaps", "cost"}
    files = list(report.parent.glob("*.png"))
    assert {path.stem for path in files} == names
    for path in files:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") >= 1400
        assert path.name in report.read_text()


HOSTILE = '<script>alert("1")</script>&$x_{$\\'


def test_names_are_text_whatever_they_hold(tmp_path: Path) -> None:
    shapes = {f"{HOSTILE}.weight": (8, 8), "层" * 60 + ".weight": (4, 16), "_z.weight": (2, 8)}
    store = Store(tmp_path / "<b>", "sweep")
    for option in (HOSTILE, "Ünï 🙂"):
        workload = {"factory": "gbp_ray.zoo:digits_convnet", "options": {"path": option}}
        job = sweep_job(criterion="_mine:_rule", rounds=1, workload=workload)
        write_sweep_trial(store, job, shapes=shapes)
        write_sweep_trial(store, sweep_job(rounds=1, workload=workload), shapes=shapes)
    found = Page(write_report(store.uri, tmp_path / "page").page)
    assert "script" not in [tag for tag, _ in found.elements]
    assert "b" not in [tag for tag, _ in found.elements]
    layers = {row[0] for row in found.tables["layers"]}
    assert set(shapes) <= layers
    assert html.escape(HOSTILE, quote=False).split("&amp;")[0] in found.text.replace("&#34;", '"')
    commands = found.text.count("gbp-ray prune jobs/")
    assert commands == 4


@pytest.mark.parametrize("fields", [{"rounds": 1}, {"rounds": 3}])
def test_one_trial_makes_a_page(tmp_path: Path, fields: dict[str, Any]) -> None:
    store = Store(tmp_path / "r", "sweep")
    trial = write_sweep_trial(store, sweep_job(**fields)).trial_id
    made = write_report(store.trial_uri(trial), tmp_path / "page")
    assert made.num_trials == 1
    found = Page(made.page)
    (row,) = found.rows("points")
    assert "±" not in "".join(row.values())
    assert "One value has no deviation" in found.text
    assert "Missing: random, magnitude" in found.text


@pytest.mark.usefixtures("undrawn")
def test_what_has_no_result_is_listed_with_its_cause(tmp_path: Path) -> None:
    store = write_sweep(tmp_path / "r", criteria=("taylor",), sparsities=(0.5,), rounds=1)
    for name in ("broken", "halted"):
        store.objects.put(f"trials/{name}/round_000/weights.safetensors", b"")
    store.write_failure(FailureRecord(trial_id="broken", cause="CUDA <ran> out"))
    found = Page(write_report(store.uri, tmp_path / "page").page)
    states = {row["trial"]: row["state"] for row in found.rows("unfinished")}
    assert states == {
        "broken": "failed: CUDA <ran> out; no whole round",
        "halted": "stopped; no whole round",
    }
    assert "2 unfinished" in found.text


@pytest.mark.usefixtures("undrawn")
def test_many_trials_are_cut_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_MOST_TRIALS", 4)
    monkeypatch.setattr(page, "_MOST_POINTS", 2)
    store = write_sweep(
        tmp_path / "r", criteria=("taylor", "random"), sparsities=(0.5, 0.9), rounds=1
    )
    made = write_report(store.uri, tmp_path / "page")
    found = Page(made.page)
    assert len(found.rows("trials")) == 4
    assert len(found.rows("points")) == 2
    assert made.num_trials == 12
    for part in ("8 of 12", "2 of 4"):
        assert any(part in text for text in made.left_out)
        assert part in found.text


@pytest.mark.usefixtures("undrawn")
def test_conditions_keep_whole_trials(small: Store, tmp_path: Path) -> None:
    made = write_report(small.uri, tmp_path / "page", conditions=["criterion=taylor", "seed=0"])
    assert made.num_trials == 2
    with pytest.raises(StoreError, match="no trial ends with"):
        write_report(small.uri, tmp_path / "other", conditions=["sparsity>=0.99"])
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_others_is_left_alone(small: Store, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    write_report(small.uri, folder, conditions=["criterion=taylor"])
    first = (folder / "index.html").read_text()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'notes.txt', which is of no earlier report"):
        write_report(small.uri, folder)
    assert (folder / "index.html").read_text() == first
    (folder / "notes.txt").unlink()
    stale = set(folder.rglob("*.toml"))
    made = write_report(small.uri, folder, conditions=["criterion=random"])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == set(made.files)
    assert not stale & set(folder.rglob("*.toml"))
    for target, part in ((folder / "index.html", "is a file"), ("s3://b/x", "must be a folder")):
        with pytest.raises(ConfigError, match=part):
            write_report(small.uri, target)


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_whole_or_not_there(
    small: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "page"
    write_report(small.uri, folder, conditions=["criterion=taylor"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(StoreError, match="No space left on device"):
            write_report(small.uri, target, conditions=["criterion=random"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_nothing_finished_is_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", "sweep")
    store.claim(sweep_job())
    with pytest.raises(StoreError, match="holds no finished trial") as caught:
        write_report(store.uri, tmp_path / "page")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page").exists()


# -- many, far away --------------------------------------------------------------------------------

LISTED = 20
"""Names that a server gives in one answer here; elsewhere it is a thousand."""


@pytest.fixture
def far_away(moto_storage: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy that counts, in front of a server that lists in short answers."""
    ask = S3Objects._ask

    def ask_for_less(self: S3Objects, operation: str, **parameters: Any) -> Any:
        if operation == "list_objects_v2":
            parameters["MaxKeys"] = LISTED
        return ask(self, operation, **parameters)

    monkeypatch.setattr(S3Objects, "_ask", ask_for_less)
    endpoint = moto_storage.partition("endpoint_override=")[2].partition("&")[0]
    with FaultyProxy(endpoint, share=0.0) as proxy:
        yield proxy


@pytest.mark.usefixtures("undrawn")
def test_many_trials_far_away_cost_one_request_for_each_answer_of_a_listing(
    moto_storage: str, far_away: FaultyProxy, tmp_path: Path
) -> None:
    shape = {"shapes": {"a.weight": (8, 8), "b.weight": (8,)}, "rounds": 1}
    grid = {"criteria": ("taylor", "random"), "sparsities": (0.9,)}
    # Of five seeds the masks are compared; of the others nothing but the index is read.
    store = write_sweep(moto_storage, **grid, **shape, seeds=range(5))
    for criterion in grid["criteria"]:
        for seed in range(5, 55):
            job = sweep_job(criterion=criterion, sparsity=0.9, seed=seed, rounds=1)
            rounds = tuple(make_sweep_round(job, n, shape["shapes"]) for n in range(2))
            record = make_sweep_trial(job, rounds)
            store.objects.put(f"trials/{record.trial_id}/trial.json", seal_record(record))
    assert rebuild_index(store.objects) == 110
    place = store.uri.partition("?")[0]
    there = f"{place}?endpoint_override={far_away.endpoint}&scheme=http"

    def count(*words: str) -> int:
        far_away.seen.clear()
        assert CliRunner().invoke(app, words).exit_code == 0
        return far_away.seen.total()

    # Whose it is, what the index lacks, the index.
    assert count("results", there) == 3
    assert count("results", there, "--csv") == 3
    assert count("results", there, "--where", "criterion=taylor", "--rounds") == 3
    assert count("results", there, "--best", "accuracy@sparsity>=0.9") == 3
    # And which trials have no result, which were explained, a job of each curve, and what the
    # figures look at closely: a record and a mask of each of two curves and five seeds.
    listings, jobs, close_ups = math.ceil(110 / LISTED) + 1, 2, 2 * 2 * 5
    assert count("report", there, "--to", str(tmp_path / "page")) <= 3 + listings + jobs + close_ups
