"""Metrics: a vector of sums that batches add to, and the value that is computed of it.

    Metric("recall", update, compute)    update(outputs, targets) -> (K,), compute((K,)) -> float

Sums are added over batches and workers in batch order, so a value is exact whatever the batch size
and the number of workers. Metrics by name follow scikit-learn's definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gbp_ray.config.metrics import ACCURACY, MetricSpec, is_free
from gbp_ray.config.schema import nearest_name
from gbp_ray.errors import GbpError, WorkloadError, in_one_line
from gbp_ray.workloads.batch import kind_of, labels_of, logits_of, tensors_in
from gbp_ray.workloads.contract import Workload, count_top1
from gbp_ray.workloads.losses import (
    class_labels,
    count_batch,
    count_right,
    cross_entropy_options,
    ignored_label,
    mean_loss,
)

__all__ = [
    "Metric",
    "compute_metric",
    "is_share_of_right",
    "metrics_of",
    "specs_of",
    "update_metric",
]


@dataclass(frozen=True)
class Metric:
    """A measurement of a network on a split.

    Attributes:
        name: An identifier in lower or upper case, which records and columns are named by.
        update: `(outputs, targets) -> (K,)` the batch's sums; of examples that are no pairs it is
            given the whole batch in place of the targets.
        compute: `(K,) float64 -> float`, the value for the sums of all batches.
        higher_is_better: The direction in which values improve.
        unit: "%" for a share in [0, 1]; any other text is shown after the value.
        chance: The value of a network that knows nothing, or a function of a batch's outputs that
            gives it; a dense network no better than that is warned of.
    """

    name: str
    update: Callable[[Any, Any], Tensor]
    compute: Callable[[Tensor], float]
    higher_is_better: bool = True
    unit: str = ""
    chance: float | Callable[[Any], float | None] | None = None

    def describe(self, outputs: Any = None) -> MetricSpec:
        """Describes it without torch.

        Args:
            outputs: Of a batch, for the value by chance.

        Raises:
            WorkloadError: `chance` fails, or direction, unit or chance are of another type.
        """
        chance = self.chance
        if callable(chance):
            try:
                chance = None if outputs is None else chance(outputs)
            except Exception as error:
                raise WorkloadError(
                    f"workload.metrics: {self.name}.chance raised {in_one_line(error)} for outputs "
                    f"{kind_of(outputs)}; it must return the value of a network that knows nothing"
                ) from error
        try:
            return MetricSpec(
                name=self.name,
                higher_is_better=self.higher_is_better,
                unit=self.unit,
                chance=chance,
            )
        except ValidationError as error:
            fault = error.errors()[0]
            raise WorkloadError(
                f"workload.metrics: {self.name}.{fault['loc'][0]} = {fault['input']!r}: "
                f"{fault['msg'].lower()}"
            ) from None


def metrics_of(workload: Workload) -> tuple[Metric, ...]:
    """Returns the metrics of a workload, the one that judges first.

    Raises:
        WorkloadError: A name is unknown or taken, or an entry is no metric.
    """
    given = workload.metrics
    if isinstance(given, (str, Metric)) or not isinstance(given, (list, tuple)):
        given = (given,)
    found = tuple(_make(entry, workload) for entry in given or ("accuracy",))
    names = [metric.name for metric in found]
    for name in names:
        if not name.isidentifier() or not is_free(name):
            raise WorkloadError(
                f"workload.metrics: '{name}' cannot name a metric; give an identifier that is no "
                "field of a record"
            )
        if names.count(name) > 1:
            raise WorkloadError(f"workload.metrics: '{name}' is there twice; name each once")
    return found


def specs_of(workload: Workload) -> tuple[MetricSpec, ...]:
    """Describes the metrics of a workload, the one that judges first; see `metrics_of`."""
    return tuple(metric.describe() for metric in metrics_of(workload))


def is_share_of_right(metric: Metric, workload: Workload) -> bool:
    """Returns whether the sums of a metric are those of the workload's own `count_correct`."""
    is_named = metric.name == ACCURACY.name and not isinstance(workload.metrics, Metric)
    return (
        is_named
        and workload.count_correct is not count_top1
        and all(metric is not entry for entry in workload.metrics)
    )


