"""Removes units physically: a smaller network in memory, proven to compute what the masked one did.

The network is the user's own module, changed in place: parameters and buffers are cut along the
axes that units lie in, the optimizer's state and the movement statistic with them, and attributes
that hold widths follow. Then a real batch passes through, and the outputs are compared with those
of the masked network. A difference undoes everything.

Shape suffixes as in `structure`: U = units of the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import LBFGS, Optimizer

from gbp_ray.errors import PruneError, in_one_line
from gbp_ray.pruning.removal.caches import Run, drop_caches, find_caches
from gbp_ray.pruning.removal.comparison import (
    Fault,
    Passed,
    compare,
    observe,
    observe_training,
    tolerance_of,
)
from gbp_ray.pruning.removal.cutting import Axes, cut_tensor, is_moment, removed_axes
from gbp_ray.pruning.removal.layers import KEPT_AS_ZEROS, refresh, why_not_cut, widths_of
from gbp_ray.pruning.removal.precision import in_float64
from gbp_ray.pruning.removal.widths import Search, Spot, Widths, apply_widths
from gbp_ray.pruning.structure import Structure

__all__ = ["Compacted", "remove_units", "try_removal"]

Places = list[tuple[nn.Module, dict[str, Any], str]]
"""(module, its dict of parameters or buffers, key) of each place that holds a tensor."""

_NEEDS_MULTIPLES = re.compile(r"multiples? of|divisible by|aligned", re.IGNORECASE)


@dataclass(frozen=True)
class Compacted:
    """What a removal did.

    Attributes:
        difference: Largest difference of outputs from those of the masked network, over their
            greatest magnitude.
        attributes: New values of modules' attributes by dotted path, such as "conv1.out_channels".
        uncalled: Paths of cut modules that the batch did not go through, as experts that it was
            not sent to: nothing is proven of them.
    """

    difference: float
    attributes: Mapping[str, Any]
    uncalled: tuple[str, ...] = ()


def remove_units(
    model: nn.Module,
    structure: Structure,
    kept_U: np.ndarray,
    run: Run,
    *,
    optimizer: Optimizer | None = None,
    movement: dict[str, Tensor] | None = None,
) -> Compacted:
    """Removes units from a network, in place, and checks that it computes the same.

    Cut parameters are new objects; the optimizer is given them in the places of the old ones.
    Tied ones stay tied. Every rank removes the same units, and passes the same batch.

    Args:
        model: Masked: its weights are zero where units are removed.
        structure: Of the network as it is; of one that has lost units, `shrink_structure`.
        kept_U: Bool, the units to keep.
        run: Passes a real batch, always the same, through a network; returns its outputs.
        optimizer: Of the network's parameters; its state is cut in place.
        movement: By parameter name; its tensors are cut in place.

    Raises:
        PruneError: The network cannot be cut, or computes something else then; names the layer.
            Network, optimizer and movement are as they were.
    """
    remove = partial(_remove, model, structure, kept_U, optimizer, movement)
    found, _ = _despite_rounding(model, run, remove)
    return found


def try_removal(
    model: nn.Module,
    structure: Structure,
    kept_U: np.ndarray,
    run: Run,
) -> Compacted:
    """Removes units as `remove_units`, and puts them back.

    Raises:
        PruneError: As `remove_units`; its attribute `path` is the layer.
    """
    found, cut = _despite_rounding(
        model, run, partial(_remove, model, structure, kept_U, None, None)
    )
    cut.undo()
    return found


class _RoundingError(PruneError):
    """Outputs differ by so little that it may be rounding."""


def _despite_rounding(
    model: nn.Module, run: Run, remove: Callable[..., tuple[Compacted, _Cut]]
) -> tuple[Compacted, _Cut]:
    """Removes units, and compares in float64 where rounding in float32 may be what differs.

    Deep networks pass rounding on: some language models differ by 4e-5 with another order of
    additions only.

    Args:
        remove: `_remove`, given all but the batch and how to compare.
    """
    with suppress(_RoundingError):
        return remove(run, tells_rounding=True)
    try:
        with in_float64(model, run) as wide_run:
            return remove(wide_run, is_wide=True)
    except PruneError:
        raise
    except Exception as fault:  # noqa: BLE001 - a network may take float32 only
        why = in_one_line(fault)
    try:
        return remove(run)
    except PruneError as error:
        text = f"{error} (it cannot be compared in float64, which fails with {why})"
        raise PruneError(text, **vars(error)) from error


def _remove(
    model: nn.Module,
    structure: Structure,
    kept_U: np.ndarray,
    optimizer: Optimizer | None,
    movement: dict[str, Tensor] | None,
    run: Run,
    *,
    tells_rounding: bool = False,
    is_wide: bool = False,
) -> tuple[Compacted, _Cut]:
    """Removes units.

    Args:
        tells_rounding: Raises _RoundingError for a difference that may be rounding.
        is_wide: The network is in float64.
    """
    lost = removed_axes(structure, kept_U)
    if not lost:
        return Compacted(0.0, {}), _Cut()
    _check_shapes(model, structure)
    _check_tensors(model, lost)
    if optimizer is not None:
        _check_optimizer(model, optimizer)
    masks = structure.masks(kept_U, dict(model.named_parameters()))
    judge = _Judge(model, run, masks, lost, is_wide=is_wide)
    cut = _Cut()
    try:
        cut.network(model, lost)
        if optimizer is not None:
            cut.optimizer(optimizer)
        if movement is not None:
            cut.movement(movement, lost)
        with cut.following_inputs(model):
            found = _settle(model, structure, kept_U, judge, cut, tells_rounding)
        judge.check_training()
        uncalled = tuple(path for path in cut.paths if path not in judge.called)
        return replace(found, uncalled=uncalled), cut
    except BaseException:
        cut.undo()
        raise


def _settle(
    model: nn.Module,
    structure: Structure,
    kept_U: np.ndarray,
    judge: _Judge,
    cut: _Cut,
    tells_rounding: bool,
) -> Compacted:
    """Compares a cut network with the masked one, and changes attributes until they agree."""
    found = judge.compare(is_strict=False)
    if isinstance(found, float):
        return Compacted(found, cut.attributes)
    if tells_rounding and found.may_be_rounding:
        raise _RoundingError(found.what)

    def attempt(widths: Widths, is_strict: bool) -> float | Fault:
        undo = apply_widths(model, widths)
        try:
            return judge.compare(is_strict=is_strict)
        finally:
            undo()

    search = Search(model, structure, kept_U, cut.settled, attempt)
    agreed = search.find()
    if agreed is None:
        fault = search.furthest
        raise PruneError(
            f"'{fault.path or 'the network'}': without its removed units {fault.what}, and no "
            "number of heads or channels in the modules around it mends that; "
            f"{_hint_at(fault)}{KEPT_AS_ZEROS}",
            path=fault.path,
        )
    widths, difference = agreed
    cut.undo_with(apply_widths(model, widths))
    changed = {_attribute_of(spot): _value_of(model, spot) for spot in widths}
    return Compacted(difference, cut.attributes | changed)


def _hint_at(fault: Fault) -> str:
    """Words what helps where a kernel takes only some widths."""
    if not _NEEDS_MULTIPLES.search(fault.what):
        return ""
    return "set prune.round_to = 8 (or 16), as widths must be multiples here; or "


class _Judge:
    """Compares a network, once cut, with what it was when this was made.

    Parameters that are zero throughout, as networks may begin with, hide what is multiplied by
    them. Where there are any, networks are compared a second time, with numbers in their place.

    Args:
        model: Masked.
        masks: By parameter name, of those that are about to be cut.
        lost: What stays of their axes.
        is_wide: The network is in float64, of which its own code may fall back to float32.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        masks: Mapping[str, Tensor],
        lost: Mapping[str, Axes],
        *,
        is_wide: bool = False,
    ) -> None:
        self._lost = lost
        self._model = model
        least = tolerance_of(torch.float32) if is_wide else 0.0
        self._masked = observe(model, run, least_tolerance=least)
        caches = find_caches(model, run)

        def run_afresh(network: nn.Module) -> Any:
            drop_caches(network, caches)
            try:
                return run(network)
            finally:
                drop_caches(network, caches)

        self._run = run_afresh
        if caches:
            self._masked = observe(model, self._run, least_tolerance=least)
        self._is_trained = (
            not self._calls_all() and observe_training(model, self._run).error is None
        )
        self._lights = {
            name: _light_of(parameter)
            for name, parameter in model.named_parameters()
            if not name.endswith("bias") and parameter.numel() and not bool(parameter.any())
        }
        if self._lights:
            for name in self._lights.keys() & masks.keys():
                own = self._lights[name]
                own.masked_fill_(~masks[name].to(own.device), 0)
            with self._lit({}):
                self._lit_masked = observe(model, self._run, least_tolerance=least)

    @property
    def called(self) -> set[str]:
        """Returns the paths of the modules that the batch went through."""
        return self._masked.called

    def check_training(self) -> None:
        """Checks that a pass in training mode does not fail, where it calls more modules.

        Raises:
            PruneError: It fails, and did not in the masked network.
        """
        if not self._is_trained:
            return
        passed = observe_training(self._model, self._run)
        if passed.error is not None:
            path = passed.open[-1] if passed.open else ""
            raise PruneError(
                f"'{path or 'the network'}': is called in training only, and without the removed "
                f"units around it fails with {in_one_line(passed.error)}; {KEPT_AS_ZEROS}",
                path=path,
            )

    def _calls_all(self) -> bool:
        return all(
            path in self._masked.called or not module._parameters
            for path, module in self._model.named_modules()
        )

    def compare(self, *, is_strict: bool) -> float | Fault:
        """Returns the difference of outputs, or the first fault."""
        if self._lights:
            with self._lit(self._lost):
                found = self._compare(self._lit_masked, is_strict)
            if isinstance(found, Fault):
                return found
        return self._compare(self._masked, is_strict)

    def _compare(self, masked: Passed, is_strict: bool) -> float | Fault:
        passed = observe(self._model, self._run, masked, is_strict=is_strict)
        return compare(masked, passed, is_strict=is_strict)

    @contextmanager
    def _lit(self, lost: Mapping[str, Axes]) -> Iterator[None]:
        """Puts numbers in the place of zeros in the block, cut along the axes that have lost."""
        parameters = dict(self._model.named_parameters())
        before = {name: parameters[name].detach().clone() for name in self._lights}
        try:
            for name, light in self._lights.items():
                parameters[name].detach().copy_(cut_tensor(light, lost.get(name, {})))
            yield
        finally:
            for name, values in before.items():
                parameters[name].detach().copy_(values)


