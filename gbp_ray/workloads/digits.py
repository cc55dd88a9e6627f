"""Handwritten digits: workloads that need no network, no download and no accelerator.

`digits.parquet` beside this file holds 1797 images of 8x8 pixels with values 0 to 16. They are the
part `optdigits.tes` of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI
Machine Learning Repository, 1998, doi 10.24432/C50P49), licensed under CC BY 4.0.

How the file was made, once, from scikit-learn 1.9.1's `load_digits()`: values turned into uint8,
rows kept in order, and a column `split` added by `train_test_split(arange(1797), test_size=500,
stratify=labels, random_state=0)`: 1297 images to train on and 500 to test on, every digit in the
same share. No two images are equal. A writer may stand in both splits, so accuracies are higher
than those published for training on `optdigits.tra`, whose writers are others. The schema's
metadata repeats all this.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.images import INPUT_RANGE, Augmentation, build_augment, normalise
from gbp_ray.workloads.networks import RecurrentConvNet, SmallUNet, build_cifar_resnet
from gbp_ray.workloads.options import check_count, check_flag
from gbp_ray.workloads.weights import with_checkpoint

__all__ = [
    "digits_convnet",
    "digits_recurrent",
    "digits_regression",
    "digits_resnet20",
    "digits_segmentation",
]

_SIZE = 8
_BRIGHTEST = 16
_STRETCH = 255 // _BRIGHTEST

_CELL = 12
"""Pixels of a side that holds a digit turned by any angle, or moved by up to two pixels."""
_IGNORED = 255


def digits_convnet(
    augment: bool | Sequence[Augmentation] = True, width: int = 32, batchnorm: bool = True
) -> Workload:
    """Makes a small ConvNet over 8x8 handwritten digits.

    Three 3x3 convolutions and a linear layer, 56,554 parameters at width 32. Twenty epochs of SGD
    (batch 64, peak rate 0.05, cosine) take about 2.5 s on one thread and reach 99 % and more.
    Inputs are stored as uint8 (N, 1, 8, 8) and prepared to floats in [0, 1].

    Args:
        augment: True shifts each training image by up to one pixel along both axes; a list names
            augmentations of `images.AUGMENTATIONS` instead, such as ["crop", "rotation"].
        width: Channels of the first convolution; the other two have twice as many.
        batchnorm: Puts BatchNorm between each convolution and its ReLU; without it the
            convolutions have a bias.

    Raises:
        WorkloadError: An option is out of range.
    """
    check_flag("batchnorm", batchnorm)
    check_count("width", width, "the default is 32")
    return _make_workload(partial(_build_convnet, width, batchnorm), augment)


def digits_recurrent(
    augment: bool | Sequence[Augmentation] = True,
    width: int = 16,
    steps: int = 3,
    shared: bool = True,
) -> Workload:
    """Makes a recurrent ConvNet over the same digits (Liang and Hu 2015, see `recurrent`).

    Two recurrent layers, each of which uses one 3x3 kernel in all of its steps: 16,986 parameters
    at width 16 and 3 steps, against 40,026 with a kernel for each step.

    Args:
        augment: See `digits_convnet`.
        width: Channels of the first layer; the second has twice as many.
        steps: How often a layer uses its kernel.
        shared: Without it each step has a kernel of its own; `workload.tie` can join them again.

    Raises:
        WorkloadError: An option is out of range.
    """
    check_flag("shared", shared)
    check_count("width", width, "the default is 16")
    check_count("steps", steps, "the default is 3")
    return _make_workload(partial(RecurrentConvNet, 1, 10, width, steps, shared), augment)


def _make_workload(
    build_model: Callable[[], nn.Module], augment: bool | Sequence[Augmentation]
) -> Workload:
    transform = _shift if augment is True else None
    if not isinstance(augment, bool):
        chain = build_augment(augment, _SIZE)
        transform = None if chain is None else partial(_augment_bytes, chain)
    splits = _read_splits()
    return Workload(
        build_model=build_model,
        train=splits["train"],
        test=splits["test"],
        prepare=_scale,
        augment=transform,
        input_range=(0.0, 1.0),
    )


def digits_resnet20(
    image_size: int = 32, augment: bool = True, checkpoint: str | None = None
) -> Workload:
    """Makes the ResNet-20 of CIFAR-10 over the same digits, for what was learnt there to be used.

    Digits become grey colour images of 32x32 pixels, normalised as those of CIFAR-10; 269,722
    parameters. `workload.transfer` starts it from a checkpoint of CIFAR-10 with a new head.

    Args:
        image_size: Height and width the network sees, in pixels; 16 takes a quarter of the time.
        augment: Shifts each training image by up to one of its 8x8 pixels along both axes.
        checkpoint: File with weights of this network, its head included, to start from.

    Raises:
        WorkloadError: An option is out of range, or the checkpoint cannot be used.
    """
    check_flag("augment", augment)
    check_count("image_size", image_size, "the default is 32", least=_SIZE)
    splits = _read_splits()
    return Workload(
        build_model=with_checkpoint(partial(build_cifar_resnet, 20, 10), checkpoint),
        train=splits["train"],
        test=splits["test"],
        prepare=partial(_enlarge, image_size),
        augment=_shift if augment else None,
        input_range=INPUT_RANGE,
    )


def digits_segmentation(examples: int = 1000, width: int = 16) -> Workload:
    """Makes a task of labels by pixel: scenes of four digits each, and a small U-Net for them.

    A scene is (1, 24, 24), with a digit at a random place in each quarter. Its labels (24, 24) are
    0 for the ground and 1 + digit for ink; the faint rim of a stroke, of less than half the ink,
    is 255, which loss and metrics ignore, as the outlines of PASCAL VOC are. Scenes are drawn once,
    under fixed seeds, of training and of test digits apart. 57,019 parameters at width 16.

    Args:
        examples: Scenes to train on; a fifth as many are for testing.
        width: Channels at full resolution; there are twice and four times as many below.

    Raises:
        WorkloadError: An option is out of range.
    """
    check_count("examples", examples, "the default is 1000")
    check_count("width", width, "the default is 16")
    splits = _read_splits()
    return Workload(
        build_model=partial(SmallUNet, 1, 11, width),
        train=_draw_scenes(*splits["train"], examples, 0),
        test=_draw_scenes(*splits["test"], -(-examples // 5), 1),
        loss=partial(functional.cross_entropy, ignore_index=_IGNORED),
        prepare=_scale,
        input_range=(0.0, 1.0),
        metrics=("mIoU", "accuracy"),
        classes=("ground", *map(str, range(10))),
    )


def _draw_scenes(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws scenes, uint8 (count, 1, 24, 24), and their labels, int64 (count, 24, 24)."""
    draws = torch.Generator().manual_seed(seed)
    scenes = torch.zeros(count, 1, 2 * _CELL, 2 * _CELL, dtype=torch.uint8)
    classes = torch.zeros(count, 2 * _CELL, 2 * _CELL, dtype=torch.long)
    chosen = torch.randint(len(images), (count, 4), generator=draws)
    places = torch.randint(_CELL - _SIZE + 1, (count, 4, 2), generator=draws)
    for scene, quarter in product(range(count), range(4)):
        top, left = places[scene, quarter].tolist()
        rows = slice(top + quarter // 2 * _CELL, top + quarter // 2 * _CELL + _SIZE)
        columns = slice(left + quarter % 2 * _CELL, left + quarter % 2 * _CELL + _SIZE)
        image = images[chosen[scene, quarter], 0]
        scenes[scene, 0, rows, columns] = image
        ink = torch.where(image >= _BRIGHTEST // 2, 1 + labels[chosen[scene, quarter]], _IGNORED)
        classes[scene, rows, columns] = ink.where(image > 0, 0)
    return scenes, classes


def digits_regression(examples: int = 5000, width: int = 16) -> Workload:
    """Makes a task of numbers: by what angle a digit was turned, -45 to 45 degrees.

    Images (1, 12, 12) hold one digit turned about its centre; targets (1,) are radians, so a root
    mean square error of 0.1 is 5.7 degrees. Angles are drawn once, under fixed seeds. The network
    is that of `digits_convnet` with one output, 14,161 parameters at width 16.

    Args:
        examples: Turned digits to train on; a fifth as many are for testing.
        width: See `digits_convnet`.

    Raises:
        WorkloadError: An option is out of range.
    """
    check_count("examples", examples, "the default is 5000")
    check_count("width", width, "the default is 16")
    splits = _read_splits()
    return Workload(
        build_model=partial(_build_convnet, width, True, 1),
        train=_draw_turned(splits["train"][0], examples, 0),
        test=_draw_turned(splits["test"][0], -(-examples // 5), 1),
        loss=functional.mse_loss,
        prepare=_scale,
        input_range=(0.0, 1.0),
        metrics=("rmse", "r2"),
    )


def _draw_turned(images: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws turned digits, uint8 (count, 1, 12, 12), and their angles, float32 (count, 1)."""
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (count,), generator=draws)
    angles = (2 * torch.rand(count, generator=draws) - 1) * (math.pi / 4)
    cosine, sine, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    matrices = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    margin = (_CELL - _SIZE) // 2
    padded = functional.pad(images[chosen].float(), (margin,) * 4)
    grid = functional.affine_grid(matrices, list(padded.shape), align_corners=False)
    turned = functional.grid_sample(padded, grid, align_corners=False)
    # Whole steps of intensity, so that another processor's rounding changes no data.
    return turned.round().to(torch.uint8), angles.unsqueeze(1)


def _enlarge(image_size: int, images: Tensor) -> Tensor:
    """Makes colour images of digits, normalised: uint8 (B, 1, 8, 8) -> (B, 3, size, size)."""
    size = (image_size, image_size)
    grey = functional.interpolate(images.float() * (255 / _BRIGHTEST), size, mode="bilinear")
    return normalise(grey.expand(-1, 3, -1, -1))


def _read_splits() -> dict[str, tuple[Tensor, Tensor]]:
    asset = resources.files("gbp_ray.workloads").joinpath("digits.parquet")
    # pyarrow's threads, once started, now and then abort a process at its end where torch is, too.
    table = pq.ParquetFile(pa.BufferReader(asset.read_bytes())).read(use_threads=False)
    pixels = table["image"].combine_chunks().flatten().to_numpy()
    images = pixels.reshape(-1, 1, _SIZE, _SIZE)
    labels = table["label"].to_numpy().astype(np.int64)
    split = np.array(table["split"].to_pylist())
    return {
        name: (torch.from_numpy(images[split == name]), torch.from_numpy(labels[split == name]))
        for name in ("train", "test")
    }


def _build_convnet(width: int, batchnorm: bool, outputs: int = 10) -> nn.Module:
    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if batchnorm else nn.Identity()

    # A convolution has no bias where the BatchNorm behind it has its own.
    conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=not batchnorm)
    return nn.Sequential(
        OrderedDict(
            conv1=conv(1, width),
            bn1=norm(width),
            relu1=nn.ReLU(),
            conv2=conv(width, 2 * width),
            bn2=norm(2 * width),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv3=conv(2 * width, 2 * width),
            bn3=norm(2 * width),
            relu3=nn.ReLU(),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(2 * width, outputs),
        )
    )


def _scale(images: Tensor) -> Tensor:
    return images.float() / _BRIGHTEST


def _augment_bytes(chain: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Augments in the range of bytes, which the transforms are made for, and goes back."""
    return chain(images * _STRETCH).float() / _STRETCH


def _shift(images: Tensor) -> Tensor:
    """Moves each image by -1, 0 or 1 pixel along both axes: (B, 1, 8, 8) -> the same shape.

    Plain torch, because torchvision takes over a second to import.
    """
    padded = functional.pad(images, (1, 1, 1, 1))
    windows = padded.unfold(2, _SIZE, 1).unfold(3, _SIZE, 1)  # (B, 1, 3, 3, 8, 8)
    down, right = torch.randint(0, 3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]
