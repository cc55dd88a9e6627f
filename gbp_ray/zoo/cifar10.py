"""Networks over CIFAR-10: a plain ConvNet and the residual networks made for it.

All take the same options; each is a factory that a job names, such as
`gbp_ray.zoo:cifar10_resnet20`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from gbp_ray.errors import WorkloadError
from gbp_ray.workload import Workload
from gbp_ray.zoo.checkpoint import with_checkpoint
from gbp_ray.zoo.cifar10_files import CLASSES, IMAGE_SIZE, NUM_CLASSES, read_cifar10
from gbp_ray.zoo.images import INPUT_RANGE, Augmentation, build_augment, normalise
from gbp_ray.zoo.resnet import build_cifar_resnet
from gbp_ray.zoo.subset import take_examples

__all__ = [
    "cifar10_convnet",
    "cifar10_resnet",
    "cifar10_resnet20",
    "cifar10_resnet32",
    "cifar10_resnet56",
]


def cifar10_resnet(
    depth: int,
    data: str,
    download: bool = False,
    augment: Sequence[Augmentation] = ("crop", "flip"),
    checkpoint: str | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> Workload:
    """Makes a ResNet of He et al. 2015 (arXiv 1512.03385, section 4.2) over CIFAR-10.

    Args:
        depth: Weighted layers: 20 (269,722 parameters), 32 (464,154), 56 (853,018), ...
        data: Folder or s3:// prefix of the data; see `cifar10_files.read_cifar10`.
        download: Fetches torchvision's copy of the data into a folder that holds none.
        augment: Some of "crop" (4 black pixels of padding), "flip", "rotation" (15 degrees),
            "randaugment", "trivialaugment"; with parameters as a table, such as
            { name = "randaugment", num_ops = 2, magnitude = 9 }.
        checkpoint: File with dense weights to start from; None starts from random ones.
        train_examples: Takes only the first so many training examples.
        test_examples: Takes only the first so many test examples.

    Raises:
        WorkloadError: An option, the data or the checkpoint cannot be used.
    """
    return _make_workload(
        partial(build_cifar_resnet, depth, NUM_CLASSES),
        data,
        download,
        augment,
        checkpoint,
        train_examples,
        test_examples,
    )


# Partials keep the signature, from which a job's options are checked and listed.
cifar10_resnet20 = partial(cifar10_resnet, 20)
cifar10_resnet32 = partial(cifar10_resnet, 32)
cifar10_resnet56 = partial(cifar10_resnet, 56)


def cifar10_convnet(
    data: str,
    download: bool = False,
    augment: Sequence[Augmentation] = ("crop", "flip"),
    checkpoint: str | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    batchnorm: bool = False,
) -> Workload:
    """Makes a ConvNet over CIFAR-10: two 3x3 convolutions of 64 channels, then 512 and 10 units.

    Each convolution is followed by ReLU and 2x2 max pooling; 2,141,514 parameters, of which 98 %
    sit in the first linear layer.

    Args:
        data: See `cifar10_resnet`, as for the other options not listed here.
        download: See there.
        augment: See there.
        checkpoint: See there.
        train_examples: See there.
        test_examples: See there.
        batchnorm: Puts BatchNorm between each convolution and its ReLU.

    Raises:
        WorkloadError: An option, the data or the checkpoint cannot be used.
    """
    if not isinstance(batchnorm, bool):
        raise WorkloadError(f"workload.options.batchnorm = {batchnorm!r}: must be true or false")
    return _make_workload(
        partial(_build_convnet, batchnorm),
        data,
        download,
        augment,
        checkpoint,
        train_examples,
        test_examples,
    )


def _make_workload(
    build_model: Callable[[], nn.Module],
    data: str,
    download: bool,
    augment: Sequence[Augmentation],
    checkpoint: str | None,
    train_examples: int | None,
    test_examples: int | None,
) -> Workload:
    # Cheap checks first: decoding takes a while.
    transform = build_augment(augment, IMAGE_SIZE)
    build_model = with_checkpoint(build_model, checkpoint)
    train, test = read_cifar10(data, download)
    return Workload(
        build_model=build_model,
        train=take_examples(train, train_examples, "train_examples"),
        test=take_examples(test, test_examples, "test_examples"),
        prepare=normalise,
        augment=transform,
        input_range=INPUT_RANGE,
        classes=CLASSES,
    )


def _build_convnet(batchnorm: bool) -> nn.Module:
    def normalisation() -> nn.Module:
        return nn.BatchNorm2d(64) if batchnorm else nn.Identity()

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 64, 3, padding=1),
            bn1=normalisation(),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(64, 64, 3, padding=1),
            bn2=normalisation(),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(64 * 8 * 8, 512),
            relu3=nn.ReLU(),
            linear2=nn.Linear(512, NUM_CLASSES),
        )
    )
