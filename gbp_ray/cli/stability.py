"""`gbp-ray stability`: how much a job's result depends on its seed and its calibration sample."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gbp_ray.cli.tables import RE_ESTIMATED, make_table
from gbp_ray.cli.terminal import (
    AsJson,
    IsQuiet,
    Job,
    Overrides,
    console,
    print_json,
    progress_printer,
    refuse_mistyped,
    say,
    warnings_in_lines,
)
from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.errors import ConfigError
from gbp_ray.results.folder import write_target

__all__ = [
    "add_stability_verb",
]


def add_stability_verb(app: typer.Typer) -> None:
    """Puts the verb on the command line."""
    app.command("stability")(show_stability)


def show_stability(
    job: Job = None,
    overrides: Overrides = None,
    num_seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", help="Samples and seeds, from the job's own up.")
    ] = 3,
    examples: Annotated[
        str,
        typer.Option(
            metavar="SIZES", help="Calibration examples: 64:8192 doubles, 64,100,1000 lists."
        ),
    ] = "64:8192",
    criteria: Annotated[
        list[str] | None,
        typer.Option("--criterion", metavar="NAME", help="Instead of the job's own; repeatable."),
    ] = None,
    is_evaluated: Annotated[
        bool, typer.Option("--accuracy", help="Measure the metric under each sample's mask.")
    ] = False,
    with_samples: Annotated[
        bool, typer.Option("--samples/--no-samples", help="Compare calibration samples.")
    ] = True,
    with_seeds: Annotated[
        bool, typer.Option("--trained/--no-trained", help="Run the whole job over seeds.")
    ] = True,
    is_sweep: Annotated[
        bool, typer.Option("--sweep", help="Run the seeds as a sweep on Ray, not one by one.")
    ] = False,
    to: Annotated[
        str, typer.Option(metavar="DIR", help="Receives stability.png and stability.json.")
    ] = "gbp-stability",
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Measure how stable a job is: over calibration samples, and over seeds.

    Samples: one dense network is scored on samples of growing size and
    pruned at once to the job's sparsity; the masks of two samples are
    compared. Nothing is fine-tuned, and all sizes share one pass.

    Seeds: the whole job runs once per seed, kept like any other trial; last
    masks and scores are compared.

    Examples:

      gbp-ray stability jobs/cifar10_resnet20.toml --no-trained --criterion fisher

      gbp-ray stability job.toml --seeds 5 --examples 128:2048 --json
    """
    sizes = _read_sizes(examples)
    # Before torch, which takes seconds to import: what is mistyped is refused at once.
    refuse_mistyped(job, overrides)
    from gbp_ray.report.drawing import render
    from gbp_ray.report.stability_figure import draw_stability
    from gbp_ray.runtime.stability import measure_stability

    if not (with_samples or with_seeds):
        raise ConfigError("--no-samples --no-trained: leave nothing to do; give one of them")
    # Before hours of work, rather than after.
    write_target(Path(to), {}, "--to")
    with warnings_in_lines():
        found = measure_stability(
            job,
            overrides,
            num_seeds=num_seeds,
            sizes=sizes,
            criteria=criteria or (),
            is_evaluated=is_evaluated,
            with_samples=with_samples,
            with_seeds=with_seeds,
            is_sweep=is_sweep,
            on_progress=progress_printer(is_quiet),
        ).to_dict()
    files = {"stability.json": json.dumps(found, indent=1).encode() + b"\n"}
    if drawn := render(partial(draw_stability, found), "stability"):
        files["stability.png"] = drawn[1]
    write_target(Path(to), files, "--to")
    if as_json:
        print_json({**found, "folder": to})
        return
    metric = MetricSpec.model_validate(found.get("metric", ACCURACY))
    for criterion, one in found["samples"].items():
        console().print(_samples_table(criterion, one, metric))
        goal = found.get("target", f"sparsity {found['sparsity']:.2%}")
        say(_answer(criterion, one, found["stable"], goal, found["available_examples"]))
    if found["seeds"]:
        console().print(_seeds_table(found["seeds"], metric))
        console().print(_layers_table(found["seeds"]["overlap"]))
        say(_answer_seeds(found["seeds"], metric))
    say(f"figure and numbers: {to}/stability.png, {to}/stability.json")


