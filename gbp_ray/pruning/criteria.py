"""Every criterion: what it sums over the calibration data, and how it finishes.

A criterion is an additive statistic plus a finish (`Criterion`). What a batch adds is either
a function of its gradients, weight by weight, or a pass of its own that gives one flat vector. How
batches become a sum, and a sum the scores of each rank, is the business of `scoring`.

Shape suffixes: N = prunable weights of the model in the order of the global flat index, L = weights
of one slice.
Symbols of the formulas: w weight, g gradient of the mean loss over a batch, g_i of one example,
H Hessian, sum_b over batches, n_b items in batch b, n in all, z random signs. An item is an
example, or what else the loss is a mean over (`metrics`); example i counts as n_i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gbp_ray.config.schema import nearest_name
from gbp_ray.distributed.ranks import checksum
from gbp_ray.distributed.sums import Fold
from gbp_ray.errors import ConfigError, GbpError, PruneError, in_one_line
from gbp_ray.pruning.statistics import (
    BatchStatistic,
    Probe,
    Result,
    _hessian_diagonal,
    _hessian_gradient,
    _squared_example_gradients,
    _summed_gradient,
)
from gbp_ray.workloads.loading import import_attribute

__all__ = [
    "CRITERIA",
    "Criterion",
    "Finish",
    "criterion",
    "own_criterion",
]

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


# -- the registry ----------------------------------------------------------------------------------

_TAYLOR = Criterion(
    name="taylor",
    formula="|w * (1/n) sum_b n_b g_b|",
    summed="gradients, n_b * g_b",
    cost="1",
    source="Molchanov et al. 2017 (1611.06440), eq. 7, per weight",
    of_gradients=lambda gradient_L, weight_L, num_examples: gradient_L * num_examples,
    finish=lambda weights_N, statistic_N, total: (weights_N * statistic_N / total).abs(),
)

CRITERIA: dict[str, Criterion] = {
    rule.name: rule
    for rule in (
        Criterion(
            name="magnitude",
            formula="|w|",
            summed="nothing",
            cost="0",
            source="Han et al. 2015 (1506.02626), section 3",
            finish=lambda weights_N, statistic_N, total: weights_N.abs(),
        ),
        Criterion(
            name="random",
            formula="u, uniform in [0, 1)",
            summed="nothing",
            cost="0",
            source="the control of Blalock et al. 2020 (2003.03033)",
            finish=lambda weights_N, statistic_N, total: statistic_N,
        ),
        _TAYLOR,
        Criterion(
            name="snip",
            formula=_TAYLOR.formula + ", on untrained weights (pretrain.epochs = 0)",
            summed=_TAYLOR.summed,
            cost=_TAYLOR.cost,
            source="Lee et al. 2019 (1810.02340), eq. 5, without its normalising factor",
            of_gradients=_TAYLOR.of_gradients,
            finish=_TAYLOR.finish,
        ),
        Criterion(
            name="taylor_squared",
            formula="sum_b (w g_b)^2",
            summed="(w g_b)^2; depends on calibration_batch_size",
            cost="1",
            source="Molchanov et al. 2019 (1906.10771), eq. 8",
            of_gradients=lambda gradient_L, weight_L, num_examples: (
                gradient_L * weight_L
            ).square_(),
            finish=lambda weights_N, statistic_N, total: statistic_N,
        ),
        Criterion(
            name="fisher",
            formula="w^2 * (1/n) sum_i g_i^2",
            summed="squared gradients of single examples",
            cost="2 to 4",
            source="Theis et al. 2018 (1801.05787), eq. 6, per weight, empirical Fisher diagonal",
            passes=(_squared_example_gradients,),
            finish=lambda weights_N, statistic_N, total: weights_N.square() * statistic_N / total,
        ),
        Criterion(
            name="obd",
            formula="w^2 * h / 2, h = (1/n) sum_b n_b mean_z z * (H_b z)",
            summed="Hessian diagonals, by hutchinson_probes random probes per batch",
            cost="1 + 2 per probe",
            source="LeCun et al. 1990 (NIPS 2), eq. 5; diagonal by Hutchinson 1989",
            passes=(_hessian_diagonal,),
            finish=lambda weights_N, statistic_N, total: (
                weights_N.square() * statistic_N / (2 * total)
            ),
            is_signed=True,
        ),
        Criterion(
            name="grasp",
            formula="w * (H G), G = (1/n) sum_b n_b g_b, H likewise",
            summed="gradients, then n_b * (H_b G)",
            cost="4, two passes",
            source="Wang et al. 2020 (2002.07376), eq. 8; its sign turned so that low is removed",
            passes=(_summed_gradient, _hessian_gradient),
            finish=lambda weights_N, statistic_N, total: weights_N * statistic_N / total**2,
            is_signed=True,
        ),
        Criterion(
            name="synflow",
            formula="|w * dR/dw|, R = 1' prod_l |W_l| 1",
            summed="nothing; no data is read",
            cost="1 example",
            source="Tanaka et al. 2020 (2006.05467), eq. 4 and algorithm 1; biases taken as zero",
            finish=lambda weights_N, statistic_N, total: statistic_N,
        ),
        Criterion(
            name="movement",
            formula="-sum_t w_t g_t over fine-tuning steps t since the last prune",
            summed="-w g of each step, over the whole batch",
            cost="0, gathered while fine-tuning",
            source="Sanh et al. 2020 (2005.07683), eq. 4, without straight-through gradients",
            finish=lambda weights_N, statistic_N, total: statistic_N,
            is_signed=True,
        ),
    )
}