def _light_of(parameter: Tensor) -> Tensor:
    """Makes numbers of either sign that differ: of equal ones, those behind a norm add up to 0."""
    places = torch.arange(1, parameter.numel() + 1, dtype=torch.float64)
    return torch.cos(places * places).to(parameter).view(parameter.shape)


def _attribute_of(spot: Spot) -> str:
    return f"{spot.path}.{spot.name}".lstrip(".")


def _value_of(model: nn.Module, spot: Spot) -> Any:
    return vars(model.get_submodule(spot.path))[spot.name]


def _check_shapes(model: nn.Module, structure: Structure) -> None:
    tensors = _tensors_of(model)
    for name, shape in structure.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise PruneError(
                f"'{name}': the network has {found or 'no such tensor'}, and its structure "
                f"{shape}; find the structure of this very network"
            )


@dataclass
class _Cut:
    """A cut in the making, and how to undo it.

    Attributes:
        replaced: New parameter and axes by the old parameter.
        settled: Attributes that follow from a layer's weights, as (path of the layer, name).
        attributes: New values by dotted path.
        paths: Of the modules that are cut.
    """

    replaced: dict[Tensor, tuple[Tensor, Axes]] = field(default_factory=dict)
    settled: set[tuple[str, str]] = field(default_factory=set)
    attributes: dict[str, Any] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    _undoing: list[Callable[[], None]] = field(default_factory=list)

    def undo(self) -> None:
        """Puts everything back that was replaced; the old tensors were never written."""
        while self._undoing:
            self._undoing.pop()()

    def undo_with(self, action: Callable[[], None]) -> None:
        """Notes how to undo something that was done now."""
        self._undoing.append(action)

    def network(self, model: nn.Module, lost: Mapping[str, Axes]) -> None:
        """Cuts parameters and buffers, and sets the attributes of layers that are known."""
        tensors = _tensors_of(model)
        places = _places_of(model)
        paths = {module: path for path, module in model.named_modules()}
        losing: dict[nn.Module, dict[str, Axes]] = {}
        for name, axes in lost.items():
            for module, _, key in places[id(tensors[name])]:
                losing.setdefault(module, {})[key] = axes
        self.paths = [paths[module] for module in losing]
        # Undone last, when a layer holds its old tensors again.
        self._undoing.append(lambda: _refresh_all(losing))
        for name, axes in lost.items():
            old = tensors[name]
            new = _cut_whole(old, axes)
            self.replaced[old] = (new, axes)
            for _, owner, key in places[id(old)]:
                self._put(owner, key, new)
        _refresh_all(losing)
        for module, own in losing.items():
            for name, value in widths_of(module, own, paths[module]).items():
                self.settled.add((paths[module], name))
                if vars(module).get(name, value) != value:
                    self._put(vars(module), name, value)
                    self.attributes[f"{paths[module]}.{name}".lstrip(".")] = value

    def optimizer(self, optimizer: Optimizer) -> None:
        """Puts the cut parameters into the optimizer, with their state cut alike."""
        for group in optimizer.param_groups:
            old = group["params"]
            new = [self.replaced[p][0] if p in self.replaced else p for p in old]
            self._put(group, "params", new)
        state = optimizer.state
        before = list(state.items())
        moved = []
        for parameter, own in before:
            if parameter in self.replaced:
                new_parameter, axes = self.replaced[parameter]
                own = {key: _cut_moment(v, parameter, axes, key) for key, v in own.items()}
                parameter = new_parameter
            moved.append((parameter, own))

        def restore() -> None:
            state.clear()
            state.update(before)

        self._undoing.append(restore)
        state.clear()
        state.update(moved)

    def movement(self, movement: dict[str, Tensor], lost: Mapping[str, Axes]) -> None:
        """Cuts the movement statistic."""
        for name in movement.keys() & lost.keys():
            self._put(movement, name, cut_tensor(movement[name], lost[name]))

    @contextmanager
    def following_inputs(self, model: nn.Module) -> Iterator[None]:
        """Has norms without tensors of their own note the channels that they are called with.

        They compute the same whatever they note, but warn.
        """

        def follow(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                if not inputs or not isinstance(module, _InstanceNorm):
                    return
                width = inputs[0].shape[inputs[0].ndim - module._get_no_batch_dim()]
                if width != module.num_features:
                    self._put(vars(module), "num_features", width)
                    self.attributes[f"{path}.num_features".lstrip(".")] = width

            return note

        handles = [
            module.register_forward_pre_hook(follow(path))
            for path, module in model.named_modules()
            if isinstance(module, _InstanceNorm)
            and not (module.affine or module.track_running_stats)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _put(self, owner: dict[str, Any], key: str, value: Any) -> None:
        old = owner[key]
        self._undoing.append(lambda: owner.__setitem__(key, old))
        owner[key] = value


def _refresh_all(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        refresh(module)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _places_of(model: nn.Module) -> dict[int, Places]:
    places: dict[int, Places] = {}
    for module in model.modules():
        owners: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for owner in owners:
            for key, tensor in owner.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((module, owner, key))
    return places


def _check_tensors(model: nn.Module, lost: Mapping[str, Axes]) -> None:
    """Raises PruneError for the first tensor that cannot be cut."""
    tensors = _tensors_of(model)
    places = _places_of(model)
    paths = {module: path for path, module in model.named_modules()}
    at_address: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or not tensor.numel() or tensor.is_quantized:
            continue
        first = at_address.setdefault(tensor.data_ptr(), name)
        if first != name and (name in lost or first in lost):
            raise PruneError(
                f"'{name}': shares the memory of '{first}', but is another parameter; tie them as "
                f"one parameter, or {KEPT_AS_ZEROS}"
            )
    for name in lost:
        for module, _, _ in places[id(tensors[name])]:
            if why := why_not_cut(module, tensors[name]):
                raise PruneError(
                    f"'{name}': {why}, and cannot be cut; {KEPT_AS_ZEROS}", path=paths[module]
                )


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raises PruneError for an optimizer whose state cannot be cut, or of another network."""
    if isinstance(optimizer, LBFGS):
        raise PruneError(f"LBFGS: its state joins all weights; {KEPT_AS_ZEROS}")
    own = set(model.parameters())
    if not any(p in own for group in optimizer.param_groups for p in group["params"]):
        raise PruneError(
            f"{type(optimizer).__name__}: has no parameter of this network; make it from the "
            "parameters that the network has now"
        )


def _cut_whole(old: Tensor, axes: Axes) -> Tensor:
    """Cuts a parameter with its gradient, or a buffer; attributes that people set on it stay."""
    values = cut_tensor(old, axes)
    if not isinstance(old, nn.Parameter):
        values.__dict__.update(old.__dict__)
        return values
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    if old.grad is not None:
        new.grad = cut_tensor(old.grad, axes).to(new.dtype)
    return new


def _cut_moment(value: Any, parameter: Tensor, axes: Axes, key: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not is_moment(value, parameter):
        if value.numel() == 1:
            return value
        raise PruneError(
            f"optimizer state '{key}': has shape {tuple(value.shape)}, its parameter "
            f"{tuple(parameter.shape)}, so it cannot be cut; {KEPT_AS_ZEROS}"
        )
    return cut_tensor(value, axes)
