"""Statistics of a batch that the criteria sum over the calibration data.

Shape suffixes: N = prunable weights of the model in the order of the global flat index,
B = examples of a batch.
Symbols: w weight, g gradient of the mean loss over a batch, g_i of one example, H Hessian, z random
signs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode

from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import buffer_slots
from gbp_ray.errors import PruneError, in_one_line
from gbp_ray.pruning.units import Prunable
from gbp_ray.workloads.batch import (
    Batch,
    call_arguments,
    forward,
    logits_of,
    map_tensors,
    tensors_in,
)
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import derive_seed, first_example
from gbp_ray.workloads.losses import batch_loss

__all__ = [
    "BatchStatistic",
    "Probe",
    "Result",
    "hessian_diagonal",
    "hessian_gradient",
    "movement_statistic",
    "squared_example_gradients",
    "summed_gradient",
    "synaptic_flow",
]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Probe:
    """The input of a batch statistic.

    Attributes:
        model: The network, in eval mode, pruned weights zero.
        units: Its prunable parameters, in flat order.
        workload: Whose `forward` and loss are used.
        batch_index: Position of the batch among all calibration batches.
        previous_N: Sum of the pass before, over all batches, for criteria of several passes.
        single: Position of an example in the batch -> a batch of it.
        num_examples: B.
        counts: (B,) number of items in the loss of each example; None where all are equal.
    """

    model: nn.Module
    units: list[Prunable]
    workload: Workload
    config: PruneConfig
    seed: int
    batch_index: int
    previous_N: Tensor | None
    single: Callable[[int], Batch]
    num_examples: int
    counts: Tensor | None = None

    @property
    def num_items(self) -> float:
        """Returns how many items the loss of the batch is a mean over; often its examples."""
        return self.num_examples if self.counts is None else self.counts.sum().item()

    def loss(self, inputs: Any, targets: Any) -> Tensor:
        """Passes a batch, as `Batch` holds it, through the network; returns its mean loss."""
        return batch_loss(self.model, self.workload, Batch(inputs, targets))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Returns the prunable parameters."""
        return [unit.parameter for unit in self.units]

    def gradients(
        self, inputs: Any, targets: Any, *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Returns the gradients of a batch's mean loss in the prunable parameters."""
        return torch.autograd.grad(
            self.loss(inputs, targets),
            self.parameters,
            create_graph=create_graph,
            materialize_grads=True,
        )


BatchStatistic = Callable[[Probe, Any, Any], Tensor]
"""(probe, inputs, targets) -> the batch's additive vector, shape (N,); see `Batch` for both."""

_PER_EXAMPLE_BYTES = 256 * 2**20
"""Memory for per-example gradients: limits the chunk of `fisher`."""

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def movement_statistic(weight: Tensor, gradient: Tensor) -> Tensor:
    """Computes the part of one training step in the movement score: -w * g, shaped like w."""
    return -(weight.double() * gradient.double())


# -- passes of their own ---------------------------------------------------------------------------


def _flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _zeros_like_flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Makes a running sum for such tensors, in float32, or float64 where one of them is."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    total = sum(tensor.numel() for tensor in tensors)
    return torch.zeros(total, dtype=dtype, device=tensors[0].device)


def summed_gradient(probe: Probe, inputs: Any, targets: Any) -> Tensor:
    """Computes n_b * g, a sum over examples: a short batch counts with its true size."""
    return _flat(probe.gradients(inputs, targets)).mul_(probe.num_items)


def squared_example_gradients(probe: Probe, inputs: Any, targets: Any) -> Tensor:
    """Computes sum_i n_i g_i^2 over the batch's examples, vectorised in chunks.

    Batches that are no pairs of tensors, and those of networks that torch cannot vectorise, are
    taken example by example.

    Raises:
        PruneError: The network writes buffers in eval mode.
    """
    if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor) and inputs is not targets):
        return _squares_one_by_one(probe)
    prunable = {f"network.{unit.name}": unit.parameter.detach() for unit in probe.units}
    passing = _Passing(probe)

    def example_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = functional_call(passing, weights, (x.unsqueeze(0), y.unsqueeze(0)))
        return loss

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
            _check_buffers(probe, slots, Batch(inputs[:1], targets[:1]), error)
            # Torch has no rule for one of the operations, such as those of recurrent layers.
            return _squares_one_by_one(probe)
        squares = [gradients[name].square() for name in prunable]
        if probe.counts is not None:
            squares = [_weigh(square, probe.counts[start:stop]) for square in squares]
        total_N += _flat([square.sum(dim=0) for square in squares])
    return total_N