def update_metric(
    metric: Metric, workload: Workload, split: str, outputs: Any, targets: Any
) -> Tensor:
    """Returns the sums of one batch, (K,) float64.

    Raises:
        WorkloadError: The metric does not suit outputs and targets, or returns no vector.
    """
    seen = [(tensor, tensor._version) for tensor in tensors_in((outputs, targets))]
    try:
        found = metric.update(outputs, targets)
    except (GbpError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise WorkloadError(
            f"workload.metrics: {metric.name} raised {in_one_line(error)} on a batch of "
            f"workload.{split} (outputs {kind_of(outputs)}, targets {kind_of(targets)}); give "
            "another metric"
        ) from error
    if any(tensor._version != version for tensor, version in seen):
        raise WorkloadError(
            f"workload.metrics: {metric.name}.update changes outputs or targets in place, which "
            "other metrics and the loss are given, too; let it work on copies"
        )
    if not isinstance(found, Tensor) or found.ndim > 1 or found.is_complex():
        raise WorkloadError(
            f"workload.metrics: {metric.name}.update must return the batch's sums, a tensor of one "
            f"axis, not {kind_of(found)}"
        )
    return found.detach().reshape(-1).double()


def compute_metric(metric: Metric, sums: Tensor, split: str) -> float:
    """Computes the value for sums, (K,) float64; a share outside [0, 1] is refused.

    Raises:
        WorkloadError: `compute` fails or returns no number, or a share is none.
    """
    try:
        value = metric.compute(sums.cpu())
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"it returned {kind_of(value)}")
        value = float(value)
    except GbpError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"workload.metrics: {metric.name}.compute must return a float for the sums of "
            f"workload.{split}; {in_one_line(error)}"
        ) from error
    if metric.unit == "%" and not (math.isnan(value) or 0 <= value <= 1):
        raise WorkloadError(
            f"workload.metrics: {metric.name} is {value:g} on workload.{split}, and a metric in % "
            "is a share in [0, 1]; correct its sums, or give it another unit"
        )
    return value


def _make(entry: Any, workload: Workload) -> Metric:
    if isinstance(entry, Metric):
        return entry
    if isinstance(entry, str):
        if entry not in _MAKERS:
            raise WorkloadError(
                f"workload.metrics: there is no '{entry}'{nearest_name(entry, list(_MAKERS))} "
                f"(allowed: {', '.join(_MAKERS)}, a Metric, or a torchmetrics metric whose states "
                "are sums)"
            )
        return _MAKERS[entry](workload)
    if hasattr(entry, "_reductions") and hasattr(entry, "_defaults"):
        return _from_torchmetrics(entry)
    raise WorkloadError(
        f"workload.metrics: an entry is {kind_of(entry)}; give names, a gbp_ray.Metric, or a "
        "torchmetrics metric whose states are sums"
    )


def _ratio(sums: Tensor) -> float:
    part, whole = sums.tolist()
    return part / whole if whole else math.nan


def _accuracy(workload: Workload) -> Metric:
    def update(outputs: Any, targets: Any) -> Tensor:
        right, asked = count_right(workload, outputs, targets)
        right = torch.as_tensor(right)
        return torch.stack([right, torch.as_tensor(asked, device=right.device)]).double()

    chance = _uniform if workload.count_correct is count_top1 else None
    return Metric("accuracy", update, _ratio, unit=ACCURACY.unit, chance=chance)


def _uniform(outputs: Any) -> float | None:
    """Returns the accuracy of a guess among classes."""
    number = _count_logits(outputs)
    return None if number is None else 1 / number


def _count_logits(outputs: Any) -> int | None:
    """Counts the classes that logits are of; named logits of words have them last."""
    logits = logits_of(outputs)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        return None
    return logits.shape[-1 if logits is not outputs and logits.ndim == 3 else 1]


def _top5(workload: Workload) -> Metric:
    def update(outputs: Any, targets: Any) -> Tensor:
        logits, labels = class_labels(workload, outputs, targets)
        if logits.shape[1] <= 5:
            raise WorkloadError(
                f"workload.metrics: top5 of {logits.shape[1]} classes is always 100 %; "
                "name accuracy in its place"
            )
        is_asked = labels != ignored_label(workload)
        best = logits.topk(5, dim=1).indices
        is_right = (best == labels.unsqueeze(1)).any(dim=1) & is_asked
        return torch.stack([is_right.sum(), is_asked.sum()]).double()

    def chance(outputs: Any) -> float | None:
        number = _count_logits(outputs)
        return None if number is None else min(5, number) / number

    return Metric("top5", update, _ratio, unit="%", chance=chance)


