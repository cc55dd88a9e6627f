"""What a network costs, measured from its weights as they are.

Multiply-adds are those of convolutions and matrix products. They are counted operation by
operation, and each is put down to the parameter that takes part in it, whichever module calls it.
Where an operation hides its products, or the pass fails, nothing is counted, and the record says
why: a part of the sum would look like a saving.
"""

from __future__ import annotations

import copy
import math
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gbp_ray.errors import in_one_line
from gbp_ray.pruning.masks import PRUNABLE_LAYERS, Prunable
from gbp_ray.pruning.ranks import isolated
from gbp_ray.pruning.sharding import add_over_ranks, local
from gbp_ray.store import CostRecord, LayerRecord
from gbp_ray.workload import in_mode

__all__ = ["Macs", "count_macs", "measure"]

_HIDES = re.compile(
    r"(?!upsample|_thnn_fused)(\w*_)?"
    r"(\w*mm|rnn|lstm|gru|conv(olution)?|linear|matmul|attention|trilinear|encoder)"
    r"(\dd)?(_\w*)?"
)
"""Names of torch's operations that multiply matrices inside, where they have no formula."""
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: lambda a, b, **rest: 2 * a.numel(),
    torch.ops.aten.addmv: lambda c, a, b, **rest: 2 * a.numel(),
    torch.ops.aten.dot: lambda a, b, **rest: 2 * a.numel(),
    torch.ops.aten.vdot: lambda a, b, **rest: 2 * a.numel(),
}
"""Operations that torch's own counter passes over, in floating-point operations."""
_SWITCHING = threading.Lock()
"""Torch's switches are those of the whole process."""
_KEEPS_ZEROS = re.compile(r"_to_copy|clone|mul|div|neg|cat|stack|_?fake_quantize\w+|\w+_fq_helper")
"""Names of torch's operations whose result is zero wherever their argument is."""


@dataclass(frozen=True)
class Macs:
    """The multiply-adds of a dense network.

    Attributes:
        by_parameter: First name of a matrix to the multiply-adds that its weights take part in.
        total: Of the whole network.
        fault: Why nothing was counted, or "".
    """

    by_parameter: Mapping[str, int]
    total: int
    fault: str = ""


def count_macs(model: nn.Module, example: Tensor) -> Macs:
    """Counts the multiply-adds of one forward pass in eval mode.

    The pass runs on a copy, so that it leaves no trace in buffers or parameters. It never fails.

    Args:
        example: (1, ...) one prepared input.

    Returns:
        Those of convolutions and matrix products, dense; a weight that is used twice counts twice.
    """
    # Weights that are computed from others cannot be copied by torch.
    with suppress(Exception):
        model = copy.deepcopy(model)
    counter = _Counter(model)
    some = next(model.parameters(), example)
    try:
        with _looked_at(model), counter:
            model(example.to(some.device))
    except Exception as error:  # noqa: BLE001 - a job is not to end for want of a count
        return Macs({}, 0, in_one_line(error)[:200])
    if counter.hiding:
        return Macs({}, 0, f"{', '.join(sorted(counter.hiding))}: does not show what it multiplies")
    by_parameter = {name: round(found) for name, found in counter.by_parameter.items()}
    return Macs(by_parameter, counter.total)


