"""Inputs of layers as rows of a matrix, and networks that are passed through layer by layer.

A linear layer or a convolution multiplies each row of its inputs by its weight: for a convolution a
row is the patch that one position of its output sees. What is known of the rows by sums over them,
such as x x^T, is additive over calibration examples.

`in_step` runs several forward passes side by side and stops all of them in front of each layer.
What happens to a layer there, such as a new weight, is what the layers behind it then see, at the
cost of one pass in all.

Shape suffixes: B = examples, R = rows, K = groups of a convolution, C = inputs of one group, O =
outputs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import PruneError

__all__ = [
    "Lane",
    "PatchLayer",
    "equal_supports",
    "find_patch_layers",
    "in_step",
    "outputs_at",
    "rows_of",
]

PatchLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""A layer whose output rows are `weight @ row` of its inputs, plus a bias."""


def find_patch_layers(model: nn.Module) -> dict[str, PatchLayer]:
    """Finds linear layers and convolutions that own their weight by themselves, by module name.

    Left out are layers of a parametrized or tied weight, and modules under several names.
    """
    found: dict[str, PatchLayer] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    names: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        names[module] = names.get(module, 0) + 1
    for name, module in model.named_modules():
        if (
            isinstance(module, PatchLayer)
            and isinstance(module._parameters.get("weight"), nn.Parameter)
            and owners[id(module.weight)] == 1
            and names[module] == 1
        ):
            found[name] = module
    return found


