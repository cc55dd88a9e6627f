"""Gates of whole units: a factor of 1 on all that reads a unit, and the gradient in it.

That gradient is the sum of w g over the weights that read the unit, w g the weight's own. It takes
no gradient per weight where a layer reads the units through its input: a hook multiplies the input
by a vector of ones, and autograd differentiates by the vector. With a vector for each example of a
batch one pass gives the gradients of all examples.

Nothing is taken on trust. On one batch the hooks' gradients are compared with w g of the weights
themselves, and a few of its examples with passes of their own. A weight that is used without its
layer being called (attention of torch, recurrent layers, functions) is differentiated by itself;
where examples cannot be told apart in a batch (windows or tokens in the first axis, sequences
before examples), they pass one by one.

Shape suffixes: U = units of the network, G = units of one group, K = positions of one unit, C =
positions along a weight's axis of inputs, B = examples of a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.utils.parametrize import ParametrizationList

from gbp_ray.distributed.sharding import is_sharded, leaves, only_requiring
from gbp_ray.errors import PruneError
from gbp_ray.pruning.structure import Slice, Structure
from gbp_ray.workloads.contract import CONVOLUTIONS, TRANSPOSED

__all__ = ["Gates", "Heard", "Pass", "join_positions"]

Pass = Callable[[], None]
"""Passes examples forward, and their mean loss backward, if it depends on anything."""

_AGREEMENT = 1e-4
"""Largest difference between two ways to one gradient, relative to its largest entry."""


@dataclass(frozen=True, eq=False)
class _Site:
    """A layer that reads units through its input.

    Attributes:
        axis: Of the input, from the end.
        num_repeats: How often the weight's axis lies along the input's, in groups of channels.
    """

    module: nn.Module
    axis: int
    num_repeats: int


@dataclass(frozen=True, eq=False)
class _Reader:
    """An axis of a weight along which it reads units.

    Attributes:
        length: C.
        parts: Of each group its first unit, the positions, (G, K), and which of them count.
        sites: Layers that own the weight and read it along this axis.
        makers: Embeddings that own the weight, too, and make the units with it.
        is_mixed: The weight makes units along the same axis, too, as a tied one does.
    """

    name: str
    dim: int
    length: int
    parts: tuple[tuple[int, Tensor, Tensor], ...]
    sites: tuple[_Site, ...]
    makers: tuple[nn.Embedding, ...]
    is_mixed: bool


def join_positions(parts: Sequence[Slice]) -> tuple[np.ndarray, np.ndarray]:
    """Joins the positions of slices of one tensor, axis and group.

    Returns:
        (G, K) positions, sorted; (G, K) bool, False for those that were there before.
    """
    positions_GK = np.sort(np.concatenate([part.positions for part in parts], axis=1), axis=1)
    is_new = np.ones(positions_GK.shape, dtype=bool)
    is_new[:, 1:] = positions_GK[:, 1:] != positions_GK[:, :-1]
    return positions_GK, is_new


@dataclass
class Heard:
    """What one forward and backward pass gives.

    Attributes:
        gates: By reader, (C,) or (B, C), with their gradients.
        made: Likewise of embeddings.
        products: By weight and axis the sum of w g, (C,) float64.
        sizes: The largest sum of |w g| by weight and axis.
        fired: Layers whose input was gated.
        missed: Names of weights whose layer was called with no input that fits.
        is_told_apart: Each gated input had the batch's examples along its first axis.
    """

    gates: dict[int, Tensor] = field(default_factory=dict)
    made: dict[int, Tensor] = field(default_factory=dict)
    products: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)
    fired: set[nn.Module] = field(default_factory=set)
    missed: set[str] = field(default_factory=set)
    is_told_apart: bool = True

    def made_by(self, number: int) -> Tensor | float:
        """Returns the gradient of what an embedding makes with a reader's weight, or 0."""
        return _gradient(self.made[number]) if number in self.made else 0.0


