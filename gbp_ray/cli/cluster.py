"""`gbp-ray submit` and what follows it: jobs on a cluster elsewhere."""

from __future__ import annotations

import time
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from gbp_ray import __version__
from gbp_ray.cli.tables import make_table, write_megabytes
from gbp_ray.cli.terminal import (
    AsJson,
    Job,
    Overrides,
    console,
    note,
    print_json,
    refuse_mistyped,
    say,
    warnings_in_lines,
    write_log,
)
from gbp_ray.runtime.packaging import SECRET, describe_left_out
from gbp_ray.runtime.signals import STOPPED
from gbp_ray.runtime.submission import Submission, prepare_submission

if TYPE_CHECKING:
    from gbp_ray.runtime.on_ray.head import Head, JobState

__all__ = [
    "add_cluster_verbs",
]

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's head, http://HEAD:8265; otherwise RAY_API_SERVER_ADDRESS says.",
    ),
]

Name = Annotated[
    str,
    typer.Argument(help="A job's submission id, or the beginning of it.", metavar="ID"),
]

Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Show what the job says until it ends.")
]


def add_cluster_verbs(app: typer.Typer) -> None:
    """Adds the verbs of this module to the command line."""
    app.command("submit")(submit_job)
    app.command("jobs")(list_jobs)
    app.command("status")(show_status)
    app.command("logs")(show_log)
    app.command("stop")(stop_job)


def submit_job(
    job: Job = None,
    overrides: Overrides = None,
    address: Address = None,
    is_sweep: Annotated[
        bool, typer.Option("--sweep", help="Run it as a sweep, as a job with a space is anyway.")
    ] = False,
    is_followed: Follow = False,
    is_waiting: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait", help="Wait until the job has passed its own checks on the cluster."
        ),
    ] = True,
    folder: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="What goes along; by default the job file's own folder."),
    ] = None,
    env_names: Annotated[
        list[str] | None,
        typer.Option(
            "--env", metavar="NAME", help="A variable of this environment to set there; repeatable."
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="A file or folder of what goes along that would be left out; repeatable.",
        ),
    ] = None,
    is_installed: Annotated[
        bool, typer.Option("--installed", help="Use the gbp-ray of the nodes; send none along.")
    ] = False,
    is_dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go; ask the cluster nothing.")
    ] = False,
    as_json: AsJson = False,
    is_debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Submit a job to a Ray cluster: the same file that runs here runs there.

    The code and data of the job file's folder go along, without what
    .gitignore and .rayignore leave out and without what looks like a secret,
    and this very version of gbp-ray. Results go to the job's
    storage, which must be s3:// or a folder that all nodes share. Submitting
    a job that runs already starts nothing; submitting one that was broken off
    goes on after its last whole round.

    Exit codes: 0 submitted, or with --follow succeeded; the job's own code if
    it failed; 130 if it was stopped, or if Ctrl-C ended only the following.

    Examples:

      gbp-ray submit job.toml --address http://head:8265 --set storage=s3://bucket/prefix

      gbp-ray submit job.toml --follow

      gbp-ray submit sweep.toml --env HF_HOME --no-wait
    """
    # Before Ray, which takes a second to import: what is mistyped is refused at once.
    refuse_mistyped(job, overrides)
    from gbp_ray.runtime.on_ray.head import Head, find_address

    place = None if is_dry_run and address is None else find_address(address)
    with warnings_in_lines():
        submission = prepare_submission(
            job,
            overrides,
            address=place,
            is_sweep=is_sweep,
            folder=folder,
            env_names=env_names or (),
            include=include or (),
            is_installed=is_installed,
        )
    if is_dry_run:
        _show_submission(submission, is_installed, as_json)
        return
    assert place is not None
    head = Head(place)
    state, is_new = head.send(
        submission,
        lambda: note(_describe_package(submission, is_installed, place)),
    )
    try:
        if is_followed:
            state = _follow(head, state, to_errors=as_json)
        elif is_waiting and is_new:
            state = head.await_checks(state.submission_id)
    except KeyboardInterrupt:
        _detach(state)
    if as_json:
        print_json(
            {
                **state.to_dict(),
                "is_new": is_new,
                "address": place,
                "package": submission.describe(),
            }
        )
    state.check()
    if not as_json:
        _say_submitted(state, is_new, is_followed)


def list_jobs(address: Address = None, as_json: AsJson = False) -> None:
    """List the jobs that gbp-ray has submitted to a cluster, the newest last.

    Examples:

      gbp-ray jobs --address http://head:8265
    """
    jobs = _head(address).jobs()
    if as_json:
        print_json({"jobs": [job.to_dict() for job in jobs]})
        return
    if not jobs:
        say("no jobs")
        return
    rows = []
    for job in jobs:
        code = "" if job.exit_code is None else str(job.exit_code)
        rows.append((job.submission_id, job.state, code, _when(job), _took(job), job.uri))
    headings = ("job", "state", "exit code", "submitted", "took", "results")
    console().print(make_table(rows, headings))


def show_status(name: Name, address: Address = None, as_json: AsJson = False) -> None:
    """Tell how far a job on a cluster is.

    Exit codes: 0 if it succeeded, waits or runs; its own if it failed; 130 if
    it was stopped.

    Examples:

      gbp-ray status my-job --json
    """
    head = _head(address)
    state = head.find(name)
    lines = head.read_log(state.submission_id).splitlines()
    last = lines[-1].strip() if lines else ""
    if as_json:
        print_json({**state.to_dict(), "last_line": last})
    else:
        say(f"{state.submission_id}: {state.state}, submitted {_when(state)}, took {_took(state)}")
        say(f"results: {state.uri}")
        if state.state == "failed":
            say(f"exit code {state.exit_code}: {state.reason}")
        elif last:
            say(f"last said: {last}")
    if state.exit_code:
        raise SystemExit(state.exit_code)


def show_log(name: Name, is_followed: Follow = False, address: Address = None) -> None:
    """Show what a job on a cluster has said; with --follow, until it ends.

    Exit codes: 0; with --follow the job's own, 130 if it was stopped or
    Ctrl-C ended the following.

    Examples:

      gbp-ray logs my-job --follow
    """
    head = _head(address)
    state = head.find(name)
    if not is_followed:
        write_log(head.read_log(state.submission_id))
        return
    try:
        state = _follow(head, state)
    except KeyboardInterrupt:
        _detach(state)
    state.check()


def stop_job(
    name: Name,
    address: Address = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="How long to wait for its end.")
    ] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Stop a job on a cluster, and wait until it has ended.

    Its whole rounds stay; submit it again and it goes on after the last.

    Examples:

      gbp-ray stop my-job
    """
    head = _head(address)
    before = head.find(name)
    state = head.stop(before.submission_id, timeout_s)
    if as_json:
        print_json(state.to_dict())
    elif before.is_over:
        say(f"{state.submission_id} had ended before: {state.state}")
    else:
        say(f"{state.submission_id}: {state.state}; submit the job again to go on")


