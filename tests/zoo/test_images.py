"""Augmentation and normalisation of images."""

from __future__ import annotations

import pytest
import torch
from small_data import draw_images

from gbp_ray.workload import seeded
from gbp_ray.zoo.images import AUGMENTATIONS, build_augment, normalise


@pytest.mark.parametrize("names", [*([name] for name in AUGMENTATIONS), list(AUGMENTATIONS)])
def test_augmentation_draws_for_each_image(names):
    augment = build_augment(names, 32)
    images = torch.as_tensor(draw_images(1)).expand(24, 3, 32, 32)
    with seeded(1):
        first = augment(images)
    with seeded(1):
        again = augment(images)
    with seeded(2):
        other = augment(images)
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) > 1


def test_crop_pads_with_black_by_at_most_four_pixels():
    with seeded(0):
        cropped = build_augment(["crop"], 32)(torch.full((64, 3, 32, 32), 255, dtype=torch.uint8))
    assert set(cropped.unique().tolist()) == {0, 255}
    assert bool((cropped[:, :, 4:28, 4:28] == 255).all())
    assert build_augment([], 32) is None


def test_normalise_matches_its_definition_and_resizes():
    images = torch.as_tensor(draw_images(2))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images.permute(0, 2, 3, 1) / 255 - mean) / std
    torch.testing.assert_close(normalise(images).permute(0, 2, 3, 1), expected)
    assert normalise(images, 64).shape == (2, 3, 64, 64)
    constant = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    torch.testing.assert_close(normalise(constant, 48)[..., :32, :32], normalise(constant))