@contextmanager
def _looked_at(model: nn.Module) -> Iterator[None]:
    """Switches to eval mode and away from kernels that hide their products, then back."""
    # Recurrent layers have kernels of their own in oneDNN and cuDNN.
    switches: list[tuple[Callable[[], bool], Callable[[bool], object]]] = [
        (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
        (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
        (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    ]
    with ExitStack() as stack:
        stack.enter_context(_SWITCHING)
        for is_on, switch in switches:
            stack.callback(switch, is_on())
            switch(False)
        if "torch._dynamo" in sys.modules:  # its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(isolated(model, 0))
        stack.enter_context(torch.no_grad())
        stack.enter_context(in_mode(model, is_training=False))
        yield


class _Counter(TorchDispatchMode):
    """Counts products inside the block, and whose weights take part in them.

    A matrix is known by its storage, which its views share. What keeps its zeros, such as a copy in
    another precision, stands for it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.total = 0
        self.by_parameter: dict[str, float] = {}
        self.hiding: set[str] = set()
        # Storage to (first element, behind the last one, share of it by name of the matrix).
        self._known: dict[int, list[tuple[int, float, dict[str, float]]]] = {}
        self._watched: list[weakref.ref[Any]] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                start = int(parameter.storage_offset())
                self._remember(parameter, start, start + int(parameter.numel()), {name: 1.0})

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operation = func.overloadpacket
        formula = flop_registry.get(operation) or _FORMULAS.get(operation)
        if formula is None:
            with self:
                outputs = func.decompose(*args, **kwargs)
            if outputs is not NotImplemented:
                return outputs
        outputs = func(*args, **kwargs)
        name = operation.__name__
        if formula is not None:
            # A multiply-add is two floating-point operations.
            macs = formula(*args, **kwargs, out_val=outputs) // 2
            self.total += macs
            # What is added to a product takes no part in it.
            operands = args[1:3] if name.startswith(("add", "badd")) else args[:3]
            self._put_down(macs, [self._find(value) for value in operands])
        elif not func.namespace.startswith(("aten", "prim", "profiler")) or _HIDES.fullmatch(name):
            self.hiding.add(f"{func.namespace}::{name}")
        elif _KEEPS_ZEROS.fullmatch(name):
            self._pass_on(name, args, outputs)
        return outputs

    def _put_down(self, macs: int, operands: list[dict[str, float]]) -> None:
        known = [shares for shares in operands if shares]
        # Of a product of two matrices of weights nobody knows what a zero saves.
        for name, share in known[0].items() if len(known) == 1 else ():
            self.by_parameter[name] = self.by_parameter.get(name, 0.0) + share * macs

    def _pass_on(self, name: str, args: tuple[Any, ...], outputs: Any) -> None:
        made = next(value for value in tree_leaves(outputs) if isinstance(value, Tensor))
        if name in ("cat", "stack"):
            shares: dict[str, float] = {}
            for value in args[0]:
                for matrix, share in self._find(value).items():
                    share *= value.numel() / made.numel()
                    shares[matrix] = shares.get(matrix, 0.0) + share
        else:
            sources = args[:2] if name == "mul" else args[:1]
            found = (self._find(value) for value in sources if _is_as_large(value, made))
            shares = next((share for share in found if share), {})
        if shares:
            self._remember(made, 0, math.inf, shares)

    def _remember(self, tensor: Tensor, start: int, stop: float, shares: dict[str, float]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._known.setdefault(key, []).append((start, stop, shares))
        # Another storage may come to lie in the place of one that is gone.
        self._watched.append(weakref.ref(storage, lambda _: self._known.pop(key, None)))

    def _find(self, value: object) -> dict[str, float]:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return {}
        for start, stop, shares in self._known.get(value.untyped_storage()._cdata, ()):
            if start <= value.storage_offset() < stop:
                return shares
        return {}


def _is_as_large(value: object, other: Tensor) -> bool:
    return isinstance(value, Tensor) and value.numel() == other.numel()


@torch.no_grad()
def measure(model: nn.Module, units: list[Prunable], macs: Macs) -> CostRecord:
    """Measures size, sparsity and multiply-adds. Communicates where the network is sharded.

    Args:
        units: The prunable parameters.
        macs: From `count_macs`, which pruning does not change.

    Returns:
        Counts over the whole model and by prunable layer. Multiply-adds of the pruned network leave
        out those with a zero weight; each weight of a parameter is taken to take part equally
        often. Bytes are those of the dense tensors; `num_bytes_sparse` is what non-zero weights and
        one bit per prunable weight would take.
    """
    # parameters() yields a tied parameter once.
    parameters = list(model.parameters())
    counted = [int(torch.count_nonzero(local(p))) for p in parameters]
    nonzero = dict(zip(parameters, add_over_ranks(counted, parameters), strict=True))
    layers = []
    spared = 0
    for unit in units:
        num_weights = unit.parameter.numel()
        num_nonzero = nonzero[unit.parameter]
        layer_macs = macs.by_parameter.get(unit.name, 0)
        macs_nonzero = layer_macs * num_nonzero // num_weights
        spared += layer_macs - macs_nonzero
        layers.append(
            LayerRecord(
                name=unit.name,
                shape=tuple(unit.parameter.shape),
                num_weights=num_weights,
                num_nonzero=num_nonzero,
                macs=layer_macs,
                macs_nonzero=macs_nonzero,
            )
        )
    state = [*parameters, *model.buffers()]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state)
    spared_bytes = sum(
        (unit.parameter.numel() - layer.num_nonzero) * unit.parameter.element_size()
        for unit, layer in zip(units, layers, strict=True)
    )
    mask_bytes = sum(-(-layer.num_weights // 8) for layer in layers)
    return CostRecord(
        num_parameters=sum(p.numel() for p in parameters),
        num_nonzero=sum(nonzero.values()),
        macs=macs.total,
        macs_nonzero=macs.total - spared,
        macs_fault=macs.fault,
        num_bytes=num_bytes,
        num_bytes_sparse=num_bytes - spared_bytes + mask_bytes,
        layers=tuple(layers),
        unpruned=_find_unpruned(model, units),
    )


def _find_unpruned(model: nn.Module, units: list[Prunable]) -> dict[str, tuple[int, str]]:
    pruned = {unit.parameter for unit in units}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.numel() and parameter not in pruned:
            owner = model.get_submodule(name.rpartition(".")[0])
            is_layer = isinstance(owner, (*PRUNABLE_LAYERS, ParametrizationList))
            kind = type(owner).__name__.removeprefix("FSDP")
            found[name] = (parameter.numel(), "prune.exclude" if is_layer else kind)
    return found
