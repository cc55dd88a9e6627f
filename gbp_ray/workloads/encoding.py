"""Layers without learned weights in front of a network, so that it takes intensities in [0, 1].

    normalise     (x - mean) / deviation
    one_hot       channel c * L + k is 1 where the level of channel c is k, of L levels, and else 0
    thermometer   ... where the level is at least k, and else 0; so the first is always 1

The level of x is floor(x L), at most L - 1. What they are made of is in buffers, and so is saved
with the network. The layers that take the input (a convolution, or a linear layer over all of it)
get L input channels for each that they had, with weights under which the network starts as the
same function of its quantised input, each level at its middle: a checkpoint stays a checkpoint.

Levels are steps, whose derivative is zero: an attack by gradients would find nothing to climb, and
the network would only seem robust (Athalye, Carlini and Wagner 2018, 1802.00420). So the backward
pass differentiates ramps in their place, the backward pass differentiable approximation of section
4.1 there. Training never differentiates by its inputs and does not notice.

Shape suffixes: B = examples, C = channels, L = levels.

Source: Buckman, Roy, Raffel and Goodfellow 2018 (openreview S18Su--CW), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gbp_ray.config.workload import EncodingConfig
from gbp_ray.errors import WorkloadError
from gbp_ray.workloads.contract import CONVOLUTIONS, in_mode

__all__ = [
    "EncodedNetwork",
    "Levels",
    "Normalise",
    "encode_network",
]

_KEY = "workload.encoding"
_HAIR = 2e-6
"""Of intensity: what lies on an edge belongs above it, however it was rounded on its way here."""

_RAMP_LEVELS = 4.0
"""Width of the ramps that stand in for steps in the backward pass."""


class _Step(torch.autograd.Function):
    """1 where the first is not below the second, else 0; backwards a ramp around the edge."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, edges: Tensor) -> Tensor:
        ctx.save_for_backward(levels, edges)
        return _step(levels, edges)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        levels, edges = ctx.saved_tensors
        near = (levels - edges).abs() <= _RAMP_LEVELS / 2
        return (gradient * near / _RAMP_LEVELS).sum(dim=2, keepdim=True), None


def _step(levels: Tensor, edges: Tensor) -> Tensor:
    return (levels >= edges).to(levels.dtype)


