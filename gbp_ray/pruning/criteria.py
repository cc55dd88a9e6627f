"""Every criterion: what it sums over the calibration data, and how it finishes.

A criterion is an additive statistic plus a finish (`rules.Criterion`). What a batch adds is either
a function of its gradients, weight by weight, or a pass of its own that gives one flat vector. How
batches become a sum, and a sum the scores of each rank, is the business of `saliency`.

Shape suffixes: N = prunable weights of the model in the order of the global flat index, L = weights
of one slice.
Symbols of the formulas: w weight, g gradient of the mean loss over a batch, g_i of one example,
H Hessian, sum_b over batches, n_b items in batch b, n in all, z random signs. An item is an
example, or what else the loss is a mean over (`means`); example i counts as n_i.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode

from gbp_ray.errors import ConfigError, PruneError, in_one_line
from gbp_ray.pruning.masks import Prunable
from gbp_ray.pruning.ranks import buffer_slots
from gbp_ray.pruning.rules import Criterion, Probe, own_criterion
from gbp_ray.workload import Workload, derive_seed, take_batch

__all__ = ["CRITERIA", "criterion", "movement_statistic", "synaptic_flow"]

_PER_EXAMPLE_BYTES = 256 * 2**20
"""Room for per-example gradients: bounds the chunk of `fisher`."""
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


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


def movement_statistic(weight: Tensor, gradient: Tensor) -> Tensor:
    """Computes what one training step adds to the movement score: -w * g, shaped like w."""
    return -(weight.double() * gradient.double())


# -- passes of their own ---------------------------------------------------------------------------


def _flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _zeros_like_flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Makes a running sum for tensors like these, in float32 or, where they are, in float64."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    total = sum(tensor.numel() for tensor in tensors)
    return torch.zeros(total, dtype=dtype, device=tensors[0].device)


def _summed_gradient(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    """n_b * g: a sum over examples, so that a short batch counts with its true size."""
    return _flat(probe.gradients(inputs, targets)).mul_(probe.num_items(targets))


def _squared_example_gradients(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    """sum_i n_i g_i^2 over the batch's examples, by vectorised per-example gradients in chunks."""
    prunable = {unit.name: unit.parameter.detach() for unit in probe.units}

    def example_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(probe.model, weights, (x.unsqueeze(0),))
        return probe.loss(outputs, y.unsqueeze(0))

    per_example = vmap(grad(example_loss), in_dims=(None, 0, 0))
    num_weights = sum(weight.numel() for weight in prunable.values())
    chunk = max(1, _PER_EXAMPLE_BYTES // (4 * num_weights))
    total_N = _zeros_like_flat(list(prunable.values()))
    slots = buffer_slots(probe.model)
    for start in range(0, len(targets), chunk):
        stop = start + chunk
        try:
            gradients = per_example(prunable, inputs[start:stop], targets[start:stop])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = _why_not_by_example(probe.model, slots, inputs[:1], error)
            raise PruneError(
                "prune.criterion = fisher: single examples of this model cannot be differentiated, "
                f"{reason}, or choose taylor_squared"
            ) from error
        squares = [gradients[unit.name].square() for unit in probe.units]
        if probe.counts is not None:
            squares = [_weigh(square, probe.counts[start:stop]) for square in squares]
        total_N += _flat([square.sum(dim=0) for square in squares])
    return total_N


def _weigh(square: Tensor, counts: Tensor) -> Tensor:
    """Weighs examples by their items; one without any has no gradient, which torch calls NaN."""
    counts = counts.to(square).view(-1, *[1] * (square.ndim - 1))
    return torch.where(counts > 0, square * counts, 0)


def _why_not_by_example(
    model: nn.Module,
    slots: list[tuple[dict[str, Tensor | None], str, Tensor]],
    inputs: Tensor,
    error: Exception,
) -> str:
    """Names the buffers that a forward pass writes in eval mode; else repeats what torch said."""
    # The failed pass may have left a tensor of its own in a buffer's place.
    for owner, name, buffer in slots:
        owner[name] = buffer
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with suppress(RuntimeError, ValueError), torch.no_grad():
        model(inputs)
    written = [
        f"'{name}'"
        for name, buffer in model.named_buffers()
        if buffer is not before[name][0]
        or not torch.allclose(buffer, before[name][1], rtol=0, atol=0, equal_nan=True)
    ]
    if written:
        return (
            f"it writes {'buffers' if len(written) > 1 else 'buffer'} {', '.join(written)} in eval "
            "mode; write such only while self.training"
        )
    text = textwrap.shorten(in_one_line(error), 200, placeholder=" ...")
    return f"torch says {text}; mend the model"


def _hessian_diagonal(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    """n_b * mean over probes of z * (H z), an unbiased estimate of the batch's diag(H)."""
    gradients = probe.gradients(inputs, targets, create_graph=True)
    num_probes = probe.config.hutchinson_probes
    generator = torch.Generator().manual_seed(
        derive_seed(probe.seed, "hutchinson", probe.batch_index)
    )
    total_N = _zeros_like_flat(gradients)
    for number in range(num_probes):
        signs = [
            torch.randint(0, 2, g.shape, generator=generator).mul_(2).sub_(1).to(g)
            for g in gradients
        ]
        products = _hessian_product(
            gradients, signs, probe.parameters, keep_graph=number + 1 < num_probes
        )
        total_N += _flat(products) * _flat(signs)
    return total_N * (probe.num_items(targets) / num_probes)


def _hessian_gradient(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    """n_b * H G, with G the sum of gradients over all batches from the pass before."""
    assert probe.previous_N is not None
    gradients = probe.gradients(inputs, targets, create_graph=True)
    pieces = probe.previous_N.split([g.numel() for g in gradients])
    directions = [piece.view_as(g).to(g) for piece, g in zip(pieces, gradients, strict=True)]
    products = _hessian_product(gradients, directions, probe.parameters, keep_graph=False)
    return _flat(products) * probe.num_items(targets)


def _hessian_product(
    gradients: tuple[Tensor, ...],
    directions: list[Tensor],
    parameters: list[nn.Parameter],
    keep_graph: bool,
) -> tuple[Tensor, ...]:
    # A gradient that does not depend on any weight, as in a linear model under a linear loss, has
    # no graph: its row of the Hessian is zero.
    pairs = [(g, d) for g, d in zip(gradients, directions, strict=True) if g.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(parameter) for parameter in parameters)
    return torch.autograd.grad(
        [g for g, _ in pairs],
        parameters,
        grad_outputs=[d for _, d in pairs],
        retain_graph=keep_graph,
        materialize_grads=True,
    )


def synaptic_flow(model: nn.Module, units: list[Prunable], workload: Workload) -> Tensor:
    """|w * dR/dw| for R = sum of the outputs of the linearised network on an all-one input."""
    sample, _ = take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))
    if not sample.is_floating_point():
        raise PruneError(
            f"prune.criterion = synflow: needs inputs of floating point, not {sample.dtype}; "
            "choose another criterion for this model"
        )
    try:
        scores_N = _flow(model, units, sample)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        try:
            with _in_double():
                scores_N = _flow(model, units, sample)
        except Exception as error:
            raise PruneError(
                "prune.criterion = synflow: passes through the network in float64, and that fails "
                f"with {textwrap.shorten(in_one_line(error), 200, placeholder=' ...')}; take "
                "dtypes from the tensors at hand (x.to(self.weight.dtype)), or choose another "
                "criterion"
            ) from error
    # Order is all that counts, and a common factor brings the scores back into float32.
    largest = scores_N.max()
    return scores_N / largest if largest > 0 else scores_N


def _flow(model: nn.Module, units: list[Prunable], sample: Tensor) -> Tensor:
    state = {
        name: _flow_value(name, value)
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    weights = [state[unit.name].requires_grad_() for unit in units]
    # Products of many layers leave the range of float32.
    ones = torch.ones_like(sample[:1], dtype=torch.float64, device=units[0].parameter.device)
    outputs = functional_call(model, state, (ones,))
    gradients = torch.autograd.grad(outputs.sum(), weights, materialize_grads=True)
    return _flat([weight * g for weight, g in zip(weights, gradients, strict=True)]).abs()


@contextmanager
def _in_double() -> Iterator[None]:
    """Makes float64 of what a forward pass casts to, or makes in, a narrower floating point."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubling():
            yield
    finally:
        torch.set_default_dtype(default)


class _Doubling(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def widened(value: Any) -> Any:
            is_narrow = value in _NARROW if isinstance(value, torch.dtype) else False
            return torch.float64 if is_narrow else value

        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        named = {key: widened(value) for key, value in (kwargs or {}).items()}
        return func(*map(widened, args), **named)


def _flow_value(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value.clone()
    # Biases and running means add flow from nowhere; without them flow is conserved.
    if name.rpartition(".")[2] in ("bias", "running_mean"):
        return torch.zeros_like(value, dtype=torch.float64)
    return value.detach().double().abs()


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
