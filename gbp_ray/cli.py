"""The verbs on the command line: words in, tables or JSON out, exit codes that tell the truth.

Standard output carries the result alone, progress and errors go to standard error. Exit codes: 0
done, 1 failed, 2 bad input, 130 stopped by Ctrl-C, 143 by a termination signal.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gbp_ray import __version__
from gbp_ray.config import describe_fields
from gbp_ray.errors import ConfigError, GbpError
from gbp_ray.report import layer_table, round_table, summary_line
from gbp_ray.store import TrialRecord

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Find out how sparse a network can be, and walk away with the pruned network.\n\n"
    "Start with [bold]gbp-ray prune[/bold]: it trains and prunes a small digit recogniser on this "
    "machine in about a minute, without any download. Then write a job file of your own: "
    "[bold]gbp-ray fields[/bold] lists what it may say, [bold]gbp-ray criteria[/bold] what can "
    "decide which weights go.",
)

_STOPPED = 130

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]


@app.callback(invoke_without_command=True)
def _options(
    is_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if is_version:
        typer.echo(f"gbp-ray {__version__}")
        raise typer.Exit


@app.command()
def prune(
    job: Annotated[
        str | None,
        typer.Argument(
            help="Job file (TOML). Without one, the embedded digits job.", metavar="JOB"
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a field, as prune.sparsity=0.95; repeatable.",
        ),
    ] = None,
    as_json: AsJson = False,
    is_quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    is_debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and Ray's own output.")
    ] = False,
) -> None:
    """Prune a network: train or load it, score, remove, fine-tune, in rounds.

    Every round is kept in the job's storage folder: weights, masks,
    measurements. Run the same command again after an interruption and it
    goes on after the last whole round; a finished job answers at once.

    Examples:

      gbp-ray prune

      gbp-ray prune --set prune.sparsity=0.95 --set prune.criterion=fisher

      gbp-ray prune my_job.toml --set cluster.num_workers=4 --json > result.json
    """
    # torch takes seconds to import; --help and a mistyped option should not.
    from gbp_ray.api import prune as prune_network

    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        result = prune_network(job, overrides, is_quiet=is_quiet, is_debug=is_debug)
    if as_json:
        _print_json({"folder": str(result.folder), **result.record.model_dump(mode="json")})
        return
    _print_trial(result.record)
    console = _console()
    console.print(
        f"\n{summary_line(result.record)}\nweights and masks: "
        f"{result.folder}/round_{result.record.final.round:03d}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command()
def show(
    uri: Annotated[
        str, typer.Argument(help="A trial's folder, a job's, or a storage's.", metavar="URI")
    ],
    as_json: AsJson = False,
) -> None:
    """Show one trial by round and by layer; for a folder of several, list them.

    Examples:

      gbp-ray show gbp-results

      gbp-ray show gbp-results/digits --json
    """
    from gbp_ray.store import locate_trials

    trials = locate_trials(uri)
    if len(trials) > 1:
        rows = [_describe_trial(store, name) for store, name in trials]
        if as_json:
            _print_json({"trials": rows})
            return
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for heading in rows[0]:
            table.add_column(heading)
        for row in rows:
            table.add_row(*(escape(str(value)) for value in row.values()))
        _console().print(table)
        return
    store, name = trials[0]
    record = store.read_trial(name)
    if record is None:
        rounds = store.read_rounds(name)
        if as_json:
            _print_json(
                {
                    "trial_id": name,
                    "finished": False,
                    "rounds": [r.model_dump(mode="json") for r in rounds],
                }
            )
            return
        _console().print(
            f"{name}: not finished, round {rounds[-1].round} is the last whole one; run the same "
            "job again to go on",
            highlight=False,
            soft_wrap=True,
        )
        _console().print(layer_table(rounds[-1]))
        return
    if as_json:
        folder = str(store.trial_folder(name))
        _print_json({"folder": folder, "finished": True, **record.model_dump(mode="json")})
        return
    _print_trial(record)
    _console().print(summary_line(record), highlight=False, soft_wrap=True)


@app.command()
def criteria(as_json: AsJson = False) -> None:
    """List the criteria: what each computes, what it costs, where it comes from.

    Examples:

      gbp-ray criteria

      gbp-ray prune --set prune.criterion=fisher
    """
    from gbp_ray.pruning.saliency import CRITERIA

    fields = ("name", "formula", "summed", "cost", "is_signed", "source")
    rows = [{field: getattr(rule, field) for field in fields} for rule in CRITERIA.values()]
    if as_json:
        _print_json({"criteria": rows})
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_lines=False)
    for heading in ("criterion", "score", "cost", "source"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        sign = ", signed" if row["is_signed"] else ""
        table.add_row(row["name"], f"{row['formula']}{sign}", row["cost"], row["source"])
    _console().print(table)
    _console().print(
        "The lowest scores are removed first. Cost counts forward and backward passes over the\n"
        'calibration examples. Your own criterion: prune.criterion = "module:function".\n'
        "w weight, g gradient of the mean loss of a batch, g_i of one example, H Hessian,\n"
        "b batches of n_b examples, n in all, z random signs.",
        highlight=False,
    )


@app.command()
def fields(
    section: Annotated[
        str | None, typer.Argument(help="Only this section, such as prune.", metavar="SECTION")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what a job file may say: every field, its default and its meaning.

    Examples:

      gbp-ray fields prune

      gbp-ray prune --set prune.scope=layer
    """
    rows = [
        row
        for row in describe_fields()
        if section is None or row[0].startswith((f"{section}.", f"[{section}]"))
    ]
    if not rows:
        raise ConfigError(
            f"SECTION = '{section}': no such section (allowed: workload, pretrain, prune, "
            "finetune, cluster)"
        )
    if as_json:
        keys = ("field", "default", "description")
        _print_json({"fields": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("field", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(escape(text) for text in row))
    _console().print(table)


def main() -> None:
    """Runs the command line and exits with the code that tells what happened."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    is_debug = "--debug" in sys.argv
    try:
        # Typer answers Ctrl-C by returning the code that it would have exited with.
        if app(standalone_mode=False, prog_name="gbp-ray") == _STOPPED:
            raise KeyboardInterrupt
    except GbpError as error:
        _fail(str(error), error.exit_code, is_debug)
    except KeyboardInterrupt:
        _fail("stopped; run the same command again to go on", _STOPPED, is_debug)
    except _Terminated:
        _fail("terminated; run the same command again to go on", 143, is_debug)
    except Exception as error:  # noqa: BLE001 - a bug still deserves one line
        # Typer keeps the base of its usage errors private; this method is what marks them.
        if usage := getattr(error, "format_message", None):
            if not usage():
                # Called without a verb; the help has been shown.
                raise SystemExit(2) from None
            _fail(f"{usage()} (--help shows what is allowed)", 2, is_debug)
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1, is_debug)


class _Terminated(BaseException):
    """A termination signal arrived."""


def _raise_terminated(number: int, frame: object) -> None:
    raise _Terminated


def _fail(message: str, code: int, is_debug: bool) -> None:
    if is_debug:
        traceback.print_exc()
    line = " ".join(message.split())
    typer.echo(f"error: {line}", err=True)
    raise SystemExit(code)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    if issubclass(category, UserWarning):
        typer.echo(f"warning: {message}", err=True)


def _console() -> Console:
    # Piped output has no width of its own, and a table cut at 80 columns is of no use.
    return Console() if sys.stdout.isatty() else Console(width=140)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=1))


def _print_trial(record: TrialRecord) -> None:
    console = _console()
    console.print(round_table(record))
    console.print(layer_table(record.final))


def _describe_trial(store: Any, name: str) -> dict[str, object]:
    record = store.read_trial(name)
    last = store.read_rounds(name)[-1]
    return {
        "trial": name,
        "finished": record is not None,
        "round": last.round,
        "sparsity": round(last.sparsity, 4),
        "accuracy": round(last.accuracy, 4),
        "folder": str(store.trial_folder(name)),
    }
