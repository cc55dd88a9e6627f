"""What colour images go through on their way into a network: augmentation by name, normalisation.

Images are uint8 (B, 3, H, W) until `normalise`, so that augmentation comes first and the border
that cropping adds is black, as published results have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from gbp_ray.config import nearest_name
from gbp_ray.errors import WorkloadError
from gbp_ray.zoo.vision import import_vision

__all__ = ["AUGMENTATIONS", "INPUT_RANGE", "build_augment", "normalise"]

AUGMENTATIONS = ("crop", "flip", "rotation")
"""Crop after padding by an eighth on each side; mirror half of them; turn by up to 15 degrees."""

_KEY = "workload.options.augment"
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_MAX_DEGREES = 15

INPUT_RANGE = (
    [-mean / std for mean, std in zip(_MEAN, _STD, strict=True)],
    [(1 - mean) / std for mean, std in zip(_MEAN, _STD, strict=True)],
)
"""What `normalise` makes of black and of white."""


def build_augment(names: Sequence[str], image_size: int) -> Callable[[Tensor], Tensor] | None:
    """Chains augmentations in the order given; each image of a batch draws for itself.

    A transform of torchvision draws once per call, so it is called once per image: 30 to 70 us for
    crop and flip, 120 to 155 us with rotation, on one thread. All draws come from torch's global
    generator.

    Args:
        names: Some of `AUGMENTATIONS`; none gives None.
        image_size: Height and width in pixels; a crop pads by an eighth of it, 4 for 32.

    Raises:
        WorkloadError: A name is unknown, or this is not a list.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise WorkloadError(
            f'{_KEY} = {names!r}: must be a list such as ["crop", "flip"] (allowed: '
            f"{', '.join(AUGMENTATIONS)}; [] for none)"
        )
    for name in names:
        if name not in AUGMENTATIONS:
            raise WorkloadError(
                f"{_KEY} = {list(names)!r}: no augmentation {name!r}"
                f"{nearest_name(str(name), AUGMENTATIONS)} (allowed: {', '.join(AUGMENTATIONS)})"
            )
    if not names:
        return None
    v2 = import_vision("transforms.v2")
    transforms = {
        "crop": v2.RandomCrop(image_size, padding=image_size // 8),
        "flip": v2.RandomHorizontalFlip(),
        "rotation": v2.RandomRotation(_MAX_DEGREES),
    }
    chain = v2.Compose([transforms[name] for name in names])
    return partial(_transform_each, chain)


def _transform_each(transform: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.stack([transform(image) for image in images])


def normalise(images: Tensor, image_size: int | None = None) -> Tensor:
    """Scales bytes to [0, 1], subtracts the mean and divides by the deviation of each channel.

    Args:
        images: uint8 (B, 3, H, W).
        image_size: Resizes to this height and width, bilinear, for networks with a fixed input.
    """
    mean = torch.tensor(_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(_STD, device=images.device).view(3, 1, 1)
    scaled = (images.float() / 255 - mean) / std
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return scaled
    size = (image_size, image_size)
    return functional.interpolate(scaled, size, mode="bilinear", antialias=True)
