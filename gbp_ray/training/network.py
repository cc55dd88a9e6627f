"""Builds the network of a trial under the job's seed, loads it, and counts its multiply-adds.

A network that `build_model` returns with its weights starts from those. One on the meta device
(built under `torch.device("meta")`) gets its weights layer by layer from each layer's own
`reset_parameters`, under a seed of the layer's name; its tensors that are not on the meta device
keep their values. So a sharded network larger than one worker never exists as a whole, and a
replicated one built the same way starts from the same bits.

Ranks compare digests of what they have built instead of broadcasting weights: where a process
differs in the weights, it also differs in what they do not hold.
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
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gbp_ray.distributed.agreement import (
    check_on_record,
    check_same_start,
    check_same_weights,
    digest_tensor,
    digest_weights,
    fingerprints_of_data,
    fingerprints_of_network,
)
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import (
    copy_sharded,
    is_shard,
    is_sharded,
    local,
    shard_like,
    shard_network,
)
from gbp_ray.errors import StoreError, WorkloadError, in_one_line
from gbp_ray.workloads.contract import Workload, in_mode
from gbp_ray.workloads.data import derive_seed, first_example, seeded
from gbp_ray.workloads.loading import build_network
from gbp_ray.workloads.weights import tensor_state

__all__ = [
    "Macs",
    "Start",
    "build_start",
    "copy_frozen",
    "count_macs",
    "load_rows",
    "load_weights",
    "network_of_seed",
    "rebuild_network",
]


class Start(NamedTuple):
    """This rank's network as a trial starts with it, with fingerprints of network and data."""

    model: nn.Module
    macs: Macs
    fingerprints: dict[str, str]


_STARTS: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
"""Digests of each layer when it was built, to recognise one that is returned again."""


def network_of_seed(
    workload: Workload, seed: int, *, is_changed: bool = False
) -> tuple[nn.Module, bool]:
    """Builds the unsharded network with the weights that every rank starts from.

    Args:
        is_changed: True if it will be trained or loaded.

    Returns:
        The network, and True if the workload built it without weights.

    Raises:
        WorkloadError: It cannot be built, or a layer cannot initialise its weights.
    """
    model, _ = _build(workload, seed, is_changed=is_changed)
    if not _is_blank(model):
        return model, False
    blank = copy.deepcopy(model)
    _give_memory(model, torch.device("cpu"))
    _fill(model, blank, seed)
    return model, True


def build_start(
    workload: Workload,
    seed: int,
    ranks: Ranks,
    strategy: str,
    stored: Mapping[str, str] | None = None,
    source: str = "",
) -> Start:
    """Builds this rank's network, the same one on all ranks. Communicates.

    Args:
        strategy: "fsdp" shards it.
        stored: Fingerprints on record of a trial that is resumed.
        source: Name of that record in errors.

    Raises:
        WorkloadError: As `network_of_seed`; or network or data differ between ranks, or from what
            is on record.
    """
    model, macs, digests, found = ranks.run_collectively(lambda: _build_here(workload, seed))
    check_same_start(ranks, found)
    ranks.run_collectively(lambda: check_on_record(found, stored or {}, source))
    blank = copy.deepcopy(model) if _is_blank(model) else None
    if blank is None:
        check_same_weights(ranks, digests)
        model = model.to(ranks.device)
    elif strategy != "fsdp":
        _give_memory(model, ranks.device)
    if strategy == "fsdp":
        shard_network(model, ranks.device, ranks.world_size)
    if blank is not None:
        layers = blank
        digests = ranks.run_collectively(lambda: _fill(model, layers, seed))
        check_same_weights(ranks, digests)
    return Start(model, macs, found)


def _build_here(
    workload: Workload, seed: int
) -> tuple[nn.Module, Macs, dict[str, str], dict[str, str]]:
    model, digests = _build(workload, seed, is_changed=True)
    macs = count_macs(model, first_example(workload)[0])
    found = fingerprints_of_network(model, is_blank=_is_blank(model))
    found |= fingerprints_of_data(workload)
    return model, macs, digests, found


