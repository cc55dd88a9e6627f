"""What the verbs put on the terminal: the result on standard output, the rest on standard error."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = [
    "AsJson",
    "Conditions",
    "Place",
    "console",
    "print_csv",
    "print_json",
    "say",
    "show_warning",
    "step_teller",
]

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]

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


def console() -> Console:
    """Opens standard output for tables."""
    # Piped output has no width of its own, and a table cut at 80 columns is of no use.
    return Console() if sys.stdout.isatty() else Console(width=140)


def print_json(value: object) -> None:
    """Prints one object."""
    typer.echo(json.dumps(value, indent=1))


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows under the names of their columns."""
    if rows:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def say(text: str) -> None:
    """Prints a line as it is."""
    console().print(text, highlight=False, markup=False, soft_wrap=True)


def show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    """Says a warning of ours in one line; for `warnings.showwarning`."""
    if issubclass(category, UserWarning):
        typer.echo(f"warning: {message}", err=True)


def step_teller(is_quiet: bool) -> Callable[[str, int, int], None]:
    """Makes what tells of steps on standard error: (what is done, steps done, steps in all)."""
    shown = ""

    def tell(what: str, done: int, total: int) -> None:
        nonlocal shown
        if is_quiet or (what == shown and not sys.stderr.isatty()):
            return
        if sys.stderr.isatty():
            end = "\n" if done == total else "\r"
            typer.echo(f"\x1b[2K{what}  {done}/{total}{end}", err=True, nl=False)
        else:
            typer.echo(what, err=True)
        shown = what

    return tell
