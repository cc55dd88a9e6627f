"""Follows a forward pass by its operations: counts multiply-adds by the weights that take part.

Whichever module calls an operation, the product counts for the parameter among its operands. Where
an operation hides its products, or the pass fails, nothing is counted and the record says why.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gbp_ray.distributed.ranks import isolated
from gbp_ray.distributed.sharding import copy_network
from gbp_ray.errors import in_one_line
from gbp_ray.workloads.batch import map_tensors, tensors_in
from gbp_ray.workloads.contract import in_mode

__all__ = ["Macs", "count_macs", "find_unused"]

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
"""Floating-point operations that torch's own counter leaves out."""

_EXAMPLE = ""
"""Stands among names of parameters for the example."""

_SWITCHING = threading.Lock()
"""Torch's switches apply to the whole process."""

_KEEPS_ZEROS = re.compile(
    r"_to_copy|clone|mul|div|neg|cat|stack|_weight_norm_interface|_?fake_quantize\w+|\w+_fq_helper"
)
"""Names of torch's operations whose result is zero wherever their argument is."""


@dataclass(frozen=True)
class Macs:
    """The multiply-adds of a dense network.

    Attributes:
        by_parameter: First name of a matrix to the multiply-adds that its weights take part in.
        total: Of the whole network.
        fault: Why nothing was counted, or "".
        unattributed: Names of matrices that take part in further products, of which it is not known
            what a zero saves.
    """

    by_parameter: Mapping[str, int]
    total: int
    fault: str = ""
    unattributed: frozenset[str] = frozenset()


def count_macs(
    model: nn.Module,
    example: Any,
    run: Callable[[nn.Module, Any], Any] = lambda model, example: model(example),
) -> Macs:
    """Counts the multiply-adds of one forward pass in eval mode.

    The pass runs on a copy, so that it changes no buffers or parameters. It never fails.

    Args:
        example: One prepared example, a tensor or a `Batch`.
        run: Passes it through the network.

    Returns:
        Those of convolutions and matrix products; a weight that is used twice counts twice.
    """
    # Not all can be copied; then the pass restores what it can.
    with suppress(Exception):
        model = copy_network(model)
    some = next(model.parameters(), next(tensors_in(example)))
    example = map_tensors(example, lambda tensor: tensor.to(some.device))
    counter = _Counter(model, example)
    try:
        with _counting_mode(model), counter:
            run(model, example)
    except Exception as error:  # noqa: BLE001 - a bug still deserves one line
        return Macs({}, 0, in_one_line(error)[:200])
    if counter.hiding:
        return Macs({}, 0, f"{', '.join(sorted(counter.hiding))}: does not show what it multiplies")
    by_parameter = {name: round(found) for name, found in counter.by_parameter.items()}
    return Macs(by_parameter, counter.total, unattributed=frozenset(counter.unattributed))


@contextmanager
def _counting_mode(model: nn.Module) -> Iterator[None]:
    """Sets eval mode and disables kernels that hide their products in the block."""
    # oneDNN and cuDNN have kernels of their own for recurrent layers.
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


def find_unused(
    model: nn.Module, passes: Iterable[Callable[[nn.Module], Tensor]], names: Collection[str]
) -> set[str]:
    """Names the parameters from which no operation leads to the loss, in eval mode.

    Each pass runs on a copy. As soon as all are used, the rest is not made.

    Args:
        passes: Each computes the loss of a batch by the network that it is given.
        names: First names of the parameters that are looked for.

    Returns:
        Those of `names` that no pass uses; none where a pass fails, or hides what it does.
    """
    left = set(names)
    try:
        model = copy_network(model)
        for compute in passes:
            following = _Following((n, p) for n, p in model.named_parameters() if n in names)
            with _counting_mode(model), following:
                loss = compute(model)
            used = following.sources_of(loss) | following.read_out
            left -= used
            if not left or not used:
                return set()
    except Exception:  # noqa: BLE001 - what fails here fails in the checks too, which say why
        return set()
    return left


