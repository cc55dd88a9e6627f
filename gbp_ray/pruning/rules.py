"""What a criterion is made of, and how a user's own becomes one.

The built-in criteria are in `saliency`. A user's own is a function or a whole `Criterion`; whatever
goes wrong inside it is told as a fault of the field `prune.criterion` that named it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from gbp_ray.config import PruneConfig, nearest_name
from gbp_ray.errors import ConfigError, GbpError, PruneError, in_one_line
from gbp_ray.pruning.folding import Fold
from gbp_ray.pruning.masks import Prunable
from gbp_ray.pruning.ranks import checksum
from gbp_ray.workload import import_attribute

__all__ = ["BatchStatistic", "Criterion", "Finish", "Probe", "own_criterion"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Probe:
    """What a batch statistic may look at.

    Attributes:
        model: The network, in eval mode, pruned weights zero.
        units: Its prunable parameters, in flat order.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        config: The `[prune]` section.
        seed: Of the job.
        batch_index: Position of the batch among all calibration batches.
        previous_N: Sum of the pass before, over all batches, for criteria of several passes.
        counts: (B,) over how many items the loss of each example is a mean; None where they count
            alike.
    """

    model: nn.Module
    units: list[Prunable]
    loss: Callable[[Tensor, Tensor], Tensor]
    config: PruneConfig
    seed: int
    batch_index: int
    previous_N: Tensor | None
    counts: Tensor | None = None

    def num_items(self, targets: Tensor) -> float:
        """Counts what the loss of the batch is a mean over; most often its examples."""
        return len(targets) if self.counts is None else self.counts.sum().item()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The prunable parameters themselves."""
        return [unit.parameter for unit in self.units]

    def gradients(
        self, inputs: Tensor, targets: Tensor, *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Differentiates the mean loss of a batch by the prunable parameters."""
        loss = self.loss(self.model(inputs), targets)
        return torch.autograd.grad(
            loss, self.parameters, create_graph=create_graph, materialize_grads=True
        )


BatchStatistic = Callable[[Probe, Tensor, Tensor], Tensor]
"""(probe, inputs (B, ...), targets (B, ...)) -> the batch's additive vector, shape (N,)."""

Finish = Callable[[Tensor, Tensor, float], Tensor]
"""(weights_L, statistic_L, num_items) -> scores_L, weight by weight.

A rank finishes its slice of one layer after the other; statistic_L is the last pass's sum.
"""


@dataclass(frozen=True)
class Criterion:
    """A rule that gives scores.

    Attributes:
        name: As written in a job.
        formula: In ASCII, symbols as in the module's docstring.
        summed: What is added over batches and workers.
        cost: Against one forward and backward pass over the calibration examples.
        source: Authors, year, arXiv id or venue, equation.
        of_gradients: What a batch adds, made of its gradients weight by weight: cheapest, and the
            only way that never needs a sharded network whole.
        passes: Else one statistic per pass over the calibration data; none for data-free criteria.
        finish: Turns the last sum into scores.
        is_signed: Whether scores below zero have a meaning: removal is expected to help.
    """

    name: str
    formula: str
    summed: str
    cost: str
    source: str
    finish: Finish
    of_gradients: Fold | None = None
    passes: tuple[BatchStatistic, ...] = ()
    is_signed: bool = False


def own_criterion(name: str) -> Criterion:
    """Makes a criterion of what a job names as "module:attr".

    The attr is either a `Criterion`, or a function `(model, inputs, targets, loss) -> {parameter
    name: tensor}`. It is called for each calibration batch with the batch's mean loss, a scalar
    with its graph; what it returns is summed over the batches and taken as the scores.

    Raises:
        ConfigError: It cannot be found, or is neither.
    """
    found = import_attribute(name, "prune.criterion")
    if isinstance(found, Criterion):
        return _named(found, name)
    if not callable(found):
        raise ConfigError(
            f"prune.criterion = '{name}': must be a function (model, inputs, targets, loss) -> "
            f"{{parameter name: tensor}} or a Criterion, not {type(found).__name__}"
        )
    return Criterion(
        name=name,
        formula="sum_b f(batch)",
        summed="what the function returns",
        cost="one call per batch",
        source="yours",
        passes=(_wrap_function(found, name),),
        finish=lambda weights_N, statistic_N, total: statistic_N,
        is_signed=True,
    )


def _wrap_function(
    function: Callable[[nn.Module, Tensor, Tensor, Tensor], Mapping[str, Tensor]], name: str
) -> BatchStatistic:
    def statistic(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = probe.loss(probe.model(inputs), targets)
        with _unchanged(name, dict(probe.model.named_parameters())):
            found = _call_own(name, partial(function, probe.model, inputs, targets, loss))
        if not isinstance(found, Mapping):
            raise PruneError(
                f"prune.criterion = '{name}': must return {{parameter name: tensor}}, not "
                f"{type(found).__name__}"
            )
        for unit in probe.units:
            given = found.get(unit.name)
            if not isinstance(given, Tensor) or given.shape != unit.parameter.shape:
                raise PruneError(
                    f"prune.criterion = '{name}': must return a tensor of shape "
                    f"{tuple(unit.parameter.shape)} for '{unit.name}', not "
                    f"{_kind_of(given, unit.name, found)}"
                )
            _check_real(name, given)
        return torch.cat([found[unit.name].detach().reshape(-1) for unit in probe.units])

    return statistic


def _named(rule: Criterion, name: str) -> Criterion:
    """Makes each failure of a user's own rule name the field of the job that chose it."""

    def guarded(statistic: BatchStatistic) -> BatchStatistic:
        def call(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
            total = sum(unit.parameter.numel() for unit in probe.units)
            with _unchanged(name, dict(probe.model.named_parameters())):
                vector_N = _call_own(name, partial(statistic, probe, inputs, targets))
            return _require_flat(name, vector_N, total)

        return call

    def finish(weights_N: Tensor, statistic_N: Tensor, total: float) -> Tensor:
        scores_N = _call_own(name, partial(rule.finish, weights_N, statistic_N, total))
        return _require_flat(name, scores_N, len(weights_N))

    def fold(gradient_L: Tensor, weight_L: Tensor, factor: float) -> Tensor:
        assert rule.of_gradients is not None
        with _unchanged(name, {"it was given": weight_L}):
            added_L = _call_own(name, partial(rule.of_gradients, gradient_L, weight_L, factor))
        return _require_flat(name, added_L, len(gradient_L))

    return replace(
        rule,
        of_gradients=fold if rule.of_gradients is not None else None,
        passes=tuple(guarded(statistic) for statistic in rule.passes),
        finish=finish,
    )


def _call_own(name: str, call: Callable[[], Result]) -> Result:
    try:
        return call()
    except GbpError:
        raise
    except Exception as error:
        reason = in_one_line(error)
        raise PruneError(f"prune.criterion = '{name}' raised {reason}") from error


def _require_flat(name: str, vector_N: object, num_weights: int) -> Tensor:
    if not isinstance(vector_N, Tensor) or vector_N.shape != (num_weights,):
        raise PruneError(
            f"prune.criterion = '{name}': its of_gradients, passes and finish must return a tensor "
            f"of shape ({num_weights},), not {_kind_of(vector_N)}"
        )
    _check_real(name, vector_N)
    return vector_N


def _check_real(name: str, found: Tensor) -> None:
    """Refuses what would become zeros or lose a part where scores are added up."""
    kind = "complex" if found.is_complex() else "meta" if found.is_meta else "sparse"
    if found.is_complex() or found.is_meta or found.layout is not torch.strided:
        raise PruneError(
            f"prune.criterion = '{name}': must return real numbers that are in memory, not a "
            f"{kind} tensor"
        )


@contextmanager
def _unchanged(name: str, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuses a criterion that writes to the weights it judges."""
    before = {path: checksum(weight) for path, weight in weights.items()}
    yield
    changed = next((path for path, w in weights.items() if checksum(w) != before[path]), None)
    if changed is not None:
        raise PruneError(
            f"prune.criterion = '{name}': changed the weights '{changed}' of the network; a "
            "criterion only scores them, and what is pruned is set to zero afterwards"
        )


def _kind_of(value: object, name: str = "", found: Mapping[str, object] | None = None) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if found is not None and name not in found:
        return f"nothing{nearest_name(name, [str(key) for key in found])}"
    return type(value).__name__
