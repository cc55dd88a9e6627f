"""Mixup and CutMix: examples of a part mixed with one another, and their losses in the same shares.

A part is mixed with itself in another order, under one share that is drawn for the part, as both
papers do for a batch. The loss is mixed instead of the targets, which is the same for cross-entropy
(it is linear in the target) and works for every other loss, too. All draws are seeded by the part,
so the number of workers changes nothing.

Sources: Zhang, Cisse, Dauphin and Lopez-Paz 2018 (1710.09412), eq. 2; Yun, Han, Oh, Chun, Choe and
Yoo 2019 (1905.04899), eqs. 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gbp_ray.config import Recipe
from gbp_ray.errors import ConfigError
from gbp_ray.workload import derive_seed, seeded

__all__ = ["Mix", "draw_mix", "refuse_unmixable"]


@dataclass(frozen=True)
class Mix:
    """How the examples of a part are mixed.

    Attributes:
        inputs: (B, ...) the mixed examples.
        share: What each example keeps of itself, in [0, 1].
        partners: (B,) which example of the part each one is mixed with.
    """

    inputs: Tensor
    share: float
    partners: Tensor

    def loss(self, loss_of: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
        """Computes share * loss under the own targets + (1 - share) * loss under the partners'."""
        return self.share * loss_of(targets) + (1 - self.share) * loss_of(targets[self.partners])


def draw_mix(recipe: Recipe, inputs: Tensor, draws: int) -> Mix | None:
    """Mixes a part as its recipe says; None where the recipe mixes nothing.

    Args:
        inputs: (B, ...) prepared examples; (B, channels, H, W) for CutMix.
        draws: Seed of the part.
    """
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return None
    with seeded(derive_seed(draws, "mix")):
        is_coin_up = bool(torch.rand(()) < 0.5)
        is_mixup = recipe.mixup > 0 and (recipe.cutmix == 0 or is_coin_up)
        alpha = torch.tensor(recipe.mixup if is_mixup else recipe.cutmix, dtype=torch.float64)
        share = torch.distributions.Beta(alpha, alpha).sample().item()
        partners = torch.randperm(len(inputs)).to(inputs.device)
        if is_mixup:
            return Mix(torch.lerp(inputs[partners], inputs, share), share, partners)
        return _cut(inputs, share, partners)


def _cut(images: Tensor, share: float, partners: Tensor) -> Mix:
    """Pastes one rectangle, cut off at the border, whose whole would have 1 - share of the area."""
    height, width = images.shape[-2:]
    side = math.sqrt(1 - share)
    centre_y, centre_x = (int(torch.randint(size, ())) for size in (height, width))
    half_y, half_x = int(height * side / 2), int(width * side / 2)
    top, bottom = max(centre_y - half_y, 0), min(centre_y + half_y, height)
    left, right = max(centre_x - half_x, 0), min(centre_x + half_x, width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[partners, ..., top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (height * width)
    return Mix(mixed, 1 - pasted, partners)


def refuse_unmixable(recipe: Recipe, section: str, inputs: Tensor) -> None:
    """Refuses to mix what cannot be mixed.

    Args:
        inputs: A batch, prepared for the network.

    Raises:
        ConfigError: Inputs are not numbers between which others lie, or no images.
    """
    if recipe.mixup > 0 and not inputs.is_floating_point():
        raise ConfigError(
            f"{section}.mixup = {recipe.mixup:g}: needs inputs of floating point, not "
            f"{inputs.dtype}; set it to 0"
        )
    if recipe.cutmix > 0 and inputs.ndim != 4:
        raise ConfigError(
            f"{section}.cutmix = {recipe.cutmix:g}: needs images of shape (examples, channels, "
            f"height, width), not {tuple(inputs.shape)}; set it to 0"
        )