class _Following(TorchDispatchMode):
    """Follows values through the operations in the block, by the storage that they lie in.

    Attributes:
        read_out: Sources of numbers that Python has read, and may have decided by.
    """

    def __init__(self, sources: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.read_out: set[str] = set()
        self._sources: dict[int, set[str]] = {}
        self._watched: list[weakref.ref[Any]] = []
        for name, tensor in sources:
            self._mark(tensor, {name})

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.follow(func, args, kwargs or {}, outputs)
        return outputs

    def sources_of(self, nest: Any) -> set[str]:
        """Returns the names of what the tensors of a nest were computed from."""
        found: set[str] = set()
        for value in tree_leaves(nest):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                found |= self._sources.get(value.untyped_storage()._cdata, set())
        return found

    def follow(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any
    ) -> None:
        """Marks what an operation has made or written with the sources of its arguments."""
        if not (found := self.sources_of((args, kwargs))):
            return
        given = [*args, *(kwargs.get(a.name) for a in func._schema.arguments[len(args) :])]
        written = [
            value
            for argument, value in zip(func._schema.arguments, given, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        made = [v for v in tree_leaves((outputs, written)) if isinstance(v, Tensor)]
        if not made:
            self.read_out |= found
        for tensor in made:
            self._mark(tensor, found)

    def _mark(self, tensor: Tensor, names: set[str]) -> None:
        if tensor.layout is not torch.strided:
            self.read_out |= names
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sources:
            # A new storage may get the address of a freed one.
            self._watched.append(weakref.ref(storage, lambda _: self._sources.pop(key, None)))
        self._sources[key] = self._sources.get(key, set()) | names


class _Counter(_Following):
    """Counts products inside the block by the matrix of weights that takes part in them.

    A matrix is identified by its storage, which its views share. The result of an operation that
    keeps its zeros, such as a copy in another precision, counts as the matrix.

    Attributes:
        unattributed: Matrices that are multiplied by others, or changed before they multiply.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
        super().__init__([*matrices, *((_EXAMPLE, tensor) for tensor in tensors_in(example))])
        self.total = 0
        self.unattributed: set[str] = set()
        self.by_parameter: dict[str, float] = {}
        self.hiding: set[str] = set()
        # Storage to (first element, end, share of the elements by name of the matrix).
        self._known: dict[int, list[tuple[int, float, dict[str, float]]]] = {}
        for name, parameter in matrices:
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
        self.follow(func, args, kwargs, outputs)
        name = operation.__name__
        if formula is not None:
            # A multiply-add is two floating-point operations.
            macs = formula(*args, **kwargs, out_val=outputs) // 2
            self.total += macs
            # The first operand of addmm and its like is added to the product.
            operands = args[1:3] if name.startswith(("add", "badd")) else args[:3]
            self._attribute(macs, operands)
        elif not func.namespace.startswith(("aten", "prim", "profiler")) or _HIDES.fullmatch(name):
            self.hiding.add(f"{func.namespace}::{name}")
        elif _KEEPS_ZEROS.fullmatch(name):
            self._pass_on(name, args, outputs)
        return outputs

    def _attribute(self, macs: int, operands: Iterable[Any]) -> None:
        found = [(shares, value) for value in operands if (shares := self._find(value))]
        for name, share in found[0][0].items() if len(found) == 1 else ():
            self.by_parameter[name] = self.by_parameter.get(name, 0.0) + share * macs
        # What a zero saves in a product of two matrices of weights is not known, or where it is no
        # zero any more. A vector made of weights is no matrix, such as the W v of a norm.
        for value in operands:
            sources = self.sources_of(value) if isinstance(value, Tensor) and value.ndim > 1 else ()
            if _EXAMPLE not in sources and (len(found) > 1 or not self._find(value)):
                self.unattributed.update(sources)

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
            found = (
                self._find(value)
                for value in sources
                if isinstance(value, Tensor) and value.numel() == made.numel()
            )
            shares = next((share for share in found if share), {})
        if shares:
            self._remember(made, 0, math.inf, shares)

    def _remember(self, tensor: Tensor, start: int, stop: float, shares: dict[str, float]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._known.setdefault(key, []).append((start, stop, shares))
        # A new storage may get the address of a freed one.
        self._watched.append(weakref.ref(storage, lambda _: self._known.pop(key, None)))

    def _find(self, value: object) -> dict[str, float]:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return {}
        for start, stop, shares in self._known.get(value.untyped_storage()._cdata, ()):
            if start <= value.storage_offset() < stop:
                return shares
        return {}