class Gates:
    """The gates of all units of a network.

    Args:
        model: Replicated or sharded, as the structure describes it.

    Attributes:
        by_weight: Numbers of the readers whose weights are differentiated themselves.
        differentiates_all: Gradients of all weights are taken, and let go.
        trusted: Numbers of the layers in which examples were told apart.
        is_by_row: All examples of a batch may pass at once.

    Raises:
        PruneError: Nothing reads the units of a group, or a weight that does is computed.
    """

    def __init__(self, model: nn.Module, structure: Structure, device: torch.device) -> None:
        self.model, self.num_units = model, structure.num_units
        self._readers = _find_readers(model, structure, device)
        self._modules = [site.module for reader in self._readers for site in reader.sites]
        self.by_weight: frozenset[int] = frozenset()
        self.differentiates_all = False
        self.trusted: frozenset[int] = frozenset()
        self.is_by_row = False
        self._expected = Heard()

    def listen(self, once: Pass, num_rows: int | None = None) -> Heard:
        """Passes forward and backward once, and hears the gates.

        Args:
            once: Passes a batch forward, and its mean loss backward.
            num_rows: B, for a gate of each example; None takes one for all.
        """
        by_hook = [n for n in range(len(self._readers)) if n not in self.by_weight]
        heard = self._pass(once, by_hook, self.by_weight, num_rows)
        if heard.missed:
            raise PruneError(
                f"'{min(heard.missed)}': is called in another way than on the first batch, so that "
                "its inputs cannot be told; call it with one tensor, or set prune.unit_score = sum"
            )
        trusted = {self._modules[number] for number in self.trusted}
        heard.is_told_apart &= heard.fired <= trusted
        return heard

    def check_hooks(self, once: Pass) -> list[int]:
        """Finds by one batch the readers whose weights must be differentiated themselves.

        Returns:
            Their numbers, for `by_weight`.
        """
        every = range(len(self._readers))
        heard = self._pass(once, every, every, differentiates_all=True)
        self._expected = heard
        found = []
        for number, reader in enumerate(self._readers):
            through_C = _gradient(heard.gates[number]) + heard.made_by(number)
            has_fired = any(site.module in heard.fired for site in reader.sites)
            if not (has_fired and self._is_close(number, through_C, heard)):
                found.append(number)
        return found

    def check_quiet(self, once: Pass) -> bool:
        """Passes the batch of `check_hooks` as `listen` will; returns True if gradients got lost.

        Where no weight is differentiated, no gradient may pass: a re-entrant checkpoint lets none
        through whose inputs need none, and some layers take other kernels. `differentiates_all`
        is for such networks.
        """
        heard = self._pass(
            once, [n for n in range(len(self._readers)) if n not in self.by_weight], self.by_weight
        )
        is_alike = True
        for number in range(len(self._readers)):
            if number in self.by_weight:
                found_C = heard.products.get(number, torch.zeros(()))
            else:
                found_C = _gradient(heard.gates[number]) + self._expected.made_by(number)
            is_alike &= self._is_close(number, found_C, self._expected)
        return not is_alike

    def check_mixed(self) -> None:
        """Refuses weights that read and make the same units, where the two cannot be told apart.

        Raises:
            PruneError: There is one.
        """
        for number in sorted(self.by_weight):
            reader = self._readers[number]
            if reader.is_mixed and not reader.makers:
                raise PruneError(
                    f"prune.unit_score = gate: '{reader.name}' makes and reads the same units "
                    "and is used otherwise than by calling nn.Embedding and nn.Linear, so that "
                    "the gradient of what reads them is unknown; set prune.unit_score = sum"
                )

    def check_rows(
        self, together: Pass, items: Sequence[float], alone: Sequence[tuple[int, Pass]]
    ) -> list[int]:
        """Passes a batch with a gate for each example, and some of its examples by themselves.

        Args:
            items: (B,) of each example, or what is proportional to them.
            alone: Positions of examples, and their passes.

        Returns:
            The numbers of the layers for `trusted`; none if an example's gradients differ.
        """
        every = range(len(self._readers))
        heard = self._pass(together, every, (), len(items))
        is_alike = heard.is_told_apart
        if not is_alike and not is_sharded(self.model):
            return []
        for row, single in alone:
            by_itself = self._pass(single, every, ())
            factor = sum(items) / items[row] if items[row] else 0.0
            pairs = [
                (_gradient(heard.gates[n])[row] * factor, _gradient(by_itself.gates[n]))
                for n in every
            ]
            largest = max((float(other_C.abs().max()) for _, other_C in pairs), default=0.0)
            for number, (one_C, other_C) in enumerate(pairs):
                # Next to others, gradients of almost nothing are rounding.
                scale = float(other_C.abs().max()) + 0.01 * largest
                gap = float((one_C - other_C).abs().max())
                is_alike &= gap <= self._tolerance(number) * scale
        fired = [number for number, m in enumerate(self._modules) if m in heard.fired]
        return fired if is_alike else []

    def gradient(self, heard: Heard) -> Tensor:
        """Returns the gradient in the gates, (U,) float64, or (B, U) of each example."""
        some = next(iter(heard.gates.values()), None)
        rows = () if some is None or some.ndim == 1 else (len(some),)
        device = self._readers[0].parts[0][1].device if self._readers else None
        total = torch.zeros(*rows, self.num_units, dtype=torch.float64, device=device)
        for number, reader in enumerate(self._readers):
            if number in self.by_weight:
                if number not in heard.products:
                    continue
                values = heard.products[number] - heard.made_by(number)
            else:
                values = _gradient(heard.gates[number])
            for start, positions_GK, is_new_GK in reader.parts:
                stop = start + len(positions_GK)
                total[..., start:stop] += (values[..., positions_GK] * is_new_GK).sum(dim=-1)
        return total

    def _pass(
        self,
        once: Pass,
        by_hook: Collection[int],
        by_weight: Collection[int],
        num_rows: int | None = None,
        *,
        differentiates_all: bool = False,
    ) -> Heard:
        heard = Heard()
        names = {self._readers[number].name for number in by_weight}
        if differentiates_all or self.differentiates_all:
            floats = (n for n, p in self.model.named_parameters() if p.is_floating_point())
            names.update(floats)
        with only_requiring(self.model, names), ExitStack() as stack:
            # Where no weight needs a gradient, layers of attention are passed by.
            stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
            mha.set_fastpath_enabled(False)
            if "torch._dynamo" in sys.modules:  # its import takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for number in by_hook:
                self._hook_inputs(heard, number, num_rows, stack)
            # Its own gradient holds what an embedding makes with it, too.
            for number in by_weight:
                self._hook_makers(heard, number, stack)
            stack.enter_context(self._hooked_weights(heard, by_weight, names))
            once()
        return heard

    def _hook_inputs(
        self, heard: Heard, number: int, num_rows: int | None, stack: ExitStack
    ) -> None:
        reader = self._readers[number]
        rows = () if num_rows is None else (num_rows,)
        gate = heard.gates[number] = self._new_gate(reader, *rows)
        for site in reader.sites:
            hook = _make_hook(heard, reader.name, site, gate)
            handle = site.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)

    def _hook_makers(self, heard: Heard, number: int, stack: ExitStack) -> None:
        reader = self._readers[number]
        if not reader.makers:
            return
        gate = heard.made[number] = self._new_gate(reader)

        def multiply(module: nn.Embedding, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            gated = output * gate.to(output.dtype)
            if module.padding_idx is None or not arguments:
                return gated
            # Its row gets no gradient.
            return torch.where((arguments[0] == module.padding_idx).unsqueeze(-1), output, gated)

        for maker in reader.makers:
            stack.callback(maker.register_forward_hook(multiply).remove)

    @contextmanager
    def _hooked_weights(
        self, heard: Heard, by_weight: Collection[int], names: Collection[str]
    ) -> Iterator[None]:
        """Takes gradients the moment they are complete, before FSDP2 sees them, and frees them."""
        by_name: dict[str, list[int]] = {name: [] for name in names}
        for number in by_weight:
            by_name[self._readers[number].name].append(number)
        differentiated = leaves(self.model)
        kept = {name: differentiated[name].grad for name in by_name}

        def make(numbers: list[int]) -> Callable[[Tensor], None]:
            @torch.no_grad()
            def take(leaf: Tensor) -> None:
                gradient, leaf.grad = leaf.grad, None
                assert gradient is not None
                for number in numbers:
                    product = (leaf.detach() * gradient).movedim(self._readers[number].dim, 0)
                    rows = product.flatten(1)
                    sum_C = rows.sum(dim=1, dtype=torch.float64)
                    size = float(rows.abs().sum(dim=1, dtype=torch.float64).max())
                    # Re-entrant checkpointing gives it in pieces.
                    heard.products[number] = heard.products.get(number, 0) + sum_C
                    heard.sizes[number] = heard.sizes.get(number, 0.0) + size

            return take

        with ExitStack() as stack:
            for name, numbers in by_name.items():
                leaf = differentiated[name]
                leaf.grad = None
                handle = leaf.register_post_accumulate_grad_hook(make(numbers))
                stack.callback(handle.remove)
            try:
                yield
            finally:
                for name, gradient in kept.items():
                    differentiated[name].grad = gradient

    def _new_gate(self, reader: _Reader, *rows: int) -> Tensor:
        weight = self.model.get_parameter(reader.name)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        device = reader.parts[0][1].device
        return torch.ones(*rows, reader.length, dtype=dtype, device=device, requires_grad=True)

    def _is_close(self, number: int, found_C: Tensor, expected: Heard) -> bool:
        """Returns whether a sum of w g agrees with that of the weight itself; NaN never does."""
        own_C = expected.products.get(number, torch.zeros_like(found_C))
        gap = float((found_C.to(own_C.device) - own_C).abs().max())
        return gap <= self._tolerance(number) * expected.sizes.get(number, 0.0)

    def _tolerance(self, number: int) -> float:
        dtype = self.model.get_parameter(self._readers[number].name).dtype
        return max(_AGREEMENT, 4 * torch.finfo(dtype).eps)


def _gradient(gate: Tensor) -> Tensor:
    return torch.zeros_like(gate).double() if gate.grad is None else gate.grad.double()


def _make_hook(
    heard: Heard, name: str, site: _Site, gate: Tensor
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    factors = gate.repeat(*[1] * (gate.ndim - 1), site.num_repeats)
    num_rows = None if gate.ndim == 1 else len(gate)

    def multiply(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        values = [*arguments, *named.values()]
        inputs = values[0] if values else None
        axis = inputs.ndim - site.axis if isinstance(inputs, Tensor) else -1
        if not isinstance(inputs, Tensor) or axis < 0 or inputs.shape[axis] != factors.shape[-1]:
            heard.missed.add(name)
            heard.is_told_apart = False
            return None
        shape = [1] * inputs.ndim
        shape[axis] = factors.shape[-1]
        if num_rows is not None:
            if axis == 0 or len(inputs) != num_rows:
                heard.is_told_apart = False
                return None
            shape[0] = num_rows
        heard.fired.add(module)
        gated = inputs * factors.view(shape).to(inputs.dtype)
        if arguments:
            return (gated, *arguments[1:]), named
        return (), {**named, next(iter(named)): gated}

    return multiply


def _find_readers(model: nn.Module, structure: Structure, device: torch.device) -> list[_Reader]:
    parameters = dict(model.named_parameters())
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, own))
    by_axis: dict[tuple[str, int], dict[int, list[Slice]]] = {}
    makes = {
        (group, part.name, part.dim) for group, part in structure.slices() if part.role == "out"
    }
    for number, part in structure.slices():
        if part.role == "in":
            by_axis.setdefault((part.name, part.dim), {}).setdefault(number, []).append(part)
    read = {number for groups in by_axis.values() for number in groups}
    for number, group in enumerate(structure.groups):
        if number not in read:
            raise PruneError(
                f"prune.unit_score = gate: no weight reads the units of '{group.name}', so that "
                "they have no gate; set prune.unit_score = sum, or name it in prune.exclude"
            )
    readers = []
    for (name, dim), groups in by_axis.items():
        owned = owners.get(parameters[name], []) if name in parameters else []
        if not owned or any(isinstance(module, ParametrizationList) for module, _ in owned):
            raise PruneError(
                f"'{name}': reads units, but is no weight that layers use as it is, so that they "
                "have no gate; set prune.unit_score = sum, or name it in prune.exclude"
            )
        parts = []
        for number, slices in groups.items():
            positions_GK, is_new_GK = join_positions(slices)
            place = torch.from_numpy(positions_GK).to(device)
            parts.append((structure.bounds[number], place, torch.from_numpy(is_new_GK).to(device)))
        sites = (_find_site(module, own, dim) for module, own in owned)
        readers.append(
            _Reader(
                *(name, dim, parameters[name].shape[dim], tuple(parts)),
                sites=tuple(site for site in sites if site is not None),
                makers=tuple(m for m, _ in owned if isinstance(m, nn.Embedding) and dim == 1),
                is_mixed=any((number, name, dim) in makes for number in groups),
            )
        )
    return readers


def _find_site(module: nn.Module, own: str, dim: int) -> _Site | None:
    """Returns where a layer reads along an axis of its weight through its input, if it does."""
    if own != "weight":
        return None
    if isinstance(module, nn.Linear) and dim == 1:
        return _Site(module, 1, 1)
    if isinstance(module, CONVOLUTIONS) and dim == 1:
        return _Site(module, 1 + len(module.kernel_size), module.groups)
    if isinstance(module, TRANSPOSED) and dim == 0:
        return _Site(module, 1 + len(module.kernel_size), 1)
    # Of transformers, a linear layer with its inputs first.
    if type(module).__name__.removeprefix("FSDP") == "Conv1D" and dim == 0:
        return _Site(module, 1, 1)
    return None