def _perplexity(workload: Workload) -> Metric:
    def update(outputs: Any, targets: Any) -> Tensor:
        items = count_batch(workload, targets)
        loss = mean_loss(workload, outputs, targets).double() if items else 0.0
        return torch.tensor([float(loss) * items, items], dtype=torch.float64)

    def compute(sums: Tensor) -> float:
        mean = _ratio(sums)
        return math.exp(mean) if mean < 700 else math.inf

    def chance(outputs: Any) -> float | None:
        # Only the cross entropy of a guess among classes is the logarithm of their number.
        is_entropy = cross_entropy_options(workload.loss) is not None
        return _count_logits(outputs) if is_entropy else None

    return Metric("perplexity", update, compute, higher_is_better=False, chance=chance)


def _errors(
    name: str, error: Callable[[Tensor], Tensor], finish: Callable[[float], float]
) -> Callable[[Workload], Metric]:
    def update(outputs: Any, targets: Any) -> Tensor:
        found, wanted = _same_shape(name, outputs, targets)
        return torch.stack([error(found - wanted).sum(), found.new_tensor(float(found.numel()))])

    def compute(sums: Tensor) -> float:
        return finish(_ratio(sums))

    return lambda workload: Metric(name, update, compute, higher_is_better=False)


def _r2(workload: Workload) -> Metric:
    def update(outputs: Any, targets: Any) -> Tensor:
        found, wanted = _same_shape("r2", outputs, targets)
        found, wanted = found.reshape(len(found), -1), wanted.reshape(len(wanted), -1)
        columns = [(wanted - found).square(), wanted, wanted.square(), torch.ones_like(wanted)]
        return torch.cat([column.sum(dim=0) for column in columns])

    def compute(sums: Tensor) -> float:
        residual, total, squares, number = sums.view(4, -1)
        spread = squares - total.square() / number
        # Targets that are all alike, but for rounding, have no spread to explain.
        spread = spread.where(spread > 1e-12 * squares, math.nan)
        return float((1 - residual / spread).mean())

    return Metric("r2", update, compute, chance=0.0)


def _f1(workload: Workload) -> Metric:
    """Makes F1: of labels at once over all of them (outputs above 0), of classes the mean."""

    def update(outputs: Any, targets: Any) -> Tensor:
        logits, labels = logits_of(outputs), labels_of(targets)
        are_tensors = isinstance(labels, Tensor) and isinstance(logits, Tensor)
        if are_tensors and labels.shape == logits.shape:
            found, wanted = logits > 0, labels > 0.5
            counts = [(found & wanted).sum(), found.sum(), wanted.sum()]
            return torch.stack(counts).double()
        logits, labels = class_labels(workload, outputs, targets)
        is_asked = labels != ignored_label(workload)
        answers, number = logits.argmax(dim=1), logits.shape[1]
        return _count_classes(answers[is_asked], labels[is_asked], number)

    def compute(sums: Tensor) -> float:
        both, found, wanted = sums.view(3, -1)
        is_there = found + wanted > 0
        return float((2 * both / (found + wanted))[is_there].mean())

    return Metric("f1", update, compute, unit="%")


def _miou(workload: Workload) -> Metric:
    def update(outputs: Any, targets: Any) -> Tensor:
        logits, labels = class_labels(workload, outputs, targets)
        is_asked = labels != ignored_label(workload)
        return _count_classes(logits.argmax(dim=1)[is_asked], labels[is_asked], logits.shape[1])

    def compute(sums: Tensor) -> float:
        both, found, wanted = sums.view(3, -1)
        union = found + wanted - both
        return float((both / union)[union > 0].mean())

    return Metric("mIoU", update, compute, unit="%")


def _count_classes(answers: Tensor, labels: Tensor, number: int) -> Tensor:
    """Counts by class what is right, what was answered and what was asked for: (3 * number,)."""
    columns = (labels[answers == labels], answers, labels)
    counts = [torch.bincount(column.reshape(-1).long(), minlength=number) for column in columns]
    return torch.cat(counts).double()