def _head(address: str | None) -> Head:
    from gbp_ray.runtime.on_ray.head import Head, find_address

    return Head(find_address(address))


def _follow(head: Head, state: JobState, to_errors: bool = False) -> JobState:
    return head.follow(state.submission_id, partial(write_log, to_errors=to_errors))


def _detach(state: JobState) -> None:
    note("")
    note(f"no longer followed; {state.submission_id} goes on")
    note(
        f"follow: gbp-ray logs {state.submission_id} --follow    "
        f"stop: gbp-ray stop {state.submission_id}"
    )
    raise SystemExit(STOPPED)


def _describe_package(submission: Submission, is_installed: bool, place: str) -> str:
    own = "" if is_installed else f" and gbp-ray {__version__}"
    what = f"{submission.num_user_files} files{own}"
    packed = f"{what} go to {place}, {write_megabytes(len(submission.package.data))} MB packed"
    return "\n".join(filter(None, [f"{submission.base_id}: {packed}", _left_out(submission)]))


def _left_out(submission: Submission) -> str:
    # What looks like a secret was warned of.
    return describe_left_out({k: why for k, why in submission.left_out.items() if why != SECRET})


def _show_submission(submission: Submission, is_installed: bool, as_json: bool) -> None:
    if as_json:
        print_json({**submission.describe(), "files": submission.package.sizes})
        return
    own = "" if is_installed else f" and gbp-ray {__version__}"
    say(f"{submission.base_id}, by gbp-ray {submission.kind}")
    say(
        f"{submission.num_user_files} files{own}, "
        f"{write_megabytes(len(submission.package.data))} MB packed; "
        f"the largest: {submission.package.largest()}"
    )
    if left_out := _left_out(submission):
        say(left_out)
    say(f"environment: {', '.join(sorted(submission.env_vars))}")
    say(f"results: {submission.uri}")


def _say_submitted(state: JobState, is_new: bool, is_followed: bool) -> None:
    name = state.submission_id
    if is_followed:
        say(f"{name}: {state.state}; results: {state.uri}")
        return
    how = state.state if is_new else f"{state.state} already, nothing was submitted"
    say(f"{name}: {how}; results: {state.uri}")
    if not state.is_over:
        say(f"follow: gbp-ray logs {name} --follow    stop: gbp-ray stop {name}")


def _when(job: JobState) -> str:
    if job.started_s is None:
        return ""
    return f"{datetime.fromtimestamp(job.started_s):%Y-%m-%d %H:%M:%S}"


def _took(job: JobState) -> str:
    if job.started_s is None:
        return ""
    seconds = round((job.ended_s or time.time()) - job.started_s)
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
