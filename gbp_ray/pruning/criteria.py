"""The functions of every criterion: the statistic summed over the calibration data, the finish.

A criterion is an additive statistic plus a finish. A batch adds either a function of its
gradients, weight by weight, or one flat vector from a pass of the criterion's own, or moments of
what goes into the layers. `scoring` makes sums of batches and scores of sums; `config.criteria`
describes the criteria in words.

Shape suffixes: N = prunable weights of the model in the order of the global flat index, L = weights
of one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gbp_ray.config.criteria import CRITERIA as SPECS
from gbp_ray.config.criteria import CriterionSpec, describe_criterion
from gbp_ray.config.schema import nearest_name
from gbp_ray.distributed.ranks import checksum
from gbp_ray.distributed.sums import Fold
from gbp_ray.errors import ConfigError, GbpError, PruneError, in_one_line
from gbp_ray.pruning.moments import LayerRule, kronecker_pivots, mean_squares, relative_pivots
from gbp_ray.pruning.statistics import (
    BatchStatistic,
    Probe,
    Result,
    hessian_diagonal,
    hessian_gradient,
    squared_example_gradients,
    summed_gradient,
    synaptic_flow,
)
from gbp_ray.pruning.units import Prunable
from gbp_ray.workloads.code import import_attribute
from gbp_ray.workloads.contract import Workload

__all__ = ["CRITERIA", "Criterion", "Finish", "GateRule", "criterion", "own_criterion"]

Finish = Callable[[Tensor, Tensor, float], Tensor]
"""(weights_L, statistic_L, num_items) -> scores_L, weight by weight.

A rank finishes its slice of one layer after the other; statistic_L is the last pass's sum.
"""

NetworkStatistic = Callable[[nn.Module, list[Prunable], Workload], Tensor]
"""(model, its prunable parameters, workload) -> statistic_N."""


_OWN = describe_criterion("own")


@dataclass(frozen=True)
class GateRule:
    """The score of a whole unit by the gradient in its gate, see `gates`.

    Attributes:
        fold: (gradient_U of a mean loss, the items that it is a mean over) -> what it adds, (U,).
        finish: (sum_U, items in all) -> scores, (U,).
        is_by_example: Gradients are those of single examples, not of batches.
    """

    fold: Callable[[Tensor, float], Tensor]
    finish: Callable[[Tensor, float], Tensor]
    is_by_example: bool = False


@dataclass(frozen=True)
class Criterion:
    """The functions that compute scores.

    Attributes:
        spec: The description; of a user's own, "reads" and the passes follow from the functions.
        finish: Turns the last sum into scores; by default the sum is the scores.
        of_gradients: The statistic of a batch, from its gradients weight by weight.
        passes: Otherwise one statistic for each pass over the calibration data.
        of_network: Otherwise a statistic of the network by itself.
        layers: Otherwise a statistic made of sums over the rows of each layer's inputs.
        gate: How whole units are scored by their gates; None sums the scores of their weights.
        power: Of the scores of a unit's weights, before they are summed; its root is taken after.
    """

    spec: CriterionSpec = _OWN
    finish: Finish = lambda weights_L, statistic_L, total: statistic_L
    of_gradients: Fold | None = None
    passes: tuple[BatchStatistic, ...] = ()
    of_network: NetworkStatistic | None = None
    layers: LayerRule | None = None
    gate: GateRule | None = None
    power: int = 1


def criterion(name: str) -> Criterion:
    """Finds a criterion by its name in a job; a user's own is "module:attr" (`own_criterion`).

    Raises:
        ConfigError: There is no such criterion.
    """
    if ":" in name:
        return own_criterion(name)
    if name not in CRITERIA:
        raise ConfigError(f"prune.criterion = '{name}': is not a criterion")
    return CRITERIA[name]


# -- criteria of users -----------------------------------------------------------------------------


def own_criterion(name: str) -> Criterion:
    """Makes a criterion of the object that a job names as "module:attr".

    The attr is either a `Criterion`, or a function `(model, inputs, targets, loss) -> {parameter
    name: tensor}`. It is called for each calibration batch with the batch's mean loss, a scalar
    with its graph; its results are summed over the batches, and the sums are the scores.

    Raises:
        ConfigError: It cannot be found, or is neither.
    """
    found = import_attribute(name, "prune.criterion")
    if isinstance(found, Criterion):
        return _guard(found, name)
    if not callable(found):
        raise ConfigError(
            f"prune.criterion = '{name}': must be a function (model, inputs, targets, loss) -> "
            f"{{parameter name: tensor}} or a Criterion, not {type(found).__name__}"
        )
    return Criterion(describe_criterion(name), passes=(_wrap_function(found, name),))


def _wrap_function(
    function: Callable[[nn.Module, Any, Any, Tensor], Mapping[str, Tensor]], name: str
) -> BatchStatistic:
    def statistic(probe: Probe, inputs: Any, targets: Any) -> Tensor:
        loss = probe.loss(inputs, targets)
        weights = dict(probe.model.named_parameters())
        found = _call_own(name, weights, partial(function, probe.model, inputs, targets, loss))
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


def _guard(rule: Criterion, name: str) -> Criterion:
    """Checks the results of a user's own functions, and names the job's field in failures."""

    def call(size: int, weights: Mapping[str, Tensor], own: Callable[[], Tensor]) -> Tensor:
        found = _call_own(name, weights, own)
        if not isinstance(found, Tensor) or found.shape != (size,):
            raise PruneError(
                f"prune.criterion = '{name}': its of_gradients, passes and finish must return a "
                f"tensor of shape ({size},), not {_kind_of(found)}"
            )
        _check_real(name, found)
        return found

    def guarded(statistic: BatchStatistic) -> BatchStatistic:
        def of_batch(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
            size = sum(unit.parameter.numel() for unit in probe.units)
            weights = dict(probe.model.named_parameters())
            return call(size, weights, partial(statistic, probe, inputs, targets))

        return of_batch

    def finish(weights_L: Tensor, statistic_L: Tensor, total: float) -> Tensor:
        return call(len(weights_L), {}, partial(rule.finish, weights_L, statistic_L, total))

    def fold(gradient_L: Tensor, weight_L: Tensor, factor: float) -> Tensor:
        assert rule.of_gradients is not None
        own = partial(rule.of_gradients, gradient_L, weight_L, factor)
        return call(len(gradient_L), {"it was given": weight_L}, own)

    def of_network(model: nn.Module, units: list[Prunable], workload: Workload) -> Tensor:
        assert rule.of_network is not None
        size = sum(unit.parameter.numel() for unit in units)
        weights = dict(model.named_parameters())
        return call(size, weights, partial(rule.of_network, model, units, workload))

    has_passes = bool(rule.passes or rule.of_network)
    spec = replace(
        rule.spec,
        name=name,
        reads=(
            "gradients"
            if rule.of_gradients
            else "activations"
            if rule.layers
            else "passes"
            if has_passes
            else "weights"
        ),
        num_passes=1 if rule.of_gradients or rule.layers else len(rule.passes),
    )
    return replace(
        rule,
        spec=spec,
        finish=finish,
        of_gradients=fold if rule.of_gradients else None,
        passes=tuple(guarded(statistic) for statistic in rule.passes),
        of_network=of_network if rule.of_network else None,
    )


def _call_own(name: str, weights: Mapping[str, Tensor], own: Callable[[], Result]) -> Result:
    with _unchanged(name, weights):
        try:
            return own()
        except GbpError:
            raise
        except Exception as error:
            reason = in_one_line(error)
            raise PruneError(f"prune.criterion = '{name}' raised {reason}") from error


def _check_real(name: str, found: Tensor) -> None:
    """Refuses tensors of which a sum would lose a part."""
    kind = "complex" if found.is_complex() else "meta" if found.is_meta else "sparse"
    if found.is_complex() or found.is_meta or found.layout is not torch.strided:
        raise PruneError(
            f"prune.criterion = '{name}': must return real numbers that are in memory, not a "
            f"{kind} tensor"
        )


@contextmanager
def _unchanged(name: str, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuses a criterion that writes to the weights it scores."""
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