class Normalise(nn.Module):
    """(x - mean) / deviation, by channel."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("deviation", deviation.clone())

    def forward(self, intensities: Tensor) -> Tensor:
        """Computes (B, C, ...) of the same."""
        return (intensities - self.mean) / self.deviation


class Levels(nn.Module):
    """One-hot or thermometer code of intensities: (B, C, ...) -> (B, C * L, ...)."""

    edges: Tensor
    is_one_hot: Tensor

    def __init__(self, num_levels: int, *, is_one_hot: bool) -> None:
        super().__init__()
        # The lowest level has no edge below it, and of the highest nothing ends.
        self.register_buffer("edges", torch.arange(1, num_levels, dtype=torch.float32))
        self.register_buffer("is_one_hot", torch.tensor([float(is_one_hot)]))

    def forward(self, intensities: Tensor) -> Tensor:
        """Encodes."""
        edges = self.edges.view(-1, *[1] * (intensities.ndim - 2)).to(intensities.dtype)
        levels = ((intensities + _HAIR) * (len(self.edges) + 1)).unsqueeze(2)
        step = _Step.apply if levels.requires_grad else _step
        lit = step(levels, edges)  # (B, C, L - 1, ...)
        lowest = torch.ones_like(levels)
        lit = torch.cat([lowest, lit], dim=2)
        # A level is where the thermometer ends.
        above = torch.cat([lit[:, :, 1:], torch.zeros_like(levels)], dim=2)
        return (lit - self.is_one_hot.to(lit.dtype) * above).flatten(1, 2)


class EncodedNetwork(nn.Module):
    """A network behind its encoding."""

    def __init__(self, encoding: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.encoding = encoding
        self.network = network

    def forward(self, intensities: Tensor) -> Any:
        """Gives what the network makes of the encoded intensities."""
        return self.network(self.encoding(intensities))


def encode_network(
    network: nn.Module, config: EncodingConfig, low: Tensor, high: Tensor, example: Tensor
) -> EncodedNetwork:
    """Puts a network behind an encoding, as if it took the intensities that its input stands for.

    Args:
        low: What the network is given for an intensity of 0; a scalar, or one for each channel,
            shaped to spread over an example.
        high: Likewise for 1.
        example: (1, C, ...) an input as the network itself takes it.

    Raises:
        WorkloadError: The network cannot be encoded.
    """
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise WorkloadError(
            f"{_KEY}.kind = {config.kind}: needs a network that is built with its weights, not on "
            "the meta device"
        )
    if config.kind == "normalise":
        by_channel = torch.zeros(example.shape[1], *[1] * (example.ndim - 2))
        mean, deviation = by_channel - low / (high - low), by_channel + 1 / (high - low)
        if config.mean or config.deviation:
            mean = _by_channel(config.mean or (0.0,), example, "mean")
            deviation = _by_channel(config.deviation or (1.0,), example, "deviation")
        return EncodedNetwork(Normalise(mean, deviation), network)
    is_one_hot = config.kind == "one_hot"
    num_channels = example.shape[1]
    centre = (torch.arange(config.levels) + 0.5) / config.levels
    # What a channel of the code adds to the input that it stands for.
    shares = centre.clone()
    if not is_one_hot:
        shares[1:] = 1 / config.levels
    span = (high - low).expand(1, num_channels, *[1] * (example.ndim - 2)).reshape(-1)
    base = low.expand(1, num_channels, *[1] * (example.ndim - 2)).reshape(-1)
    added = span[:, None] * shares
    if is_one_hot:
        added = added + base[:, None]
    else:
        added[:, 0] += base
    for layer in _find_first_layers(network, example, config.kind):
        _widen(layer, added)
    return EncodedNetwork(Levels(config.levels, is_one_hot=is_one_hot), network)


def _by_channel(values: Sequence[float], example: Tensor, field: str) -> Tensor:
    if len(values) not in (1, example.shape[1]):
        raise WorkloadError(
            f"{_KEY}.{field}: has {len(values)} values, but the inputs have {example.shape[1]} "
            "channels; give one value, or one for each"
        )
    shape = (-1, *[1] * (example.ndim - 2))
    return torch.tensor(values).expand(example.shape[1]).reshape(shape)


@torch.no_grad()
def _find_first_layers(network: nn.Module, example: Tensor, kind: str) -> list[nn.Module]:
    """Finds the layers that take the input itself, seen in a pass of one example."""
    inputs = example.contiguous()
    found: list[nn.Module] = []

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        taken = given[0] if given else None
        if (
            isinstance(taken, Tensor)
            and taken.data_ptr() == inputs.data_ptr()
            and taken.numel() == inputs.numel()
            and layer not in found
        ):
            found.append(layer)

    layers = [m for m in network.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with in_mode(network, is_training=False):
            network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise WorkloadError(
            f"{_KEY}.kind = {kind}: no convolution or linear layer of the network takes the input "
            "as it is, so none can be given its channels; encode inside the network instead"
        )
    uses: dict[nn.Parameter, int] = {}
    for _, parameter in network.named_parameters(remove_duplicate=False):
        uses[parameter] = uses.get(parameter, 0) + 1
    for layer in found:
        path = next(name for name, other in network.named_modules() if other is layer)
        weight = layer._parameters.get("weight")
        is_plain = weight is not None and uses[weight] == 1 and getattr(layer, "groups", 1) == 1
        if isinstance(layer, nn.Linear):
            takes_channels = layer.in_features == inputs.numel()
        else:
            assert isinstance(layer, CONVOLUTIONS)
            takes_channels = layer.in_channels == inputs.shape[1]
        if not is_plain or not takes_channels:
            raise WorkloadError(
                f"{_KEY}.kind = {kind}: '{path}' takes the input, but its weight is tied, computed "
                "or in groups, or not one for each channel; encode inside the network instead"
            )
    return found


@torch.no_grad()
def _widen(layer: nn.Module, added_CL: Tensor) -> None:
    """Gives a layer L input channels for each of C, under which it starts as the same function."""
    weight = layer._parameters["weight"]
    assert weight is not None
    num_outputs, (num_channels, num_levels) = weight.shape[0], added_CL.shape
    # A linear layer takes the pixels of a channel one after another.
    by_channel = weight.reshape(num_outputs, num_channels, 1, -1)
    wide = by_channel * added_CL.to(weight.dtype).view(1, num_channels, num_levels, 1)
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.in_features * num_levels
        shape: tuple[int, ...] = (num_outputs, layer.in_features)
    else:
        assert isinstance(layer, CONVOLUTIONS)
        layer.in_channels = num_channels * num_levels
        shape = (num_outputs, layer.in_channels, *weight.shape[2:])
    layer.weight = nn.Parameter(wide.reshape(shape), requires_grad=weight.requires_grad)
