"""Tables of columns: text folds, numbers stay whole, and what has no room is left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

__all__ = [
    "TableColumn",
    "fit_table",
    "make_table",
]

_BETWEEN, _NARROWEST = 3, 8


def make_table(
    rows: Iterable[Sequence[str]],
    texts: Sequence[str],
    numbers: Sequence[str] = (),
    last: Sequence[str] = (),
    *,
    title: str = "",
) -> Table:
    """Make a table of columns of text, then of numbers, then of text again."""
    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in last:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


class TableColumn(NamedTuple):
    """A column of a table.

    Attributes:
        cells: Plain text, one a row.
        rank: Columns of the highest rank are left out first, of rank 0 never.
        widest: Characters that are shown of a cell.
    """

    heading: str
    cells: Sequence[str]
    justify: Literal["left", "right"] = "right"
    rank: int = 0
    widest: int = 36


def fit_table(columns: Sequence[TableColumn], width: int) -> tuple[Table, list[str]]:
    """Makes a table of the columns that fit into a width.

    Args:
        width: Of the terminal, in characters.

    Returns:
        The table, and the headings of the columns that it leaves out, in their order.
    """
    kept = list(columns)
    # A space on either side is the table's own.
    width += _BETWEEN - 2
    while len(kept) > 1 and sum(map(_width, kept)) > width:
        highest = max(column.rank for column in kept)
        if highest == 0:
            break
        # Of equals the last.
        del kept[max(i for i, column in enumerate(kept) if column.rank == highest)]
    longest = max(range(len(kept)), key=lambda i: _width(kept[i]))
    if (excess := sum(map(_width, kept)) - width) > 0:
        # One long name is cut rather than every number.
        room = max(_NARROWEST, _width(kept[longest]) - _BETWEEN - excess)
        kept[longest] = kept[longest]._replace(widest=room)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in kept:
        table.add_column(
            column.heading,
            justify=column.justify,
            no_wrap=True,
            max_width=column.widest,
        )
    for cells in zip(*(column.cells for column in kept), strict=True):
        table.add_row(*cells)
    shown = [column.heading for column in kept]
    return table, [column.heading for column in columns if column.heading not in shown]


def _width(column: TableColumn) -> int:
    return min(column.widest, max(map(len, (column.heading, *column.cells)))) + _BETWEEN
