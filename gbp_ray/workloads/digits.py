"""Handwritten digits: a workload that needs no network, no download and no accelerator.

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

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import WorkloadError
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.images import INPUT_RANGE, Augmentation, build_augment, normalise
from gbp_ray.workloads.networks import RecurrentConvNet, build_cifar_resnet
from gbp_ray.workloads.weights import with_checkpoint

__all__ = [
    "digits_convnet",
    "digits_recurrent",
    "digits_resnet20",
]

_SIZE = 8
_BRIGHTEST = 16
_STRETCH = 255 // _BRIGHTEST


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
    _require_flag("batchnorm", batchnorm)
    _require_count("width", width, 32)
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
    _require_flag("shared", shared)
    _require_count("width", width, 16)
    _require_count("steps", steps, 3)
    return _make_workload(partial(RecurrentConvNet, 1, 10, width, steps, shared), augment)


def _require_flag(option: str, value: object) -> None:
    if not isinstance(value, bool):
        raise WorkloadError(f"workload.options.{option} = {value!r}: must be true or false")


def _require_count(option: str, value: object, default: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WorkloadError(
            f"workload.options.{option} = {value!r}: must be a whole number, at least 1; the "
            f"default is {default}"
        )


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
    if not isinstance(augment, bool):
        raise WorkloadError(f"workload.options.augment = {augment!r}: must be true or false")
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < _SIZE:
        raise WorkloadError(
            f"workload.options.image_size = {image_size!r}: must be a whole number of pixels, at "
            f"least {_SIZE}; the default is 32"
        )
    splits = _read_splits()
    return Workload(
        build_model=with_checkpoint(partial(build_cifar_resnet, 20, 10), checkpoint),
        train=splits["train"],
        test=splits["test"],
        prepare=partial(_enlarge, image_size),
        augment=_shift if augment else None,
        input_range=INPUT_RANGE,
    )


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


def _build_convnet(width: int, batchnorm: bool) -> nn.Module:
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
            linear=nn.Linear(2 * width, 10),
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
