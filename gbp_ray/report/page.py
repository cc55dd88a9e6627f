"""The report: one HTML page that needs nothing else, its figures as PNG files, its jobs as TOML.

Written from the index and a few records, without torch or Ray. A reader sees a whole page or none:
everything is made and written aside first and moved into place last. A folder that holds anything
but an earlier report is left as it is.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from gbp_ray import __version__
from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.config.metrics import ACCURACY
from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.report.captions import sketch_workload
from gbp_ray.report.checklist import Check, answer_checklist
from gbp_ray.report.curves import (
    Curve,
    Point,
    Trial,
    WorkloadCurves,
    gather_curves,
)
from gbp_ray.report.details import CloseUp, look_closely
from gbp_ray.report.drawing import PageFigure, draw_figures
from gbp_ray.report.spreads import write_change, write_percent, write_score, write_spread
from gbp_ray.report.trial_page import make_trial_page
from gbp_ray.results.folder import check_target, write_target
from gbp_ray.results.goals import COSTS
from gbp_ray.results.index import map_in_threads
from gbp_ray.results.lease import is_held
from gbp_ray.results.objects import is_key
from gbp_ray.results.query import Results, read_results
from gbp_ray.results.records import dump_job
from gbp_ray.results.scores import write_share
from gbp_ray.results.store import Store, locate_jobs

__all__ = [
    "Report",
    "write_report",
]

_PAGE = "index.html"
_MARK = re.compile(r'<meta name="gbp-ray-report" content="([^"]*)">')
_MARK_BYTES = 500_000
_MOST_WORKLOADS, _MOST_TRIALS, _MOST_POINTS = 6, 200, 120
_MOST_UNFINISHED, _MOST_JOBS = 30, 40
_MOST_PAGES = 20


@dataclass(frozen=True)
class Report:
    """The files of a report.

    Attributes:
        page: The HTML file.
        files: Every file, relative to the page's folder.
        num_trials: Finished trials that the figures are of.
        left_out: Parts that the page does not show, a sentence each.
    """

    page: Path
    files: tuple[str, ...]
    num_trials: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """The job of a curve, for running its trials again."""

    label: str
    file: str
    text: str


@dataclass
class Section:
    """One workload of the page."""

    number: int
    curves: WorkloadCurves
    checks: list[Check]
    figures: list[PageFigure] = field(default_factory=list)
    close_ups: list[CloseUp] = field(default_factory=list)
    recipes: list[Recipe] = field(default_factory=list)
    commands: dict[tuple[str, str], str] = field(default_factory=dict)
    pages: dict[tuple[str, str], str] = field(default_factory=dict)
    rows: list[tuple[Curve, Any]] = field(default_factory=list)
    trials: list[tuple[Curve, Trial]] = field(default_factory=list)


@dataclass(frozen=True)
class Unfinished:
    """A trial that started and has no result."""

    job: str
    trial_id: str
    state: str


def write_report(
    uri: str | Path,
    to: str | Path = "gbp-report",
    *,
    conditions: Sequence[str] = (),
    num_processes: int = 1,
) -> Report:
    """Writes a report on the finished trials of a storage, a job or one trial.

    Args:
        uri: A trial's, a job's or a storage's address.
        to: The folder that receives `index.html` and the files beside it. It may hold an earlier
            report, which is replaced, and nothing else.
        conditions: Keeps the trials whose last round meets them, as `Results.where` reads them.
        num_processes: Draws figures in as many processes, which are forked if more than one: only
            for a program without threads that hold locks.

    Raises:
        ConfigError: A condition cannot be read, or the folder holds something else.
        StoreError: There is no finished trial, or the folder cannot be written.
    """
    folder = check_target(to, "--to", "report", _earlier_files)
    with _uncollected():
        return _write_report(uri, folder, conditions, num_processes)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Stop the garbage collector, which would visit every trial for each figure."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _write_report(
    uri: str | Path, folder: Path, conditions: Sequence[str], num_processes: int
) -> Report:
    stores, only = locate_jobs(uri)
    everything = read_results(uri, stores, only)
    results = everything.ending_with(*conditions)
    by_name = {store.name: store for store in stores}
    left_out: list[str] = []
    unfinished, num_unfinished = ([], 0) if only else _find_unfinished(stores, everything, left_out)
    workloads = gather_curves(results)
    if len(workloads) > _MOST_WORKLOADS:
        workloads.sort(key=lambda curves: -len(curves.trials))
        hidden = [curves.title for curves in workloads[_MOST_WORKLOADS:]]
        left_out.append(f"{len(hidden)} of {len(workloads)} workloads: {'; '.join(hidden[:9])}")
    versions = _list_versions(results)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    files: dict[str, bytes] = {}
    sections = []
    for number, curves in enumerate(workloads[:_MOST_WORKLOADS], start=1):
        checks = answer_checklist(
            curves,
            num_workloads=len(workloads),
            versions=versions,
            num_unfinished=num_unfinished,
        )
        section = Section(number, curves, checks)
        _fill_section(section, by_name, files, left_out, num_processes)
        _add_trial_pages(
            section,
            by_name,
            files,
            left_out,
            made,
            is_single=only is not None,
            num_processes=num_processes,
        )
        sections.append(section)
    left_out = list(dict.fromkeys(left_out))
    names = sorted([_PAGE, *files])
    page = _template("page.html.j2").render(
        uri=str(uri),
        made=made,
        version=__version__,
        conditions=conditions,
        sections=sections,
        unfinished=unfinished,
        num_unfinished=num_unfinished,
        versions=versions,
        left_out=left_out,
        mark=" ".join(f"{name}={_digest(data)}" for name, data in sorted(files.items())),
        num_trials=sum(len(curves.trials) for curves in workloads),
    )
    files[_PAGE] = page.encode()
    # The page comes last.
    write_target(folder, files, stale=_earlier_files(folder))
    return Report(
        page=folder / _PAGE,
        files=tuple(names),
        num_trials=sum(len(section.curves.trials) for section in sections),
        left_out=tuple(left_out),
    )


def _find_unfinished(
    stores: Iterable[Store], results: Results, left_out: list[str]
) -> tuple[list[Unfinished], int]:
    """Describes some trials that have no result, and counts them all."""
    table = results.table
    finished = set(zip(table["job"].to_pylist(), table["trial_id"].to_pylist(), strict=True))
    places = [
        (store, trial)
        for store in stores
        for trial in store.objects.list_folders("trials/")
        if (store.name, trial) not in finished
    ]
    if len(places) > _MOST_UNFINISHED:
        left_out.append(
            f"{len(places) - _MOST_UNFINISHED:,} of {len(places):,} trials without a result"
        )
    return [
        Unfinished(
            store.name,
            trial,
            _describe_unfinished(store, trial),
        )
        for store, trial in places[:_MOST_UNFINISHED]
    ], len(places)


def _describe_unfinished(store: Store, trial: str) -> str:
    try:
        if is_held(store.objects, f"trials/{trial}"):
            return "running"
        rounds = store.read_rounds(trial)
        failure, stop = store.read_failure(trial), store.read_stop(trial)
    except StoreError as error:
        return str(error)
    done = f"round {rounds[-1].round} is its last whole one" if rounds else "no whole round"
    if failure is not None:
        return f"failed: {failure.cause}; {done}"
    return f"stopped{' by the scheduler' if stop is not None else ''}; {done}"


def _list_versions(results: Results) -> list[str]:
    table = results.table
    names = [name for name in table.column_names if name.startswith("versions.")]
    if not names:
        return []
    found = table.select(names).group_by(names).aggregate([]).to_pylist()
    return sorted(
        ", ".join(f"{name.partition('.')[2]} {value}" for name, value in row.items() if value)
        for row in found
    )


# -- a workload ------------------------------------------------------------------------------------


def _fill_section(
    section: Section,
    stores: Mapping[str, Store],
    files: dict[str, bytes],
    left_out: list[str],
    num_processes: int,
) -> None:
    curves = section.curves
    section.close_ups, omitted = look_closely(curves, stores)
    left_out += omitted
    sketches = sketch_workload(curves, section.close_ups)
    suffix = "" if section.number == 1 else f"-{section.number}"
    section.figures = draw_figures(
        sketches, lambda name: f"{name}{suffix}.png", f"w{section.number}", num_processes
    )
    files |= {figure.name: figure.png for figure in section.figures}

    best = "most accurate" if curves.metric == ACCURACY else "best"
    pairs = [(curve, point) for curve in curves.curves for point in curve.points]
    front = {id(point) for _, point in curves.front}
    section.rows = pairs
    if len(pairs) > _MOST_POINTS:
        ranked = sorted(pairs, key=lambda pair: (id(pair[1]) not in front, -curves.rank(pair[1])))
        kept = {id(point) for _, point in ranked[:_MOST_POINTS]}
        section.rows = [pair for pair in pairs if id(pair[1]) in kept]
        left_out.append(
            f"table of points: {len(pairs) - _MOST_POINTS} of {len(pairs)}; the front and the "
            f"{best} are there"
        )
    trials = [(curve, trial) for curve, point in pairs for trial in point.trials]
    rank = curves.metric.rank
    trials.sort(key=lambda pair: (-rank(pair[1].final.score), pair[1].trial_id))
    if len(trials) > _MOST_TRIALS:
        left_out.append(
            f"table of trials: {len(trials) - _MOST_TRIALS:,} of {len(trials):,}; the {best} are "
            "there, and gbp-ray results --csv lists all"
        )
    section.trials = trials[:_MOST_TRIALS]
    _add_recipes(section, stores, files, left_out)


def _add_trial_pages(
    section: Section,
    stores: Mapping[str, Store],
    files: dict[str, bytes],
    left_out: list[str],
    made: str,
    *,
    is_single: bool,
    num_processes: int,
) -> None:
    """Make the pages of the explained trials; if the report is of one trial, make its page."""
    explained = {
        (job, name)
        for job in {trial.job for _, trial in section.trials}
        for name in stores[job].objects.list_folders("explained/")
    }
    wanted = [t for _, t in section.trials if is_single or (t.job, t.trial_id) in explained]
    if len(wanted) > _MOST_PAGES:
        left_out.append(f"pages of {len(wanted) - _MOST_PAGES} of {len(wanted)} explained trials")
    if not wanted:
        return
    template = _template("trial.html.j2")
    for trial in wanted[:_MOST_PAGES]:
        stem = f"trials/{trial.job}-{trial.trial_id}"
        try:
            made_files = make_trial_page(
                stores[trial.job], trial.trial_id, stem, made, template, num_processes
            )
        except StoreError as error:
            if type(error) is not StoreError:
                # The storage does not answer; the results may be sound.
                raise
            left_out.append(f"page of {trial.trial_id}: {error}")
            continue
        files |= made_files
        section.pages[trial.job, trial.trial_id] = next(iter(made_files))


def _add_recipes(
    section: Section, stores: Mapping[str, Store], files: dict[str, bytes], left_out: list[str]
) -> None:
    """Writes a job file per curve, and finds the command of each listed trial from it.

    A command is given only if the job that it makes has the id of the trial on record.
    """
    curves = list({id(curve): curve for curve, _ in section.trials}.values())
    if len(curves) > _MOST_JOBS:
        left_out.append(f"job files of curves beyond {_MOST_JOBS}")
    numbered = list(enumerate(curves[:_MOST_JOBS], start=1))

    def make(item: tuple[int, Curve]) -> tuple[Recipe, JobConfig] | None:
        return _make_recipe(section, item[1], stores, item[0])

    objects = next(iter(stores.values())).objects
    jobs: dict[int, tuple[Recipe, JobConfig]] = {}
    for (_, curve), made in zip(numbered, map_in_threads(objects, make, numbered), strict=True):
        if made is not None:
            jobs[id(curve)] = made
            section.recipes.append(made[0])
            files[made[0].file] = made[0].text.encode()
    for curve, trial in section.trials:
        if (made := jobs.get(id(curve))) is None:
            continue
        kind = made[1].prune.target.kind
        goal = "prune.sparsity" if kind is None else f"prune.target.{kind}"
        overrides = {goal: trial.target, "seed": trial.seed}
        try:
            is_same = trial_id(load_job(made[1], overrides)) == trial.trial_id
        except ConfigError:
            is_same = False
        if is_same:
            settings = " ".join(f"--set {name}={value}" for name, value in overrides.items())
            command = f"gbp-ray prune {made[0].file} {settings}"
            section.commands[trial.job, trial.trial_id] = command


def _make_recipe(
    section: Section, curve: Curve, stores: Mapping[str, Store], number: int
) -> tuple[Recipe, JobConfig] | None:
    trial = curve.points[-1].trials[0]
    try:
        record = stores[trial.job].read_trial(trial.trial_id)
        if record is None:
            return None
        text = dump_job(record.job)
        job = JobConfig.model_validate(tomllib.loads(text))
    except (StoreError, TypeError, ValueError):
        # What TOML cannot say, or what this version would refuse, has no command to show.
        return None
    stem = re.sub(r"[^a-z0-9]+", "-", curve.label.lower()).strip("-")[:40] or "job"
    file = f"jobs/{section.number}-{number:02d}-{stem}.toml"
    return Recipe(curve.label, file, text), job


# -- the page --------------------------------------------------------------------------------------


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gbp_ray.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": write_percent,
        "score": write_score,
        "change": write_change,
        "times": lambda spread: write_spread(spread, lambda v: f"{v:.2f}x", 1, is_quiet=True),
        "sparsity": lambda spread: write_spread(
            spread, lambda v: f"{100 * v:.2f}", 100, is_quiet=True
        ),
        "plain": lambda spread: write_spread(spread, lambda value: f"{value:.4f}", 1),
        "seconds": lambda spread: f"{spread.mean:,.1f}",
        "share": lambda value: f"{100 * value:.4g} %",
        "left": lambda share: "not counted" if share is None else f"{100 * share:.2f}",
        "width": lambda spread: write_spread(spread, lambda v: f"{v:.4g}", 1, is_quiet=True),
        "left_of": _write_left,
        "goal_of": lambda close_up: (
            str(close_up.goal) if close_up.widths else f"{100 * close_up.target:.4g} %"
        ),
        "percent_of": lambda value: write_share(value).removesuffix("%"),
        "count": lambda value: f"{value:,.0f}",
        "without_sign": lambda text: text.removesuffix(" %"),
        "within_a_point": _find_within_a_point,
        "spent": lambda curves: sum(sum(t.worker_seconds.values()) for t in curves.trials),
        "is_on_front": lambda curves, point: any(point is other for _, other in curves.front),
        "curve_labels": lambda layers: list(dict.fromkeys(name for s in layers for name in s)),
    }
    return environment.get_template(name)


def _write_left(removed: float, curves: WorkloadCurves) -> str:
    """Writes a sparsity, or what is left of the cost that curves are drawn over."""
    if curves.measure not in COSTS:
        return f"{100 * removed:.4g} %"
    return f"{100 * (1 - removed):.4g} % of {COSTS[curves.measure]}"


def _find_within_a_point(curves: WorkloadCurves) -> tuple[Curve, Point] | None:
    """Finds the smallest point that loses no more than a percentage point, or a percent of dense.

    Of equal ones the one with the best score, then with the least loss, then the first.
    """

    def rank(pair: tuple[Curve, Point]) -> tuple[float, float, float]:
        point = pair[1]
        # Measured sparsities of equal jobs may differ by a weight.
        return (
            round(point.removed(curves.measure), 4),
            curves.rank(point),
            -math.inf if point.loss is None else -point.loss.mean,
        )

    if curves.metric_fault or curves.metric_doubt:
        return None
    metric = curves.metric
    allowed = 0.01 * (1.0 if metric.unit == "%" else abs(curves.dense.mean)) + 1e-9
    sign = 1 if metric.higher_is_better else -1
    pairs = [(c, p) for c in curves.curves for p in c.points if sign * p.drop.mean >= -allowed]
    return max(pairs, key=rank) if pairs else None


# -- the folder ------------------------------------------------------------------------------------


def _earlier_files(folder: Path) -> set[str]:
    """Lists the files of an earlier report: those that are as its page says that they were."""
    try:
        with (folder / _PAGE).open("rb") as file:
            mark = _MARK.search(file.read(_MARK_BYTES).decode(errors="replace"))
    except OSError:
        return set()
    if mark is None:
        return set()
    listed = (entry.rpartition("=") for entry in mark[1].split())
    found = {name for name, _, digest in listed if _is_as_written(folder, name, digest)}
    return found | {_PAGE}


def _is_as_written(folder: Path, name: str, digest: str) -> bool:
    """Check whether a file inside a folder is as a report wrote it."""
    path = folder / name
    if not is_key(name) or path.resolve() != folder.resolve() / name:
        return False
    try:
        return _digest(path.read_bytes()) == digest
    except OSError:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