def _build(workload: Workload, seed: int, *, is_changed: bool) -> tuple[nn.Module, dict[str, str]]:
    """Builds the network; returns it with the digests of its tensors.

    Raises:
        WorkloadError: It cannot be built, or was changed since it was built before.
    """
    with seeded(derive_seed(seed, "model")):
        model = build_network(workload)
    digests = digest_weights(model)
    for path, module in model.named_modules():
        # Asked for by methods, which modules of TorchScript have, too.
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        names = {f"{path}.{name}".lstrip(".") for name, _ in tensors}
        own = {name: digests[name] for name in names & digests.keys()}
        if _STARTS.get(module, own) != own:
            raise WorkloadError(
                f"workload.build_model: returned '{path or type(module).__name__}' again, which "
                "this process has trained since; make the network in build_model or in "
                "workload.factory, not once for all trials of a process"
            )
        if own and is_changed:
            _STARTS[module] = own
    return model, digests


def copy_frozen(model: nn.Module) -> nn.Module:
    """Copies a network for evaluation only. Communicates where it is sharded."""
    twin = copy_sharded(model) if is_sharded(model) else copy.deepcopy(model)
    return twin.eval().requires_grad_(False)


def _is_blank(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Moves a network off the meta device; tied weights, which torch would untie, stay tied."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)
    for (owner, key), *others in places.values():
        for module, name in others:
            module._parameters[name] = owner._parameters[key]


@torch.no_grad()
def _fill(model: nn.Module, blank: nn.Module, seed: int) -> dict[str, str]:
    """Initialises the weights layer by layer, each rank keeping its rows; returns their digests.

    The first layer initialises a tied weight.

    Args:
        blank: The same network on the meta device, unsharded.
    """
    filled: set[nn.Parameter] = set()
    digests = {}
    for path, module in model.named_modules():
        drawn = _draw_layer(path, blank.get_submodule(path), derive_seed(seed, "layer", path))
        for name, values in drawn.items():
            tensor = module.get_parameter(name) if name in module._parameters else None
            if tensor is not None and tensor in filled:
                continue
            if tensor is not None:
                filled.add(tensor)
            digests[f"{path}.{name}"] = digest_tensor(values)
            target = module.get_buffer(name) if tensor is None else tensor.detach()
            local(target).copy_(local(shard_like(values, target)))
    return digests


def _draw_layer(path: str, blank: nn.Module, seed: int) -> dict[str, Tensor]:
    """Resets a layer's own parameters and buffers, not those of its submodules.

    Tensors that are not on the meta device keep their values.
    """
    layer = copy.deepcopy(blank)
    drawn: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    owners: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
    for owner in owners:
        for name, tensor in owner.items():
            if tensor is not None and tensor.is_meta:
                unset = math.nan if tensor.is_floating_point() else 0
                values = torch.full(tensor.shape, unset, dtype=tensor.dtype)
                drawn[name] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values
                owner[name] = drawn[name]
            elif tensor is not None:
                given[name] = tensor.detach().clone()
    if not drawn:
        return given
    reset = getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))
    if callable(reset):
        with seeded(seed):
            reset()
    unset_names = [
        name
        for name, values in drawn.items()
        if values.is_floating_point() and bool(values.isnan().any())
    ]
    if unset_names or not callable(reset):
        name = f"{path}.{(unset_names or list(drawn))[0]}".lstrip(".")
        raise WorkloadError(
            f"workload.build_model: '{name}' is on the meta device and {type(blank).__name__} has "
            "no reset_parameters() that sets it; give it one, or build the network with its weights"
        )
    return {name: values.detach() for name, values in drawn.items()} | given


def rebuild_network(
    workload: Workload,
    seed: int,
    weights: bytes,
    source: str,
    stored: Mapping[str, str] | None = None,
) -> nn.Module:
    """Builds the network of a workload with stored weights, in eval mode.

    Args:
        seed: Decides the values that the weights file does not hold.
        weights: weights.safetensors of a round.
        source: Name of the file in errors.
        stored: Fingerprints of round 0 of the trial, which the network must match.

    Raises:
        StoreError: The weights are damaged or do not fit.
        WorkloadError: The network cannot be built, or has changed.
    """
    model, is_blank = network_of_seed(workload, seed, is_changed=True)
    load_weights(model, weights, source)
    check_on_record(fingerprints_of_network(model, is_blank=is_blank), stored or {}, source)
    return model.eval()


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