class _Passing(nn.Module):
    """The loss of a network as a module, so that other weights can be put in its place."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.network, self._probe = probe.model, probe

    def forward(self, inputs: Any, targets: Any) -> Tensor:
        return self._probe.loss(inputs, targets)


def _squares_one_by_one(probe: Probe) -> Tensor:
    total_N = _zeros_like_flat([unit.parameter for unit in probe.units])
    for row in range(probe.num_examples):
        items = 1.0 if probe.counts is None else float(probe.counts[row])
        if items > 0:
            # Read by itself, since a row of a padded batch may not do for a batch.
            gradients = probe.gradients(*probe.single(row))
            total_N += _flat([gradient.square() for gradient in gradients]) * items
    return total_N


def _weigh(square: Tensor, counts: Tensor) -> Tensor:
    """Weights examples by their items; one without items has no gradient (NaN in torch)."""
    counts = counts.to(square).view(-1, *[1] * (square.ndim - 1))
    return torch.where(counts > 0, square * counts, 0)


def _check_buffers(
    probe: Probe,
    slots: list[tuple[dict[str, Tensor | None], str, Tensor]],
    example: Batch,
    error: Exception,
) -> None:
    """Refuses buffers that a forward pass writes in eval mode, which one example has for all."""
    model = probe.model
    # The failed pass may have put another tensor in a buffer's place.
    for owner, name, buffer in slots:
        owner[name] = buffer
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with suppress(RuntimeError, ValueError), torch.no_grad():
        forward(model, probe.workload, example)
    written = [
        f"'{name}'"
        for name, buffer in model.named_buffers()
        if buffer is not before[name][0]
        or not torch.allclose(buffer, before[name][1], rtol=0, atol=0, equal_nan=True)
    ]
    if written:
        raise PruneError(
            "prune.criterion = fisher: single examples of this model cannot be differentiated, it "
            f"writes {'buffers' if len(written) > 1 else 'buffer'} {', '.join(written)} in eval "
            "mode; write such only while self.training, or choose taylor_squared"
        ) from error


def hessian_diagonal(probe: Probe, inputs: Any, targets: Any) -> Tensor:
    """Computes n_b * mean over probes of z * (H z), an unbiased estimate of n_b * diag(H)."""
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
    return total_N * (probe.num_items / num_probes)


def hessian_gradient(probe: Probe, inputs: Any, targets: Any) -> Tensor:
    """Computes n_b * H G, with G the sum of gradients over all batches from the pass before."""
    assert probe.previous_N is not None
    gradients = probe.gradients(inputs, targets, create_graph=True)
    pieces = probe.previous_N.split([g.numel() for g in gradients])
    directions = [piece.view_as(g).to(g) for piece, g in zip(pieces, gradients, strict=True)]
    products = _hessian_product(gradients, directions, probe.parameters, keep_graph=False)
    return _flat(products) * probe.num_items


def _hessian_product(
    gradients: tuple[Tensor, ...],
    directions: list[Tensor],
    parameters: list[nn.Parameter],
    keep_graph: bool,
) -> tuple[Tensor, ...]:
    # A gradient that depends on no weight, as in a linear model under a linear loss, has no graph:
    # its row of the Hessian is zero.
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
    """Computes |w * dR/dw|, R = sum of the outputs of the linearised network on all ones."""
    batch = first_example(workload)
    floats = [tensor for tensor in tensors_in(batch.inputs) if tensor.is_floating_point()]
    if not floats:
        kinds = ", ".join(str(tensor.dtype) for tensor in tensors_in(batch.inputs))
        raise PruneError(
            f"prune.criterion = synflow: needs inputs of floating point, not {kinds}; "
            "choose another criterion for this model"
        )
    sample = call_arguments(model, workload, batch)
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
    # Only the order counts, and a common factor brings the scores back into float32.
    largest = scores_N.max()
    return scores_N / largest if largest > 0 else scores_N


def _flow(
    model: nn.Module, units: list[Prunable], sample: tuple[tuple[Any, ...], dict[str, Any]]
) -> Tensor:
    state = {
        name: _flow_value(name, value)
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    weights = [state[unit.name].requires_grad_() for unit in units]
    device = units[0].parameter.device

    def fill(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor[:1].to(device)
        # Products of many layers leave the range of float32.
        return torch.ones_like(tensor[:1], dtype=torch.float64, device=device)

    outputs = functional_call(model, state, *map_tensors(sample, fill))
    found = logits_of(outputs)
    total = torch.stack([tensor.sum() for tensor in tensors_in(found)]).sum()
    gradients = torch.autograd.grad(total, weights, materialize_grads=True)
    return _flat([weight * g for weight, g in zip(weights, gradients, strict=True)]).abs()


@contextmanager
def _in_double() -> Iterator[None]:
    """Widens to float64 what a forward pass casts or creates in a narrower floating point."""
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
