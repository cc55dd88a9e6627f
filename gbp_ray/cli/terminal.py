"""Output of the verbs: results on standard output, everything else on standard error.

All text passes through here: names, paths and messages are shown without markup and without
control sequences. Output of users' code while a verb runs goes to standard error.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from gbp_ray.config.job import load_job
from gbp_ray.errors import clean_message, printable
from gbp_ray.runtime.progress import Screen
from gbp_ray.training.progress import OnProgress, Progress

__all__ = [
    "AsJson",
    "Conditions",
    "IsDebug",
    "IsQuiet",
    "Job",
    "Overrides",
    "Place",
    "console",
    "note",
    "print_csv",
    "print_json",
    "prints_aside",
    "progress_printer",
    "refuse_mistyped",
    "say",
    "warnings_in_lines",
    "write",
    "write_log",
]

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]

Job = Annotated[
    str | None,
    typer.Argument(help="Job file (TOML). Without one, the embedded digits job.", metavar="JOB"),
]

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a field, as prune.sparsity=0.95 or sweep.space.seed=[0,1]; repeatable.",
    ),
]

IsQuiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]

IsDebug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what workers print.")]

Conditions = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help="Keep what has prune.criterion=taylor or sparsity>=0.9; repeatable.",
    ),
]

Place = Annotated[
    str,
    typer.Argument(
        help="A trial's, a job's or a storage's address: a folder, or s3://bucket/prefix.",
        metavar="URI",
    ),
]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_results: TextIO | None = None  # standard output, while what others print goes elsewhere


def refuse_mistyped(job: str | None, overrides: list[str] | None) -> None:
    """Check a job before anything slow is imported; a pipe, which is read only once, is left."""
    if job is None or Path(job).is_file() or not Path(job).exists():
        load_job(job, overrides)


@contextmanager
def prints_aside() -> Iterator[None]:
    """Redirects output of this process and its children to standard error.

    Only results still go to standard output.
    """
    global _results
    out, aside = sys.stdout, sys.stderr or io.StringIO()
    number = None
    with suppress(AttributeError, OSError):  # a test's or a notebook's has no number
        number, target = out.fileno(), aside.fileno()
    if number is None:
        _results = out or io.StringIO()
    else:
        out.flush()
        kept = os.dup(number)
        _results = os.fdopen(kept, "w", encoding=out.encoding, errors=out.errors)
        os.dup2(target, number)
    sys.stdout = aside
    try:
        yield
    finally:
        sys.stdout, results, _results = out, _results, None
        if number is not None:
            os.dup2(kept, number)
            results.close()


def write(text: str) -> None:
    """Writes text to standard output, unchanged and at once."""
    if (out := _results or sys.stdout) is not None:
        out.write(text)
        out.flush()


def write_log(text: str, to_errors: bool = False) -> None:
    """Writes part of another log: lines and tabs, without colours and control sequences."""
    lines = re.sub(r"\r\n?", "\n", _COLOURS.sub("", text)).split("\n")
    shown = "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)
    if not to_errors:
        write(shown)
    else:
        sys.stderr.write(shown)
        sys.stderr.flush()


def console() -> Screen:
    """Opens standard output for tables."""
    out = _results or sys.stdout
    # Piped output has no width, and a table cut at 80 columns is of no use.
    return Screen(file=out) if out and out.isatty() else Screen(file=out, width=140)


def print_json(value: object) -> None:
    """Prints one object."""
    write(json.dumps(value, indent=1) + "\n")


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows under the names of their columns; quotes text that looks like a formula."""
    if rows:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([map(_as_cell, rows[0]), *(map(_as_cell, r.values()) for r in rows)])
        write(text.getvalue())


def _as_cell(value: Any) -> Any:
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if is_formula else value


def say(*lines: str) -> None:
    """Prints lines on standard output."""
    for line in lines:
        console().print(line, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Prints a line on standard error."""
    typer.echo(printable(text), err=True)


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Print this package's warnings inside the block in one line each, and no others."""

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, UserWarning):
            note(f"warning: {clean_message(str(message))}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def progress_printer(is_quiet: bool) -> OnProgress:
    """Returns a callback that prints progress on standard error."""
    last = ""
    is_live = sys.stderr.isatty() and not Screen(stderr=True).is_dumb_terminal

    def show(progress: Progress) -> None:
        nonlocal last
        if is_live and not is_quiet:
            text = f"{printable(progress.phase)}  {progress.done}/{progress.total}"
            end = "\n" if progress.done == progress.total else "\r"
            typer.echo(f"\x1b[2K{text}{end}", err=True, nl=False)
        elif progress.phase != last and not is_quiet:
            note(progress.phase)
        last = progress.phase

    return show