_SWITCHING = threading.Lock()
"""Torch's switches apply to the whole process."""

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

    The pass runs on a copy, so that it changes no buffers or parameters. It never fails.

    Args:
        example: (1, ...) one prepared input.

    Returns:
        Those of convolutions and matrix products; a weight that is used twice counts twice.
    """
    # Weights that are computed from others cannot be copied by torch.
    with suppress(Exception):
        model = copy.deepcopy(model)
    counter = _Counter(model)
    some = next(model.parameters(), example)
    try:
        with _counting_mode(model), counter:
            model(example.to(some.device))
    except Exception as error:  # noqa: BLE001 - a bug still deserves one line
        return Macs({}, 0, in_one_line(error)[:200])
    if counter.hiding:
        return Macs({}, 0, f"{', '.join(sorted(counter.hiding))}: does not show what it multiplies")
    by_parameter = {name: round(found) for name, found in counter.by_parameter.items()}
    return Macs(by_parameter, counter.total)


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


class _Counter(TorchDispatchMode):
    """Counts products inside the block by the matrix of weights that takes part in them.

    A matrix is identified by its storage, which its views share. The result of an operation that
    keeps its zeros, such as a copy in another precision, counts as the matrix.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.total = 0
        self.by_parameter: dict[str, float] = {}
        self.hiding: set[str] = set()
        # Storage to (first element, end, share of the elements by name of the matrix).
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
            # The first operand of addmm and its like is added to the product.
            operands = args[1:3] if name.startswith(("add", "badd")) else args[:3]
            self._attribute(macs, [self._find(value) for value in operands])
        elif not func.namespace.startswith(("aten", "prim", "profiler")) or _HIDES.fullmatch(name):
            self.hiding.add(f"{func.namespace}::{name}")
        elif _KEEPS_ZEROS.fullmatch(name):
            self._pass_on(name, args, outputs)
        return outputs

    def _attribute(self, macs: int, operands: list[dict[str, float]]) -> None:
        known = [shares for shares in operands if shares]
        # What a zero saves in a product of two matrices of weights is not known.
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


def load_weights(model: nn.Module, data: bytes, source: str) -> None:
    """Loads a round's weights into a network, in place; a sharded one takes its rows.

    Raises:
        StoreError: The bytes are not safetensors, or do not fit the model.
    """
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        # KeyError: a dtype that torch does not have.
        raise StoreError(f"{source}: is not a readable safetensors file: {error}") from None
    own = tensor_state(model)
    fitting = {
        name: shard_like(tensor, own[name])
        for name, tensor in tensors.items()
        if name in own and (own[name].shape, own[name].dtype) == (tensor.shape, tensor.dtype)
    }
    missing, _ = model.load_state_dict(fitting, strict=False)
    present = {_identity(own[name]) for name in tensors if name in own}
    missing = [n for n in missing if n in own and _identity(own[n]) not in present]
    misfits = [name for name in tensors if name not in fitting]
    if missing or misfits:
        name = (missing or misfits)[0]
        raise StoreError(f"{source}: does not fit the model at '{name}'; was the workload changed?")


def load_rows(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads whole tensors that fit into a network, in place; a sharded one takes its rows."""
    own = tensor_state(model)
    rows = {name: shard_like(t.to(own[name].dtype), own[name]) for name, t in tensors.items()}
    model.load_state_dict(rows, strict=False)


def distinct_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict with tied tensors, which safetensors refuses, under one name only."""
    seen: set[tuple[int, ...]] = set()
    distinct: dict[str, Tensor] = {}
    for name, tensor in tensor_state(model).items():
        key = _identity(tensor)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        distinct[name] = tensor.detach()
    return distinct


def _identity(tensor: Tensor) -> tuple[int, ...]:
    """Returns a key that is equal for tied tensors, on all ranks alike."""
    if is_shard(tensor):
        # A rank may have no rows, and then no address.
        return (id(tensor),)
    return (tensor.data_ptr(), *tensor.shape)