# -- the registry ----------------------------------------------------------------------------------

_TAYLOR = Criterion(
    SPECS["taylor"],
    of_gradients=lambda gradient_L, weight_L, num_items: gradient_L * num_items,
    finish=lambda weights_L, statistic_L, total: (weights_L * statistic_L / total).abs(),
    gate=GateRule(
        fold=lambda gradient_U, num_items: gradient_U * num_items,
        finish=lambda sum_U, total: (sum_U / total).abs(),
    ),
)

CRITERIA: dict[str, Criterion] = {
    rule.spec.name: rule
    for rule in (
        Criterion(
            SPECS["magnitude"], lambda weights_L, statistic_L, total: weights_L.abs(), power=2
        ),
        Criterion(SPECS["random"]),
        _TAYLOR,
        replace(_TAYLOR, spec=SPECS["snip"]),
        Criterion(
            SPECS["taylor_squared"],
            of_gradients=lambda gradient_L, weight_L, num_items: (gradient_L * weight_L).square_(),
            gate=GateRule(
                fold=lambda gradient_U, num_items: gradient_U.square(),
                finish=lambda sum_U, total: sum_U,
            ),
        ),
        Criterion(
            SPECS["fisher"],
            lambda weights_L, statistic_L, total: weights_L.square() * statistic_L / total,
            passes=(squared_example_gradients,),
            gate=GateRule(
                fold=lambda gradient_U, num_items: gradient_U.square() * num_items,
                finish=lambda sum_U, total: sum_U / total,
                is_by_example=True,
            ),
        ),
        Criterion(
            SPECS["obd"],
            lambda weights_L, statistic_L, total: weights_L.square() * statistic_L / (2 * total),
            passes=(hessian_diagonal,),
        ),
        Criterion(
            SPECS["grasp"],
            lambda weights_L, statistic_L, total: weights_L * statistic_L / total**2,
            passes=(summed_gradient, hessian_gradient),
        ),
        Criterion(SPECS["synflow"], of_network=synaptic_flow),
        Criterion(
            SPECS["wanda"],
            lambda weights_L, statistic_L, total: weights_L.abs() * statistic_L.sqrt(),
            layers=LayerRule(("squares",), mean_squares),
        ),
        Criterion(
            SPECS["obs"],
            lambda weights_L, statistic_L, total: weights_L.square() * statistic_L / 2,
            layers=LayerRule(("inputs",), relative_pivots),
        ),
        Criterion(
            SPECS["kfac"],
            lambda weights_L, statistic_L, total: weights_L.square() * statistic_L / (2 * total),
            layers=LayerRule(("inputs", "gradients"), kronecker_pivots),
        ),
        Criterion(SPECS["movement"]),
    )
}
"""The built-in criteria by name, in the order of their descriptions."""
