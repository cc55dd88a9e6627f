"""The goal of a trial, and what is left of its network, from rows of the index.

Single weights are pruned to a sparsity. Whole units are pruned to a sparsity of units, or to what
may stay of the multiply-adds, the parameters or the bytes. Trials with goals of different kinds
are not points of one curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from gbp_ray.config.prune import UNIT_KINDS, Cost

__all__ = [
    "COSTS",
    "GOAL_FIELDS",
    "Goal",
    "has_units",
    "write_left",
]

COSTS = {"macs": "MACs", "parameters": "parameters", "bytes": "bytes"}
"""What a goal can limit beside numbers of units, and how it is called in tables and figures."""

_TARGETS = {kind: f"prune.target.{kind}" for kind in get_args(Cost)}

GOAL_FIELDS = ("prune.sparsity", *_TARGETS.values())
"""Fields of a job of which one holds its goal."""

_MULTIPLES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Goal(NamedTuple):
    """What pruning was to end at.

    Attributes:
        kind: "sparsity" of weights, "units" for a sparsity of whole units, or a key of `COSTS`.
        value: A share; of costs also a number above 1, which is no share.
    """

    kind: str
    value: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Goal:
        """Reads it from a row that has the columns of `GOAL_FIELDS` and the granularity."""
        for kind in COSTS:
            if (value := row.get(_TARGETS[kind])) is not None:
                return cls(kind, float(value))
        return cls("units" if has_units(row) else "sparsity", float(row["prune.sparsity"]))

    @property
    def depth(self) -> float:
        """Returns a number that is greater where more is removed."""
        return -self.value if self.kind in COSTS else self.value

    @property
    def amount(self) -> str:
        """Writes the value without what it is of."""
        if self.value <= 1:
            return f"{100 * self.value:.4g} %"
        size, unit = next((pair for pair in _MULTIPLES if self.value >= pair[0]), (1.0, ""))
        return f"{self.value / size:.4g}{unit}"

    def __str__(self) -> str:
        if self.kind == "sparsity":
            return f"sparsity {self.amount}"
        if self.kind == "units":
            return f"{self.amount} of units removed"
        return f"{self.amount}{' of' if self.value <= 1 else ''} {COSTS[self.kind]}"


def has_units(row: Mapping[str, Any]) -> bool:
    """Returns True if the row is of a trial that removes whole units."""
    return row.get("prune.granularity") in UNIT_KINDS


def write_left(share: float | None) -> str:
    """Writes what is left of a cost in percent."""
    return "not counted" if share is None else f"{share:.1%}"
