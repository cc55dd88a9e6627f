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
from functools import partial
from importlib import resources

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import WorkloadError
from gbp_ray.workload import Workload
from gbp_ray.zoo.checkpoint import with_checkpoint
from gbp_ray.zoo.images import INPUT_RANGE, normalise
from gbp_ray.zoo.resnet import build_cifar_resnet

__all__ = ["digits_convnet", "digits_resnet20"]

_SIZE = 8
_BRIGHTEST = 16


def digits_convnet(augment: bool = True, width: int = 32) -> Workload:
    """Makes a small ConvNet with BatchNorm over 8x8 handwritten digits.

    Three 3x3 convolutions and a linear layer, 56,554 parameters at width 32. Twenty epochs of SGD
    (batch 64, peak rate 0.05, cosine) take about 2.5 s on one thread and reach 99 % and more.
    Inputs are stored as uint8 (N, 1, 8, 8) and prepared to floats in [0, 1].

    Args:
        augment: Shifts each training image by up to one pixel along both axes.
        width: Channels of the first convolution; the other two have twice as many.

    Raises:
        WorkloadError: An option is out of range.
    """
    if not isinstance(augment, bool):
        raise WorkloadError(f"workload.options.augment = {augment!r}: must be true or false")
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise WorkloadError(
            f"workload.options.width = {width!r}: must be a whole number of channels, at least 1; "
            "the default is 32"
        )
    splits = _read_splits()
    return Workload(
        build_model=partial(_build_convnet, width),
        train=splits["train"],
        test=splits["test"],
        prepare=_scale,
        augment=_shift if augment else None,
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
    asset = resources.files("gbp_ray.zoo").joinpath("digits.parquet")
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


def _build_convnet(width: int) -> nn.Module:
    # The convolutions have no bias: the BatchNorm behind each one has its own.
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, width, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(2 * width),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv3=nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            bn3=nn.BatchNorm2d(2 * width),
            relu3=nn.ReLU(),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(2 * width, 10),
        )
    )


def _scale(images: Tensor) -> Tensor:
    return images.float() / _BRIGHTEST


def _shift(images: Tensor) -> Tensor:
    """Moves each image by -1, 0 or 1 pixel along both axes: (B, 1, 8, 8) -> the same shape.

    Plain torch, because torchvision takes over a second to import.
    """
    padded = functional.pad(images, (1, 1, 1, 1))
    windows = padded.unfold(2, _SIZE, 1).unfold(3, _SIZE, 1)  # (B, 1, 3, 3, 8, 8)
    down, right = torch.randint(0, 3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]
