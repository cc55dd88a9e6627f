"""The verbs that read what is stored: show, results, report, index, diff, fetch, verify, gc."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from gbp_ray.cli.running import describe_record, print_trial
from gbp_ray.cli.tables import (
    TableColumn,
    difference_table,
    fit_table,
    layer_table,
    overlap_table,
    results_table,
    summary_lines,
    widths_table,
    write_megabytes,
)
from gbp_ray.cli.terminal import (
    AsJson,
    Conditions,
    Place,
    console,
    note,
    print_csv,
    print_json,
    say,
)
from gbp_ray.errors import ConfigError, GbpError
from gbp_ray.results.store import locate_trials


def add_reading_verbs(app: typer.Typer) -> None:
    """Add the verbs that read, compare, copy and check what is stored."""
    app.command()(show)
    app.command("results")(list_results)
    app.command("report")(make_report)
    app.command("index")(make_index)
    app.command("diff")(show_difference)
    app.command("fetch")(copy_results)
    app.command("verify")(check_results)
    app.command("gc")(collect_garbage)


def show(
    uri: Place,
    as_json: AsJson = False,
) -> None:
    """Show one trial by round and by layer; for a folder of several, list them.

    Examples:

      gbp-ray show gbp-results

      gbp-ray show gbp-results/digits --json
    """
    trials = locate_trials(uri)
    if len(trials) > 1:
        rows = [_describe_trial(store, name) for store, name in trials]
        if as_json:
            print_json({"trials": rows})
            return
        # Scores are named by their metrics, of which there may be several.
        headings = [" or ".join(dict.fromkeys(names)) for names in zip(*rows, strict=True)]
        cells = zip(*(map(str, row.values()) for row in rows), strict=True)
        columns = [
            TableColumn(heading, list(column), "left", rank, widest=200)
            for heading, column, rank in zip(headings, cells, (0, 1, 2, 0, 0, 3), strict=True)
        ]
        table, left_out = fit_table(columns, console().width)
        console().print(table)
        if "uri" in left_out:
            say(*dict.fromkeys(f"in {store.trial_uri('')}" for store, _ in trials))
        return
    store, name = trials[0]
    record = store.read_trial(name)
    if record is None:
        rounds = store.read_rounds(name)
        if as_json:
            print_json(
                {
                    "trial_id": name,
                    "finished": False,
                    "rounds": [r.model_dump(mode="json") for r in rounds],
                }
            )
            return
        say(
            f"{name}: not finished, round {rounds[-1].round} is the last whole one; run the same "
            "job again to go on"
        )
        console().print(layer_table(rounds[-1]))
        return
    if as_json:
        print_json({"uri": store.trial_uri(name), "finished": True, **describe_record(record)})
        return
    print_trial(record)
    say(*summary_lines(record))


def list_results(
    uri: Place,
    conditions: Conditions = None,
    best: Annotated[
        str | None,
        typer.Option(metavar="METRIC@CONDITION", help="Show the one best round of all."),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Put the best first; by default by what judged them."),
    ] = None,
    is_every_round: Annotated[
        bool, typer.Option("--rounds", help="Show every round, not only the last of each trial.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="ROWS", help="Show so many; a table shows 100 unless told."),
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print all columns as CSV.")] = False,
) -> None:
    """List the finished trials of a job or storage, best first.

    Reads the index of the results, on a folder or under s3://, and needs
    nothing else. Any column will do for --where, --best and --sort: what was
    measured, such as accuracy or another metric of the workload, sparsity,
    macs_left or loss, and every field of the job, such as prune.criterion;
    --csv shows them all.

    Examples:

      gbp-ray results gbp-results

      gbp-ray results s3://bucket/prefix/my-job --best "accuracy@sparsity>=0.9"

      gbp-ray results gbp-results --best "accuracy@macs_left<=0.5"

      gbp-ray results gbp-results --where prune.criterion=taylor --sort loss --csv
    """
    # pyarrow takes a moment to import; --help should not.
    from gbp_ray.results.query import open_results

    if as_json and as_csv:
        raise ConfigError("--csv: cannot be given together with --json")
    everything = open_results(uri)
    results = everything.where(*(conditions or ()))
    if best is None and not len(results) and len(everything):
        met = " and ".join(conditions or ())
        note(f"none of {len(everything):,} rounds has {met}")
    if best is not None:
        row = results.best(best)
        if as_json:
            print_json(row)
        elif as_csv:
            print_csv([row])
        else:
            _print_results([row], results.find_varying())
            say(f"weights and masks: {row['uri']}")
        return
    results = results if is_every_round else results.final()
    shown = limit or (len(results) if as_json or as_csv else 100)
    # A limit counts for each workload, since the best of one are no worse than those of another.
    parts = [
        (title, part.sort(sort or part.metrics[0].name)) for title, part in results.by_workload()
    ]
    heads = [part.head(shown) for _, part in parts]
    if as_json:
        print_json({"results": [row for head in heads for row in head.to_rows()]})
    elif as_csv:
        print_csv([row for head in heads for row in head.to_rows()])
    else:
        for (title, part), head in zip(parts, heads, strict=True):
            if title:
                say(title)
            _print_results(head.to_rows(), part.find_varying())
            if num_more := len(part) - len(head):
                say(f"and {num_more:,} more (--limit ROWS shows them, --csv and --json show all)")


def make_report(
    uri: Place,
    to: Annotated[str, typer.Option(metavar="DIR", help="Receives the page.")] = "gbp-report",
    conditions: Conditions = None,
    as_json: AsJson = False,
) -> None:
    """Write a report on the finished trials: one HTML page, its figures, the jobs.

    Curves over sparsity, or over what is left where whole units are
    removed, with the spread over seeds, layers, widths, masks, cost,
    how to run each trial again, and what the results cannot show.

    Examples:

      gbp-ray report s3://bucket/prefix/my-job --to my-report --where rounds=5
    """
    from gbp_ray.report.drawing import count_spare_processes
    from gbp_ray.report.page import write_report

    report = write_report(
        uri, to, conditions=conditions or (), num_processes=count_spare_processes()
    )
    if as_json:
        print_json({**asdict(report), "page": str(report.page)})
        return
    for text in report.left_out:
        say(f"left out: {text}")
    say(f"{report.page}: {report.num_trials:,} trials, {len(report.files)} files")


def make_index(uri: Place, as_json: AsJson = False) -> None:
    """Make the index of results anew from their records.

    The index, index.parquet in the job's folder, is kept up to date by the
    jobs themselves; this mends one that is damaged, or results that were
    copied or removed by hand. pyarrow, pandas, DuckDB and Polars read it.

    Examples:

      gbp-ray index gbp-results/digits
    """
    from gbp_ray.results.index import rebuild_index
    from gbp_ray.results.store import locate_jobs

    locate_trials(uri)
    stores, _ = locate_jobs(uri)
    counts = {store.uri: rebuild_index(store.objects) for store in stores}
    if as_json:
        print_json({"indexed": counts})
        return
    for place, number in counts.items():
        say(f"{place}: {number} finished trials")


def show_difference(
    one: Annotated[str, typer.Argument(help="A trial's address.", metavar="A")],
    other: Annotated[str, typer.Argument(help="Another one's.", metavar="B")],
    as_json: AsJson = False,
) -> None:
    """Compare two trials: job, measurements, and how far they keep the same weights.

    The overlap of two masks is the share of weights that both keep among
    those that either keeps, by layer and over all.

    Examples:

      gbp-ray diff gbp-results/digits/trials/A gbp-results/digits/trials/B

      gbp-ray diff gbp-results/digits s3://bucket/prefix/digits --json
    """
    from gbp_ray.results.compare import compare_trials

    found = compare_trials(one, other)
    if as_json:
        print_json(found)
        return
    for name, place in zip("AB", found["trials"], strict=True):
        say(f"{name}: {place}")
    if found["config"] is None:
        say("job: a trial that has not finished does not tell")
    elif found["config"]:
        console().print(difference_table(found["config"], "job"))
    else:
        say("job: no difference")
    console().print(difference_table(found["metrics"], "measured"))
    if "widths" in found:
        console().print(widths_table(found["widths"]))
    console().print(overlap_table(found["masks"]))
    if found["overlap"] is not None:
        say(f"overlap of the masks {found['overlap']:.2%}")


def copy_results(
    uri: Place,
    folder: Annotated[str, typer.Argument(help="Folder that receives them.", metavar="DIR")],
    as_json: AsJson = False,
) -> None:
    """Copy results to a folder, each file checked on the way.

    The folder then is a storage like any other. Run it again and it copies
    what is new.

    Examples:

      gbp-ray fetch s3://bucket/prefix/my-job results

      gbp-ray show results/my-job
    """
    from gbp_ray.results.maintenance import fetch_results

    fetched = fetch_results(uri, folder)
    if as_json:
        print_json({"folder": folder, **asdict(fetched)})
        return
    say(
        f"{folder}: {fetched.num_trials} trials, {fetched.num_rounds} rounds of them new, "
        f"{write_megabytes(fetched.num_bytes)} MB"
    )


def check_results(uri: Place, as_json: AsJson = False) -> None:
    """Read everything and check it against its records; exit code 1 if anything is wrong.

    Checked are all checksums, every sparsity as counted in the stored
    weights, the masks, and that records and index agree.

    Examples:

      gbp-ray verify gbp-results

      gbp-ray verify s3://bucket/prefix/my-job --json
    """
    from gbp_ray.results.maintenance import find_faults

    audit = find_faults(uri)
    if as_json:
        faults = [{"uri": place, "fault": fault} for place, fault in audit.faults]
        print_json({**asdict(audit), "faults": faults})
    else:
        for place, fault in audit.faults:
            say(f"{place}: {fault}")
        say(
            f"{audit.num_trials} trials, {audit.num_rounds} rounds, {audit.num_files} files, "
            f"{write_megabytes(audit.num_bytes)} MB: "
            + (f"{len(audit.faults)} faults" if audit.faults else "all as claimed")
        )
    if audit.faults:
        raise GbpError(f"'{uri}': {len(audit.faults)} faults, the first in {audit.faults[0][0]}")


def collect_garbage(
    uri: Place,
    is_removing: Annotated[bool, typer.Option("--remove", help="Remove what is listed.")] = False,
    is_unfinished_too: Annotated[
        bool, typer.Option("--unfinished", help="Give up unfinished trials, whole rounds and all.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List what dead jobs have left; with --remove, remove it.

    That is: files of rounds that were never committed, uploads that never
    ended, marks of dead drivers. What a live driver is at work on stays, and
    so does what an unfinished trial needs to go on.

    Examples:

      gbp-ray gc s3://bucket/prefix/my-job

      gbp-ray gc s3://bucket/prefix/my-job --remove
    """
    from gbp_ray.results.maintenance import find_garbage, remove_garbage

    items = find_garbage(uri, is_unfinished_too=is_unfinished_too)
    if not as_json:
        for item in items:
            say(f"{item.uri}  {item.num_bytes:,} bytes: {item.why}")
    removed = remove_garbage(items) if is_removing else []
    num_bytes = sum(item.num_bytes for item in items)
    if as_json:
        rows = [{"uri": i.uri, "num_bytes": i.num_bytes, "why": i.why} for i in items]
        print_json({"garbage": rows, "num_bytes": num_bytes, "num_removed": len(removed)})
        return
    done = f"{len(removed)} removed" if is_removing else "nothing removed (--remove does)"
    say(f"{len(items)} left over, {write_megabytes(num_bytes)} MB; {done}")


def _print_results(rows: list[dict[str, Any]], fields: list[str]) -> None:
    out = console()
    table, left_out = results_table(rows, fields, out.width)
    out.print(table)
    if left_out:
        say(f"no room for {', '.join(left_out)} (--csv and --json show them)")


def _describe_trial(store: Any, name: str) -> dict[str, object]:
    record = store.read_trial(name)
    last = store.read_rounds(name)[-1]
    # An error may be far below 1.
    score = round(last.score, 4) if last.metric.unit == "%" else float(f"{last.score:.6g}")
    return {
        "trial": name,
        "finished": record is not None,
        "round": last.round,
        **(
            {"sparsity": round(last.sparsity, 4)}
            if last.cost.units is None
            else {"left": last.reached.removesuffix(" left")}
        ),
        last.metric.name: score,
        "uri": store.trial_uri(name),
    }