def _same_shape(name: str, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    found, wanted = logits_of(outputs), labels_of(targets)
    is_fit = isinstance(found, Tensor) and isinstance(wanted, Tensor)
    if not is_fit or found.shape != wanted.shape:
        raise WorkloadError(
            f"workload.metrics: {name} compares outputs with targets of the same shape, not "
            f"{kind_of(found)} with {kind_of(wanted)}; give both one shape, or another metric"
        )
    return found.double(), wanted.double()


def _from_torchmetrics(metric: Any) -> Metric:
    """Adapts a torchmetrics metric; its states must be tensors that are summed over processes."""
    defaults, name = dict(metric._defaults), type(metric).__name__
    if not isinstance(getattr(metric, "higher_is_better", None), bool):
        raise WorkloadError(
            f"workload.metrics: torchmetrics' {name} does not say whether higher is better; set "
            "its higher_is_better to True or False, or give a gbp_ray.Metric"
        )
    # It would add up the states of all processes once more.
    metric.sync_on_compute = metric._to_sync = False
    for state, reduction in metric._reductions.items():
        is_sum = getattr(reduction, "__name__", "") == "dim_zero_sum"
        if not is_sum or not isinstance(defaults[state], Tensor):
            raise WorkloadError(
                f"workload.metrics: the state '{state}' of torchmetrics' {name} is no sum, so it "
                "cannot be added over batches and workers; choose a metric with a binned or summed "
                "state (such as thresholds=100), or give a gbp_ray.Metric"
            )
    # A state may take its shape from the first batch.
    shapes = {state: default.shape for state, default in defaults.items()}

    def states_of(outputs: Any, labels: Any) -> Tensor:
        own = metric.to(outputs.device) if isinstance(outputs, Tensor) else metric
        own.reset()
        own.update(outputs, labels)
        states = {state: getattr(own, state) for state in shapes}
        shapes.update((state, value.shape) for state, value in states.items())
        own.reset()
        return torch.cat([value.double().reshape(-1) for value in states.values()])

    def update(outputs: Any, targets: Any) -> Tensor:
        logits, labels = logits_of(outputs), labels_of(targets)
        states = states_of(logits, labels)
        num_shares, num_logits = _count_as_taken(logits, labels, states, states_of)
        return torch.cat([states, states.new_tensor([num_shares, num_logits])])

    def compute(sums: Tensor) -> float:
        own = metric.to(sums.device)
        own.reset()
        *states, num_shares, num_logits = sums.tolist()
        if num_shares and num_logits:
            raise WorkloadError(
                f"workload.metrics: torchmetrics' {name} takes the outputs of a batch for shares "
                f"where all lie in [0, 1], as those of {num_shares:.0f} examples do, and for "
                "logits otherwise; give it shares in a gbp_ray.Metric, as by softmax"
            )
        sums = sums[: len(states)]
        parts = sums.split([shape.numel() for shape in shapes.values()])
        for (state, shape), part in zip(shapes.items(), parts, strict=True):
            setattr(own, state, part.view(shape).to(defaults[state].dtype))
        own._update_count = 1
        value = float(own.compute())
        own.reset()
        return value

    return Metric(name, update, compute, higher_is_better=metric.higher_is_better)


def _count_as_taken(
    logits: Any, labels: Any, states: Tensor, states_of: Callable[[Any, Any], Tensor]
) -> tuple[int, int]:
    """Counts examples that torchmetrics takes shares of, if that matters, and logits of."""
    are_tensors = isinstance(logits, Tensor) and isinstance(labels, Tensor)
    if not are_tensors or labels.is_floating_point() or not logits.is_floating_point():
        return 0, 0
    if not bool(((logits >= 0) & (logits <= 1)).all()):
        return 0, len(labels)
    shares = logits.sigmoid() if labels.shape == logits.shape else logits.softmax(dim=1)
    return (0 if torch.equal(states_of(shares, labels), states) else len(labels)), 0


_MAKERS: dict[str, Callable[[Workload], Metric]] = {
    "accuracy": _accuracy,
    "top5": _top5,
    "perplexity": _perplexity,
    "mse": _errors("mse", torch.square, lambda mean: mean),
    "rmse": _errors("rmse", torch.square, math.sqrt),
    "mae": _errors("mae", torch.abs, lambda mean: mean),
    "r2": _r2,
    "f1": _f1,
    "mIoU": _miou,
}
