"""A metric in words: its name, its direction, its unit, and what a network that knows nothing gets.

Records, tables, searches and reports judge by such a description; `workloads.metrics` computes the
values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

__all__ = ["ACCURACY", "LOSS", "MetricSpec", "find_constant", "is_free"]


_TAKEN = re.compile(
    r"""
    (dense|test|train)_.*|.*_(deviation|pruned|recalibrated)|
    cause|compression|config|cost|criterion|date|done|examples|experiment_tag|fields|files|
    fingerprints|held_back|hostname|is_chosen|is_final|is_highest|is_new|is_old|is_recalibrated|
    is_whole|iterations_since_restore|job|judged_on|kept_step|label|loss|macs|macs_fault|
    macs_nonzero|mask_digest|metric|metric_fault|metric_specs|metrics|name|node_ip|num_bytes|
    bytes_left|macs_left|parameters_left|
    num_bytes_sparse|num_nonzero|num_parameters|num_seeds|num_trials|num_units|num_workers|other_metrics|
    other_score|overlap|overlap_to_largest|pid|rank|robust_accuracy|round|rounds|schema_version|
    score|seconds|seed|sha256|sources|sparsity|sparsity_target|spent_s|state|storage|test|
    time_since_restore|time_this_iter_s|time_total_s|timestamp|training_iteration|trial|
    trial_id|trial_seconds|uri|versions|weights_sha256
    """,
    re.VERBOSE,
)


def is_free(name: str) -> bool:
    """Returns whether a name may be a metric's: that of no other field, column or result of Tune.

    Names of metrics stand in records and columns with words before or after them as well.
    """
    return _TAKEN.fullmatch(name) is None


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

    @property
    def title(self) -> str:
        """The name at the beginning of a sentence."""
        return self.name[0].upper() + self.name[1:]

    @property
    def scale(self) -> float:
        """The factor by which values are shown: shares as percent."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def label(self) -> str:
        """The name with the unit, for a heading over numbers."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def worsens(self) -> str:
        """The verb for values of a network that gets worse."""
        return "falls" if self.higher_is_better else "rises"

    def rank(self, value: float) -> float:
        """Returns a number that is greater for a better value; -inf for NaN."""
        if math.isnan(value):
            return -math.inf
        return value if self.higher_is_better else -value

    def has_gap(self, one: float, other: float) -> bool:
        """Returns whether values differ by over half a point, or half a percent if no shares."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return one != other
        whole = 1.0 if self.unit == "%" else max(abs(one), abs(other))
        return abs(one - other) > 0.005 * whole

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
        values = list(values)
        found = [value for value in values if not math.isnan(value)]
        strange = [value for value in found if not 0 <= value <= 1]
        if self.unit == "%" and strange:
            return f"{self.name} {strange[0]:g} is no share of examples, so it tells nothing"
        is_idle = not any(map(math.isfinite, values)) or (self.unit == "%" and not any(found))
        if values and is_idle:
            return (
                f"{self.name} is {values[0]:g} throughout, so it tells nothing here: only the loss "
                "does"
            )
        return ""

    def find_chance_fault(self, value: float, num_items: float) -> str:
        """Returns that a dense network is no better than chance; "" if it is, or none is known.

        Args:
            num_items: What the value is a mean over. A share must exceed chance by two standard
                errors of so many guesses, as about 1 of 40 networks without knowledge does; another
                value must be better by a hundredth of chance.
        """
        if self.chance is None:
            return ""
        margin = 0.01 * abs(self.chance)
        if self.unit == "%":
            margin = 2 * math.sqrt(self.chance * (1 - self.chance) / max(1.0, num_items))
        if self.rank(value) - self.rank(self.chance) > margin:
            return ""
        return (
            f"{self.name} of the dense network is {self.write(value)} on {num_items:.6g} items, no "
            f"better than by chance ({self.write(self.chance)}), so what pruning costs cannot be "
            "told; train it longer, or check its data and weights"
        )


def find_constant(
    metric: MetricSpec,
    values: Iterable[float],
    where: str = "in all rounds, the dense network's included",
) -> str:
    """Returns that a metric is the same wherever it was measured, three times or more, or ""."""
    found = list(values)
    if len(found) < 3 or len(set(found)) > 1:
        return ""
    return f"{metric.name} is {metric.write(found[0])} {where}, so it cannot tell them apart"


ACCURACY = MetricSpec(name="accuracy", unit="%")
"""The metric that judges rounds unless a workload names another."""

LOSS = MetricSpec(name="loss", higher_is_better=False)
"""The metric that judges a sweep where its job asks for it."""
