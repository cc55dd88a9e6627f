"""`gbp-ray prune` and `sweep`: one trial or many, and the tables of what they found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gbp_ray import __version__
from gbp_ray.cli.measured import print_beside
from gbp_ray.cli.tables import (
    answers_table,
    ends_table,
    kinds_table,
    layer_table,
    plan_lines,
    plan_table,
    round_table,
    summary_lines,
    summary_table,
    sweep_plan_lines,
)
from gbp_ray.cli.terminal import (
    AsJson,
    IsDebug,
    IsQuiet,
    Job,
    Overrides,
    console,
    print_json,
    refuse_mistyped,
    say,
    warnings_in_lines,
)
from gbp_ray.results.records import TrialRecord

__all__ = [
    "add_running_verbs",
    "show_plan",
]

_STATES = ("finished", "stopped", "failed")


def add_running_verbs(app: typer.Typer) -> None:
    """Add the verbs, and the options that stand before any verb."""
    app.callback(invoke_without_command=True)(_options)
    app.command()(prune)
    app.command("sweep")(run_sweep)


def run_sweep(
    job: Annotated[str, typer.Argument(help="Job file (TOML) with a \\[sweep].", metavar="JOB")],
    overrides: Overrides = None,
    is_dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show what it would cost and what is done already; run nothing."
        ),
    ] = False,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
    is_debug: IsDebug = False,
) -> None:
    """Run many trials of a job: all that its \\[sweep] spans, or a search for a sparsity.

    As many trials run at a time as the cluster holds; the dense network and
    its scores are computed once for all. Run the same command again after an
    interruption: what has ended is kept, what was broken off goes on, what
    failed is tried again. Trials that fail are listed, and the exit code is 1
    only if all did.

    Examples:

      gbp-ray sweep jobs/digits_sweep.toml

      gbp-ray sweep job.toml --set sweep.scheduler=asha --set sweep.max_concurrent=4

      gbp-ray sweep job.toml --set sweep.target.max_drop=0.01 --json

      gbp-ray sweep job.toml --dry-run
    """
    # Before torch, which takes seconds to import: what is mistyped is refused at once.
    refuse_mistyped(job, overrides)
    from gbp_ray.runtime.api import plan_sweep, sweep

    with warnings_in_lines():
        if is_dry_run:
            show_plan(plan_sweep(job, overrides).to_dict(), as_json)
            return
        result = sweep(job, overrides, is_quiet=is_quiet, is_debug=is_debug)
    described = result.describe()
    if as_json:
        print_json(described)
        return
    if result.answers:
        console().print(answers_table(described["answers"]))
    else:
        out = console()
        out.print(summary_table(described["summary"], described["fields"], out.width))
    others = [*described["failed"], *described["stopped"]]
    if others:
        console().print(ends_table(others))
    counts = ", ".join(f"{described[f'num_{state}']} {state}" for state in _STATES)
    say(
        f"{len(result.outcomes)} trials: {counts}; {result.num_new} of them now, "
        f"{described['worker_seconds']:,.0f} worker-seconds in {result.seconds:,.0f} s",
        f"results: {result.uri}",
    )


def show_plan(planned: Mapping[str, Any], as_json: bool) -> None:
    """Shows what a sweep would do."""
    if as_json:
        print_json(planned)
        return
    if planned["kinds"]:
        console().print(kinds_table(planned["kinds"]))
    for line in sweep_plan_lines(planned):
        say(line)


def _options(
    is_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if is_version:
        typer.echo(f"gbp-ray {__version__}")
        raise typer.Exit


def prune(
    job: Job = None,
    overrides: Overrides = None,
    is_dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show what it would cost: memory, traffic, steps; run nothing."
        ),
    ] = False,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
    is_debug: IsDebug = False,
) -> None:
    """Prune a network: train or load it, score, remove, fine-tune, in rounds.

    Every round is kept in the job's storage folder: weights, masks,
    measurements. Run the same command again after an interruption and it
    goes on after the last whole round; a finished job answers at once.

    Workers (cluster.num_workers) are processes of this machine, or Ray's
    where a cluster is joined; cluster.launcher chooses.

    Examples:

      gbp-ray prune

      gbp-ray prune --set cluster.launcher=local

      gbp-ray prune --set prune.sparsity=0.95 --set prune.criterion=fisher

      gbp-ray prune --set prune.granularity=channel --set prune.target.macs=0.5

      gbp-ray prune my_job.toml --set cluster.num_workers=4 --json > result.json

      gbp-ray prune my_job.toml --dry-run
    """
    # Before torch, which takes seconds to import: what is mistyped is refused at once.
    refuse_mistyped(job, overrides)
    from gbp_ray.runtime.api import plan_prune
    from gbp_ray.runtime.api import prune as prune_network

    with warnings_in_lines():
        if is_dry_run:
            _print_plan(plan_prune(job, overrides).to_dict(), as_json)
            return
        result = prune_network(job, overrides, is_quiet=is_quiet, is_debug=is_debug)
    if as_json:
        print_json({"uri": result.uri, **describe_record(result.record)})
        return
    print_trial(result.record)
    say("", *summary_lines(result.record), f"weights and masks: {result.round_uri()}")
    pruned = result.record.job.prune
    if pruned.unit_kinds and not is_quiet:
        print_beside(result.uri, result.trusted, pruned.round_to)


def _print_plan(planned: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(planned)
        return
    say(planned["trial_id"])
    if planned["plan"]:
        console().print(plan_table(planned["plan"]))
    for line in plan_lines(planned):
        say(line)


def print_trial(record: TrialRecord) -> None:
    """Print a trial's tables: by round, then its final round by layer."""
    out = console()
    out.print(round_table(record))
    out.print(layer_table(record.final))


def describe_record(record: TrialRecord) -> dict[str, Any]:
    """Return a trial's record as the JSON of the verbs holds it."""
    reference = record.dense_reference.to_dict()
    return {**record.model_dump(mode="json"), "dense_reference": reference}
