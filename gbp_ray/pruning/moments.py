"""Moments of layers, sums over the rows of their inputs and gradients, and statistics of them.

A linear layer or a convolution multiplies each row x of its inputs by its weight, y = W x, see
`activations`. Sums over rows, such as x x^T, are additive over batches; a statistic of each weight
follows from those of its layer. Rows of all uses of a weight count alike: of layers that are called
several times, and of those that share it.

Whole layers are dealt to ranks: each sums the moments of its own over all batches, in batch order,
and computes the statistics of their weights.

Shape suffixes: N = prunable weights of the model in the order of the global flat index, R = rows, K
= groups of a convolution, C = inputs of one group, M = outputs of one group.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gbp_ray.config.prune import PruneConfig
from gbp_ray.errors import PruneError
from gbp_ray.pruning.activations import PatchLayer, equal_supports, rows_of
from gbp_ray.pruning.statistics import Probe
from gbp_ray.pruning.units import Prunable
from gbp_ray.workloads.batch import Batch, forward
from gbp_ray.workloads.data import derive_seed

__all__ = [
    "LayerMoments",
    "LayerRule",
    "LayerSums",
    "Moment",
    "kronecker_pivots",
    "mean_squares",
    "relative_pivots",
]

Moment = Literal["squares", "inputs", "gradients"]
"""A sum over rows of inputs x or of gradients e in outputs: of x^2, (K, C), over all rows; of
x x^T, (K, C, C), at drawn positions; of e e^T, (K, M, M), over all rows."""


@dataclass(frozen=True)
class LayerSums:
    """Sums over the rows of one layer, in all calibration examples, float64.

    Attributes:
        weight: (K, M, C).
        num_rows: Of the inputs.
        moments: By name; see `Moment`.
    """

    weight: Tensor
    num_rows: float
    moments: Mapping[Moment, Tensor]


@dataclass(frozen=True)
class LayerRule:
    """A statistic of weights that follows from the moments of their layers.

    Attributes:
        moments: Those that are summed: squares or inputs, and with either gradients.
        spread: (sums of a layer, damping) -> the statistic of each weight, (K, M, C).
    """

    moments: tuple[Moment, ...]
    spread: Callable[[LayerSums, float], Tensor]

    @property
    def reads_labels(self) -> bool:
        """Returns whether the loss of a batch is needed."""
        return "gradients" in self.moments


class LayerMoments:
    """The moments of all layers of a network, as one flat vector, layer after layer.

    Args:
        units: Prunable parameters of this very model, in flat order.

    Attributes:
        starts: Where each layer begins in the vector, and where the last one ends.

    Raises:
        PruneError: A parameter is not only the weight of linear layers and convolutions.
    """

    def __init__(
        self, rule: LayerRule, model: nn.Module, units: Sequence[Prunable], config: PruneConfig
    ) -> None:
        self._rule, self._config, self._units = rule, config, units
        self._layers = [_find_uses(model, unit, config.criterion) for unit in units]
        self._shapes = [self._shapes_of(*layers) for layers in self._layers]
        sizes = [1 + sum(map(math.prod, shapes.values())) for shapes in self._shapes]
        self.starts = list(accumulate(sizes, initial=0))
        dtypes = (unit.parameter.dtype for unit in units)
        self.dtype = reduce(torch.promote_types, dtypes, torch.float32)

    @property
    def size(self) -> int:
        """Returns the length of the vector."""
        return self.starts[-1]

    def deal(self, world_size: int) -> list[int]:
        """Deals layers to ranks, to even parts of the vector: W + 1 positions in their list."""
        return [
            *(
                bisect_left(self.starts, rank * self.size / world_size)
                for rank in range(world_size)
            ),
            len(self._units),
        ]

    def of_batch(self, probe: Probe, inputs: Any, targets: Any) -> Tensor:
        """Computes what a batch adds to the vector."""
        vector = torch.zeros(self.size, dtype=self.dtype, device=probe.parameters[0].device)
        if not self._rule.reads_labels:
            with torch.no_grad(), self._listening(vector, probe):
                forward(probe.model, probe.workload, Batch(inputs, targets))
            return vector
        if probe.num_items == 0:
            return vector
        with self._listening(vector, probe):
            loss = probe.loss(inputs, targets)
        # Without the hooks, as checkpointing passes through layers again.
        if loss.requires_grad:
            torch.autograd.grad(loss, probe.parameters, allow_unused=True)
        return vector

    def spread(self, sums: Tensor, first: int = 0) -> Tensor:
        """Computes the statistic of all weights of some layers from their part of the vector.

        Args:
            first: The number of the first layer; as many follow as the vector holds.

        Raises:
            PruneError: No row has come into a layer, or its moments cannot be inverted.
        """
        found = [sums.new_zeros(0)]
        stop = bisect_left(self.starts, self.starts[first] + len(sums))
        for number in range(first, stop):
            unit = self._units[number]
            start, end = (place - self.starts[first] for place in self.starts[number : number + 2])
            num_rows, moments = self._split(sums[start:end], number)
            if not num_rows:
                raise PruneError(
                    f"prune.criterion = {self._config.criterion}: no calibration example passes "
                    f"through the layer of '{unit.name}', or its weight is used without calling "
                    f"the layer, so that it has no score; name '{unit.name}' in prune.exclude, or "
                    "raise prune.calibration_examples"
                )
            (num_groups, *_), *_ = self._shapes[number].values()
            weight = unit.parameter.detach().double().flatten(1).unflatten(0, (num_groups, -1))
            spread = self._rule.spread(
                LayerSums(weight, float(num_rows), moments), self._config.reconstruct_damping
            )
            found.append(spread.reshape(-1))
        return torch.cat(found)

    def _shapes_of(self, layer: PatchLayer, *others: PatchLayer) -> dict[Moment, tuple[int, ...]]:
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        num_outputs, num_inputs = len(layer.weight) // groups, layer.weight[0].numel()
        shapes: dict[Moment, tuple[int, ...]] = {
            "squares": (groups, num_inputs),
            "inputs": (groups, num_inputs, num_inputs),
            "gradients": (groups, num_outputs, num_outputs),
        }
        return {moment: shapes[moment] for moment in self._rule.moments}

    def _split(self, part: Tensor, number: int) -> tuple[Tensor, dict[Moment, Tensor]]:
        """Returns views of one layer's part: the number of its rows, and its moments."""
        shapes = self._shapes[number]
        num_rows, *parts = part.split([1, *map(math.prod, shapes.values())])
        views = (part.view(shape) for part, shape in zip(parts, shapes.values(), strict=True))
        return num_rows, dict(zip(shapes, views, strict=True))

    @contextmanager
    def _listening(self, vector: Tensor, probe: Probe) -> Iterator[None]:
        """Adds the moments of all passes in the block to a vector."""
        hooks = [
            layer.register_forward_hook(
                # First of all hooks, as another may return something else than the layer.
                partial(self._take, vector, probe, number),
                prepend=True,
                with_kwargs=True,
            )
            for number, layers in enumerate(self._layers)
            for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(
        self,
        vector: Tensor,
        probe: Probe,
        number: int,
        layer: PatchLayer,
        args: tuple[Tensor, ...],
        named: dict[str, Tensor],
        outputs: Tensor,
    ) -> Tensor | None:
        (inputs,) = (*args, *named.values())
        if not inputs.numel():
            return None
        num_rows, moments = self._split(vector[slice(*self.starts[number : number + 2])], number)
        inputs = inputs[None] if inputs.ndim < layer.weight.ndim else inputs
        with torch.no_grad():
            if "squares" in moments:
                # Rows only copy inputs, so that examples can be added before there are any.
                squares = inputs.to(vector.dtype).square().sum(dim=0, keepdim=True)
                rows = rows_of(layer, squares)
                moments["squares"] += rows.sum(dim=0)
                num_rows += len(inputs) * len(rows)
            if "inputs" in moments:
                most = self._config.reconstruct_positions
                key = ("positions", self._units[number].name, probe.batch_index)
                rows = rows_of(layer, inputs, most, derive_seed(probe.seed, *key)).to(vector.dtype)
                rows_K = rows.transpose(0, 1)
                moments["inputs"] += rows_K.mT @ rows_K
                num_rows += len(rows)
        if "gradients" not in moments or not outputs.requires_grad:
            return None
        # A view that is then changed in place would not be told its gradient.
        outputs = outputs.clone() if outputs._is_view() else outputs
        outputs.register_hook(partial(_take_gradient, moments["gradients"], layer, probe.num_items))
        return outputs


@torch.no_grad()
def _take_gradient(squares: Tensor, layer: PatchLayer, num_items: float, gradient: Tensor) -> None:
    """Adds e e^T, given the gradient of the batch's mean loss in a layer's outputs."""
    axis = -1 if isinstance(layer, nn.Linear) else -(layer.weight.ndim - 1)
    rows = gradient.movedim(axis, -1).reshape(-1, len(squares), squares.shape[-1])
    rows_K = rows.transpose(0, 1).to(squares.dtype) * num_items
    squares += rows_K.mT @ rows_K


def _find_uses(model: nn.Module, unit: Prunable, criterion: str) -> list[PatchLayer]:
    """Finds the layers that a parameter is the weight of.

    Raises:
        PruneError: It is something else, too.
    """
    found: list[PatchLayer] = []
    groups: set[int] = set()
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not unit.parameter:
                continue
            kinds = (kind for kind in _FORWARDS if isinstance(module, kind))
            is_plain = own == "weight" and any(type(module).forward is k.forward for k in kinds)
            groups.add(getattr(module, "groups", 1))
            if not is_plain or len(groups) > 1:
                where = f"'{name}', a {type(module).__name__}" if name else type(module).__name__
                raise PruneError(
                    f"prune.criterion = {criterion}: cannot score '{unit.name}', which {where} "
                    "uses, as it reads what goes into plain linear layers and convolutions; name "
                    f"'{unit.name}' in prune.exclude, or choose another criterion"
                )
            found.append(module)
    return found


_FORWARDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


# -- statistics ------------------------------------------------------------------------------------


def mean_squares(sums: LayerSums, damping: float) -> Tensor:
    """Computes the mean of x_j^2 over rows, (K, M, C)."""
    means = sums.moments["squares"] / sums.num_rows
    return means[:, None].expand_as(sums.weight)


def relative_pivots(sums: LayerSums, damping: float) -> Tensor:
    """Computes 1 / ([H^-1]_jj sum |y|^2), (K, M, C), H being sum x x^T over an output's inputs.

    What an output keeps are weights other than 0; of the others the statistic is 0.
    """
    found = torch.zeros_like(sums.weight)
    energy = 0.0
    for group, inputs in enumerate(sums.moments["inputs"]):
        weight = sums.weight[group]
        energy += float(((weight @ inputs) * weight).sum())
        for rows, kept in equal_supports(weight != 0):
            found[group][rows[:, None], kept] = _pivots(inputs[kept][:, kept], damping)
    # Where nothing comes in, nothing goes out.
    return found / energy if energy != 0 else found.zero_()


def kronecker_pivots(sums: LayerSums, damping: float) -> Tensor:
    """Computes 1 / ([A^-1]_jj [B^-1]_ii), (K, M, C), of A = mean of x x^T and B = sum e e^T.

    Of inputs and outputs without any weight other than 0 the statistic is 0.
    """
    found = torch.zeros_like(sums.weight)
    for group, weight in enumerate(sums.weight):
        inputs, gradients = (sums.moments[name][group] for name in ("inputs", "gradients"))
        (rows,), (kept,) = ((weight != 0).any(dim=axis).nonzero(as_tuple=True) for axis in (1, 0))
        of_outputs = _pivots(gradients[rows][:, rows], damping)
        of_inputs = _pivots(inputs[kept][:, kept] / sums.num_rows, damping)
        found[group][rows[:, None], kept] = torch.outer(of_outputs, of_inputs)
    return found


def _pivots(moment: Tensor, damping: float) -> Tensor:
    """Computes 1 / [M^-1]_jj, (S,), of moments that are damped relative to their mean diagonal.

    Raises:
        PruneError: They cannot be inverted without damping.
    """
    strength = damping * moment.diagonal().mean()
    if not bool(torch.isfinite(moment).all()):
        return torch.full_like(moment[0], torch.nan)
    if not bool(moment.any()):
        return torch.zeros_like(moment.diagonal())
    factor, fault = torch.linalg.cholesky_ex(moment + strength * torch.eye(len(moment)).to(moment))
    if int(fault):
        raise PruneError(
            f"prune.reconstruct_damping = {damping:g}: the inputs of a layer, or its gradients, "
            "are linearly dependent, and the criterion inverts their moments; raise it"
        )
    return 1 / torch.cholesky_inverse(factor).diagonal()
