"""A metric in words: its name, its direction, its unit, and what a network that knows nothing gets.

Records, tables, searches and reports judge by such a description; `workloads.metrics` computes the
values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

__all__ = ["ACCURACY", "MetricSpec"]


class MetricSpec(BaseModel):
    """The description of a metric.

    Attributes:
        name: As workloads, records, columns and tables name it.
        higher_is_better: The direction in which values improve.
        unit: "%" for a share in [0, 1], which is shown in percent; any other text follows the
            value.
        chance: The value that a network without any knowledge gets, where that is known.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    name: str
    higher_is_better: bool = True
    unit: str = ""
    chance: float | None = None

    def rank(self, value: float) -> float:
        """Returns a number that is greater for a better value; -inf for NaN."""
        if math.isnan(value):
            return -math.inf
        return value if self.higher_is_better else -value

    def write(self, value: float | None) -> str:
        """Writes a value for people to read; "" for None."""
        if value is None:
            return ""
        if self.unit == "%":
            return f"{value:.2%}" if 0 <= value <= 1 else "no share"
        return f"{value:.4g}{' ' * bool(self.unit)}{self.unit}"

    def write_change(self, change: float | None) -> str:
        """Writes the difference of two values, signed; that of shares in percentage points."""
        if change is None:
            return ""
        if self.unit == "%":
            return f"{100 * change:+.2f} points"
        return f"{change:+.4g}{' ' * bool(self.unit)}{self.unit}"

    def find_fault(self, values: Iterable[float]) -> str:
        """Returns the reason why values, the dense network's included, have no meaning, or "".

        Since they are checked no share is outside [0, 1], but older records may hold such.
        """
        found = [value for value in values if not math.isnan(value)]
        strange = [value for value in found if not 0 <= value <= 1]
        if self.unit == "%" and strange:
            return f"{self.name} {strange[0]:g} is no share of examples, so it tells nothing"
        if self.unit == "%" and found and not any(found):
            return f"{self.name} is 0 throughout, so it tells nothing here: only the loss does"
        return ""


ACCURACY = MetricSpec(name="accuracy", unit="%")
"""What rounds are judged by unless a workload names another metric."""
