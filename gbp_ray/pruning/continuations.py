"""What follows a layer: the BatchNorm that scales its outputs, what is added to them, and ReLU.

In a residual network the output of a block's last layer is added to what came into the block. A
layer that is refitted behind pruned ones can make up for the error of the other summand as well,
as long as that is known before the layer computes. And where ReLU comes next, an output that it
sets to zero in the dense network may be anything below. Seen in one pass: no code of a network is
read.

Shape suffixes: O = outputs of a layer, R = rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gbp_ray.pruning.activations import PatchLayer

__all__ = ["Continuation", "find_continuations"]

_LEAST_SCALE = 1e-3
"""Below this share of the largest scale, an output hardly counts in the sum: it is left alone."""


@dataclass(frozen=True)
class Continuation:
    """What happens to a layer's outputs next.

    Attributes:
        scale: From `weight @ row` to the sum, (O,): of the BatchNorms that they pass through.
        shift: The same, with the layer's bias.
        summand: Name of the module whose first input is added to them after that.
        steps: What is done to that input first: functions without weights, such as a slice.
        is_rectified: Whether nothing but a ReLU reads the sum.
    """

    scale: Tensor
    shift: Tensor
    summand: str | None = None
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    is_rectified: bool = False

    def summand_of(self, given: Tensor) -> Tensor:
        """Computes the summand from the first input of its module."""
        for step in self.steps:
            given = step(given)
        return given

    def targets(
        self,
        outputs: Tensor,
        dense: tuple[Tensor, Tensor],
        error: Tensor | None,
    ) -> Tensor:
        """Returns what `weight @ row` has to be for the sum to be as in the dense network, (R, O).

        Args:
            outputs: `weight @ row` of the dense network, (R, O).
            dense: Scale and shift in the dense network.
            error: The other summand in the dense network less that in the other, (R, O).
        """
        dense_scale, dense_shift = dense
        inverse = self._inverse_scale()
        ratio = torch.where(inverse != 0, dense_scale * inverse, 1)
        wanted = outputs * ratio + (dense_shift - self.shift) * inverse
        return wanted if error is None else wanted + error * inverse

    def free_below_zero(self, targets: Tensor, outputs: Tensor, summand: Tensor | None) -> Tensor:
        """Returns targets that give up what ReLU hides, (R, O).

        Where the sum is to be below zero, it is to stay what it is, or to come to zero. Solving for
        these and asking again lowers the error behind ReLU with each solution, as its square is
        never above that of the targets (Zhang et al. 2015, arXiv 1505.06798, section 3.2, take
        turns likewise).

        Args:
            targets: Of `targets`.
            outputs: `weight @ row` with the weights of the last solution, (R, O).
            summand: What is added, in the network that is refitted, (R, O).
        """
        inverse = self._inverse_scale()
        added = self.shift if summand is None else self.shift + summand
        wanted, found = (values * self.scale + added for values in (targets, outputs))
        goal = torch.where(wanted > 0, wanted, found.clamp(max=0))
        return torch.where(inverse != 0, (goal - added) * inverse, targets)

    def _inverse_scale(self) -> Tensor:
        counts = self.scale.abs() > _LEAST_SCALE * self.scale.abs().max()
        return torch.where(counts, 1 / self.scale, 0)


@torch.no_grad()
def find_continuations(
    model: nn.Module, layers: Mapping[str, PatchLayer], run: Callable[[], object]
) -> dict[str, Continuation]:
    """Finds what follows each layer that a pass comes to, of a network in eval mode.

    Args:
        layers: Called once in a pass.
        run: Passes through the network.
    """
    watch = _Watch()
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)
    for_layer = {module: name for name, module in layers.items()}
    hooks = []
    for module, name in names.items():
        hooks.append(module.register_forward_pre_hook(partial(watch.take_input, name)))
        if module in for_layer:
            found = partial(watch.take_output, for_layer[module])
            # In front of hooks that let gathered weights go.
            hooks.append(module.register_forward_hook(found, prepend=True))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_hook(watch.take_norm, prepend=True))
    try:
        with watch:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return watch.known()


@dataclass
class _Seen:
    """A tensor as it was, which is kept so that no other gets its id."""

    tensor: Tensor
    version: int
    name: str
    order: int
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    is_linear: bool = False


class _Watch(TorchFunctionMode):
    """Follows tensors through a pass by their identity."""

    def __init__(self) -> None:
        super().__init__()
        self._inputs: dict[int, _Seen] = {}
        self._outputs: dict[int, _Seen] = {}
        self._calls: dict[str, int] = {}
        self._affine: dict[str, tuple[Tensor, Tensor]] = {}
        self._summands: dict[str, _Seen] = {}
        self._sums: dict[int, _Seen] = {}
        # Of each layer: tensors on the way to the sum, how often they are read, and which by ReLU.
        self._ways: dict[str, list[int]] = {}
        self._reads = Counter[str]()
        self._rectified: dict[str, int] = {}
        self._time = 0

    def known(self) -> dict[str, Continuation]:
        """Returns what follows each layer that was seen."""
        found = {name: Continuation(*affine) for name, affine in self._affine.items()}
        for name, summand in self._summands.items():
            # Of a module that is called again, the first input is not the one that is added.
            if self._calls[summand.name] == 1:
                steps = summand.steps
                found[name] = replace(found[name], summand=summand.name, steps=steps)
            else:
                del self._ways[name]
        for name, way in self._ways.items():
            is_last = self._rectified.get(name) == way[-1]
            is_rectified = is_last and self._reads[name] == len(way)
            found[name] = replace(found[name], is_rectified=is_rectified)
        return found

    def take_input(self, name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        self._calls[name] = self._calls.get(name, 0) + 1
        self._time += 1
        if given and isinstance(given[0], Tensor):
            known = self._lookup(self._inputs, given[0])
            # The input itself takes less memory and time than the steps to it.
            if known is None or known.steps:
                seen = _Seen(given[0], given[0]._version, name, self._time)
                self._inputs[id(given[0])] = seen

    def take_output(
        self, name: str, module: PatchLayer, given: tuple[Any, ...], output: Tensor
    ) -> None:
        weight, bias = module.weight.detach(), module.bias
        shift = weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
        self._affine[name] = weight.new_ones(len(weight)), shift
        is_linear = isinstance(module, nn.Linear)
        seen = _Seen(output, output._version, name, self._time, is_linear=is_linear)
        self._outputs[id(output)] = seen
        self._ways[name] = [id(output)]

    def take_norm(self, module: _BatchNorm, given: tuple[Any, ...], output: Tensor) -> None:
        before = self._lookup(self._outputs, given[0])
        # Of tokens, BatchNorm takes another axis than a linear layer for its channels.
        is_alike = not (before and before.is_linear and output.ndim > 2)
        if before is not None and is_alike and not module.training:
            assert module.running_mean is not None
            assert module.running_var is not None
            scale, shift = self._affine[before.name]
            factor = (module.running_var + module.eps).rsqrt()
            if module.affine:
                factor = factor * module.weight.detach()
            scale, shift = scale * factor, (shift - module.running_mean) * factor
            if module.affine:
                shift = shift + module.bias.detach()
            self._affine[before.name] = scale, shift
            self._outputs[id(output)] = replace(before, tensor=output, version=output._version)
            self._ways[before.name].append(id(output))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        layer = None
        if name in _ADDITIONS and given.get("alpha", 1) == 1:
            layer = self._take_sum(*args[:2])
        read = [self._lookup_end(value) for value in tree_leaves((args, given))]
        source = self._lookup(self._inputs, args[0]) if args else None
        result = func(*args, **given)
        if not isinstance(result, Tensor):
            read = []  # a shape, or another fact
        for end in filter(None, read):
            self._reads[end.name] += 1
            if name in _RECTIFIERS:
                self._rectified[end.name] = id(end.tensor)
        if layer is not None:
            self._sums[id(result)] = _Seen(result, result._version, layer, self._time)
            self._ways[layer].append(id(result))
        # Followed where the input is the only tensor and is not changed itself.
        others = [v for v in tree_leaves((args[1:], given)) if isinstance(v, Tensor)]
        if source and not others and isinstance(result, Tensor) and result is not args[0]:
            step: Callable[[Tensor], Tensor] = partial(_call_on, func, args[1:], given)
            steps = (*source.steps, step)
            seen = replace(source, tensor=result, version=result._version, steps=steps)
            self._inputs.setdefault(id(result), seen)
        return result

    def _take_sum(self, first: Any, second: Any = None) -> str | None:
        """Notes a layer's summand, and returns the name of that layer."""
        for one, other in ((first, second), (second, first)):
            made = self._lookup(self._outputs, one)
            came = self._lookup(self._inputs, other)
            is_known = made and came and came.order < made.order and one.shape == other.shape
            # Each is kept for one layer only.
            taken = [summand.name for summand in self._summands.values()]
            is_first = made is not None and made.name not in self._summands
            if made and came and is_known and is_first and came.name not in taken:
                self._summands[made.name] = came
                return made.name
        return None

    def _lookup_end(self, tensor: Any) -> _Seen | None:
        return self._lookup(self._sums, tensor) or self._lookup(self._outputs, tensor)

    @staticmethod
    def _lookup(known: dict[int, _Seen], tensor: Any) -> _Seen | None:
        seen = known.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return seen if seen is not None and seen.tensor._version == seen.version else None


def _call_on(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Tensor) -> Tensor:
    result: Tensor = func(given, *args, **kwargs)
    return result


_RECTIFIERS = ("relu", "relu_")
_ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")