def rows_of(layer: PatchLayer, inputs: Tensor, most: int = 0, seed: int = 0) -> Tensor:
    """Returns the rows that a layer multiplies by its weight.

    Args:
        inputs: Of the layer, (B, ...) as it takes them.
        most: Positions that are taken of each example, drawn without replacement; 0 takes all.
        seed: Of that draw: equal seeds take equal positions of as many examples and positions.

    Returns:
        (R, K, C), examples in order; K = 1 where inputs are not grouped. `rows[:, k] @
        weight[rows of group k].flatten(1).T` are the outputs without bias.
    """
    if isinstance(layer, nn.Linear):
        tokens = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        if (chosen := _draw(tokens, tokens.shape[1], most, seed)) is not None:
            tokens = tokens[chosen]
        return tokens.reshape(-1, 1, inputs.shape[-1])
    num_axes = layer.weight.ndim - 2
    if inputs.ndim == num_axes + 1:
        inputs = inputs[None]
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    padded = _pad(layer, inputs).contiguous()
    size, steps = padded.shape[2:], padded.stride()
    lengths = [
        (size[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in range(num_axes)
    ]
    # (B, positions..., channels, kernel...), without copying.
    patches = padded.as_strided(
        (len(inputs), *lengths, padded.shape[1], *kernel),
        (
            steps[0],
            *(steps[2 + axis] * stride[axis] for axis in range(num_axes)),
            steps[1],
            *(steps[2 + axis] * dilation[axis] for axis in range(num_axes)),
        ),
    )
    if (chosen := _draw(patches, math.prod(lengths), most, seed)) is not None:
        examples, positions = chosen
        patches = patches[(examples, *torch.unravel_index(positions, lengths))]
    groups = layer.groups
    return patches.reshape(-1, groups, padded.shape[1] // groups * math.prod(kernel))


def equal_supports(kept: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Groups the outputs of a layer that keep the same inputs.

    Args:
        kept: (outputs, inputs) bool.

    Returns:
        Numbers of outputs, ascending, and of the inputs that they keep, for each group.
    """
    supports, numbers = torch.unique(kept, dim=0, return_inverse=True)
    return [
        ((numbers == number).nonzero()[:, 0], support.nonzero()[:, 0])
        for number, support in enumerate(supports)
    ]


def outputs_at(layer: PatchLayer, outputs: Tensor, most: int = 0, seed: int = 0) -> Tensor:
    """Returns what has the shape of a layer's outputs at the rows of `rows_of`, (R, O)."""
    if isinstance(layer, nn.Linear):
        by_position = outputs.reshape(len(outputs), -1, outputs.shape[-1])
    else:
        if outputs.ndim == layer.weight.ndim - 1:
            outputs = outputs[None]
        by_position = outputs.flatten(2).mT
    if (chosen := _draw(by_position, by_position.shape[1], most, seed)) is not None:
        by_position = by_position[chosen]
    return by_position.flatten(0, 1)


def _draw(
    of_examples: Tensor, num_positions: int, most: int, seed: int
) -> tuple[Tensor, Tensor] | None:
    """Draws positions of each example, ascending; None takes all.

    Returns:
        An index: examples (B, 1), positions (B, most).
    """
    if not 0 < most < num_positions:
        return None
    generator, num_examples = torch.Generator().manual_seed(seed), len(of_examples)
    draws = torch.rand(num_examples, num_positions, generator=generator)
    positions = draws.topk(most, dim=1).indices.sort(dim=1).values
    examples = torch.arange(num_examples)[:, None]
    return examples.to(of_examples.device), positions.to(of_examples.device)


def _pad(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    before_after: list[int] = []  # last axis first, as functional.pad takes it
    for axis in reversed(range(layer.weight.ndim - 2)):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            before_after += [total // 2, total - total // 2]
        else:
            width = 0 if layer.padding == "valid" else int(layer.padding[axis])
            before_after += [width, width]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(inputs, before_after, mode=mode) if any(before_after) else inputs


@dataclass(frozen=True)
class Lane:
    """One forward pass of `in_step`.

    Attributes:
        layers: Modules of its network that it stops in front of, by a name that all lanes share.
        run: Passes through the network.
        draw: Seeds random numbers before each of its stretches between two layers, given the number
            of the stretch.
        keep: Modules whose first input stays in `kept`, by name, until it is taken out.
    """

    layers: Mapping[str, nn.Module]
    run: Callable[[], object]
    draw: Callable[[int], object] = lambda number: None
    keep: Mapping[str, nn.Module] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def in_step(
    lanes: Sequence[Lane], meet: Callable[[str, list[Tensor]], None], last: str | None = None
) -> None:
    """Runs forward passes side by side, one at a time, in order, and stops all at each layer.

    All activations that are needed further on stay in memory, those of every lane.

    Args:
        meet: Called once for each layer, in the order of the network, when all lanes stand in front
            of it; given its name and its first input in each lane.
        last: The layer that the passes end at; None passes through the whole network.

    Raises:
        PruneError: Lanes do not come to the same layers in the same order, or call one twice.
    """
    passes = [_Pass(lane) for lane in lanes]
    try:
        seen: set[str] = set()
        while True:
            for one in passes:
                one.go_on()
            stops = {one.stop for one in passes}
            if len(stops) > 1:
                at = " and ".join(sorted(f"'{stop}'" if stop else "the end" for stop in stops))
                raise PruneError(
                    f"passes of different examples come to {at} at the same time; a network whose "
                    "way depends on its inputs cannot be passed through layer by layer"
                )
            (stop,) = stops
            if stop is None:
                return
            if stop in seen:
                raise PruneError(f"'{stop}': is called more than once in a pass")
            seen.add(stop)
            # Under no name here, as the passes would go on with these inputs still in memory.
            meet(stop, [given for one in passes if (given := one.inputs) is not None])
            if stop == last:
                return
    finally:
        for one in passes:
            one.end()


class _Ended(BaseException):
    """Leaves a forward pass that nobody waits for any more."""


@dataclass(eq=False)
class _Pass:
    """A lane in a thread of its own, which runs while its owner waits, and the other way round."""

    lane: Lane
    stop: str | None = None
    inputs: Tensor | None = None
    _number: int = 0
    _failure: BaseException | None = None
    _is_ending: bool = False
    _turn: threading.Semaphore = field(default_factory=partial(threading.Semaphore, 0))
    _stopped: threading.Semaphore = field(default_factory=partial(threading.Semaphore, 0))
    _thread: threading.Thread | None = None

    def go_on(self) -> None:
        """Runs to the next layer or the end; raises what the pass raised."""
        if self._thread is None:
            arguments = (torch.get_num_threads(),)
            self._thread = threading.Thread(target=self._work, args=arguments, daemon=True)
            self._thread.start()
        self.lane.draw(self._number)
        self._number += 1
        self.stop = self.inputs = None
        self._turn.release()
        self._stopped.acquire()
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """Ends the thread, wherever the pass stands."""
        if self._thread is not None:
            self._is_ending = True
            self._turn.release()
            self._thread.join()

    def _work(self, num_threads: int) -> None:
        try:
            # Threads of kernels, and whether gradients are kept, are settings of each thread.
            torch.set_num_threads(num_threads)
            self._turn.acquire()
            if not self._is_ending:
                with torch.no_grad(), self._stopping():
                    self.lane.run()
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by `go_on`
            self._failure = error
        finally:
            self.stop = self.inputs = None
            self._stopped.release()

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        thread = threading.get_ident()

        def stop(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
            # Lanes of the same network share its modules, each with the hooks of all.
            if threading.get_ident() != thread:
                return
            self.stop, self.inputs = name, given[0]
            self._stopped.release()
            self._turn.acquire()
            if self._is_ending:
                raise _Ended

        def keep(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                self.lane.kept[name] = given[0]

        # An input is kept before the layer that takes it, too, stops.
        hooks = [
            module.register_forward_pre_hook(partial(keep, name))
            for name, module in self.lane.keep.items()
        ]
        hooks += [
            module.register_forward_pre_hook(partial(stop, name))
            for name, module in self.lane.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
