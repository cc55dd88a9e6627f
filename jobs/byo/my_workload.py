"""Your own model, data and criterion: everything `job.toml` beside this file needs.

Copy the two files and change what is inside. A job names what it takes from here as "module:attr".
"""

import math

import torch
from torch import Tensor, nn

from gbp_ray import Workload


def spirals(noise: float = 0.1, examples: int = 3000) -> Workload:
    """Makes the workload: a multilayer perceptron that tells three interleaved spirals apart.

    The options of `[workload.options]` arrive as keyword arguments. Each worker calls this for
    itself, so the same options must give the same data on every one.

    Args:
        noise: Standard deviation of the points around their spiral; the radius runs from 0 to 1.
        examples: Points in all; a fifth of them are for testing.
    """
    inputs, targets = draw_spirals(noise, examples)
    num_test = examples // 5
    return Workload(
        # Called whenever fresh weights are wanted; torch is already seeded by then.
        build_model=build_mlp,
        # A pair of tensors or arrays whose first axis counts examples, or any data set whose items
        # are (input, target).
        train=(inputs[num_test:], targets[num_test:]),
        test=(inputs[:num_test], targets[:num_test]),
        # Left out here, with their defaults: loss (cross entropy), count_correct (top 1).
        # For every batch, such as scaling bytes to floats:
        prepare=standardise,
        # For training batches alone, before `prepare`; draw from torch's global generator:
        augment=jitter,
    )


def build_mlp() -> nn.Module:
    """Builds the dense network: points (B, 2) to logits (B, 3)."""
    return nn.Sequential(
        nn.Linear(2, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 3),
    )


def draw_spirals(noise: float, examples: int) -> tuple[Tensor, Tensor]:
    """Draws points (N, 2) with classes (N,), the same ones every time."""
    draws = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (examples,), generator=draws)
    radius = torch.rand(examples, generator=draws).sqrt()
    angle = 4 * radius + 2 * math.pi / 3 * targets
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return points + noise * torch.randn(examples, 2, generator=draws), targets


def standardise(points: Tensor) -> Tensor:
    """Gives the points unit variance, about."""
    return 2 * points


def jitter(points: Tensor) -> Tensor:
    """Moves each point a little, another way each time."""
    return points + 0.02 * torch.randn_like(points)


def my_criterion(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    """Scores weights by |weight * gradient|, batch by batch.

    Called once for each calibration batch. What it returns is summed over all batches and workers,
    and that sum is the score: the smallest go first.

    Args:
        model: The network, in eval mode.
        inputs: The prepared batch, (B, 2).
        targets: Its classes, (B,).
        loss: The workload's loss of this batch, a scalar with its graph.

    Returns:
        By parameter name, a tensor shaped like the parameter.
    """
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    return {
        name: (weight.detach() * gradient).abs()
        for (name, weight), gradient in zip(named.items(), gradients, strict=True)
    }
