"""Augmentation and normalisation of images, and the import of torchvision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_data import draw_images, message_of

from gbp_ray.workloads import images
from gbp_ray.workloads.data import seeded
from gbp_ray.workloads.images import AUGMENTATIONS, build_augment, import_vision, normalise


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


@pytest.mark.parametrize(
    ("entry", "smaller"),
    [
        ({"name": "crop", "padding": 1}, "crop"),
        ({"name": "flip", "probability": 0.0}, "flip"),
        ({"name": "rotation", "degrees": 1}, "rotation"),
        ({"name": "randaugment", "num_ops": 1, "magnitude": 0}, "randaugment"),
    ],
)
def test_parameters_are_heeded(entry, smaller):
    """Less of each changes less of the pixels than the default does."""
    images = torch.as_tensor(draw_images(1)).expand(24, 3, 32, 32)

    def changed(given):
        with seeded(1):
            return int((build_augment([given], 32)(images) != images).sum())

    assert changed(entry) < changed(smaller)


@pytest.mark.parametrize(
    ("name", "parameters", "transform"),
    [
        ("randaugment", {"num_ops": 3, "magnitude": 12}, lambda v2: v2.RandAugment(3, 12)),
        ("randaugment", {}, lambda v2: v2.RandAugment()),
        ("trivialaugment", {}, lambda v2: v2.TrivialAugmentWide()),
    ],
)
def test_named_policies_are_those_of_torchvision(name, parameters, transform):
    images = torch.as_tensor(draw_images(6))
    theirs = transform(import_vision("transforms.v2"))
    with seeded(3):
        expected = torch.stack([theirs(image) for image in images])
    with seeded(3):
        found = build_augment([{"name": name, **parameters}], 32)(images)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["randaugmnet"], "no augmentation 'randaugmnet', did you mean 'randaugment'? (allowed: "),
        ([{"degrees": 5}], "no augmentation None"),
        ([3], "no augmentation 3"),
        ([{"name": "rotation", "degree": 5}], "rotation has no parameter 'degree', did you mean"),
        ([{"name": "rotation", "degrees": 200}], "rotation.degrees = 200: must be a number from 0"),
        ([{"name": "randaugment", "num_ops": 1.5}], "num_ops = 1.5: must be a whole number from 1"),
        ([{"name": "randaugment", "magnitude": True}], "magnitude = True: must be a whole number"),
        ({"name": "crop"}, "must be a list such as"),
    ],
)
def test_bad_entries_are_refused_in_one_line(entries, expected):
    text = message_of(build_augment, entries, 32)
    assert text.startswith("workload.options.augment")
    assert expected in text


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


NEEDED = """
import sys, torch, gbp_ray.zoo as zoo
from gbp_ray.workloads.data import take_batch
w = zoo.digits_convnet()
take_batch(w, w.train, torch.arange(4), augment_seed=1)
assert not [m for m in sys.modules if m.startswith('torchvision')]
try:
    import torchvision
except RuntimeError:
    pass
from gbp_ray.workloads.images import import_vision
models = import_vision('models')
assert 'resnet18' in models.list_models(module=models)
import torchvision.transforms.v2
"""


def test_torchvision_is_imported_only_when_needed_and_after_somebody_elses_import_failed():
    done = subprocess.run([sys.executable, "-c", NEEDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_operators_are_declared_only_without_the_extension(monkeypatch):
    images.import_vision("models")
    before, loaded = images._declared, []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert images._load_extension()
    assert "_C" in Path(loaded[0]).name

    def fail(path):
        raise OSError("libtorch_cuda.so: cannot open shared object file")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    assert not images._load_extension()
    images._declare_operators()
    assert images._declared is before, "what exists must not be declared again"