def _read_sizes(text: str) -> list[int]:
    if doubling := re.fullmatch(r"(\d+):(\d+)", text):
        size, last = int(doubling[1]), int(doubling[2])
        sizes = []
        while 0 < size <= last:
            sizes.append(size)
            size *= 2
        if sizes:
            return sizes
    elif re.fullmatch(r"\d+(,\d+)*", text) and "0" not in text.split(","):
        return [int(part) for part in text.split(",")]
    raise ConfigError(
        f"--examples = '{text}': must read FIRST:LAST, which doubles, or N,N,..., such as 64:8192"
    )


def _samples_table(criterion: str, one: Mapping[str, Any], metric: MetricSpec) -> Table:
    has_scores = any(size[metric.name]["num"] for size in one["sizes"])
    rows = []
    for size in one["sizes"]:
        overlap, score = size["overlap"], size[metric.name]
        own = [f"{overlap[name]:.2%}" for name in ("mean", "least", "chance")]
        cells = [
            f"{size['examples']:,}",
            *(["all there are", "", ""] if size["is_whole"] else own),
            f"{size['overlap_to_largest']['mean']:.2%}",
        ]
        if has_scores:
            cells += [metric.write(score["mean"]), metric.write(score["deviation"])]
        rows.append(cells)
    headings = ["examples", "overlap", "least", "at random", "with the largest"]
    headings += [metric.name, "+-"] if has_scores else []
    return make_table(rows, (), headings, title=criterion)


def _seeds_table(seeds: Mapping[str, Any], metric: MetricSpec) -> Table:
    rows = []
    for trial in seeds["trials"]:
        scores = (metric.write(trial[name]) for name in (metric.name, f"dense_{metric.name}"))
        mark = "*" if trial["dense_is_recalibrated"] else ""
        sparsity = f"{trial['sparsity']:.2%}"
        rows.append((str(trial["seed"]), trial["trial_id"], sparsity, *scores, mark))
    numbers = ("sparsity", metric.name, "dense", "")
    table = make_table(rows, ("seed", "trial"), numbers, title="seeds")
    if any(trial["dense_is_recalibrated"] for trial in seeds["trials"]):
        table.caption = RE_ESTIMATED
    return table


def _layers_table(overlap: Mapping[str, Any]) -> Table:
    rows = ((name, f"{value:.2%}") for name, value in overlap["by_layer"].items())
    return make_table(rows, ["layer"], ["overlap over seeds"])


def _answer(
    criterion: str, one: Mapping[str, Any], stable: float, goal: str, available: int
) -> str:
    samples = [size for size in one["sizes"] if not size["is_whole"]]
    if not samples:
        return (
            f"{criterion}: each sample is all {available:,} training examples, so nothing can be "
            "said about sampling; give smaller sizes to --examples"
        )
    if (enough := one["enough_examples"]) is not None:
        text = (
            f"{criterion}: from {enough:,} examples on, two samples give masks of {goal} "
            f"that overlap by {stable:.0%} or more"
        )
    else:
        enough = samples[-1]["examples"]
        text = (
            f"{criterion}: two samples of {enough:,} examples still give masks of {goal} "
            f"that overlap by only {samples[-1]['overlap']['mean']:.2%}"
        )
    if enough > available / 2:
        text += (
            f"; of {available:,} training examples such samples share {enough / available:.0%}, "
            "which makes them alike"
        )
    return text


def _answer_seeds(seeds: Mapping[str, Any], metric: MetricSpec) -> str:
    score, overlap = seeds[metric.name], seeds["overlap"]
    return (
        f"{score['num']} seeds: {metric.name} {metric.write(score['mean'])} +- "
        f"{metric.write(score['deviation'])}, masks overlap by {overlap['mean']:.2%}, at random by "
        f"{overlap['chance']:.2%}"
    )
