"""Any image classifier of torchvision, over CIFAR-10 or over folders of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow.fs import LocalFileSystem
from torch import nn

from gbp_ray.config import nearest_name
from gbp_ray.errors import WorkloadError
from gbp_ray.location import describe_fault, open_location
from gbp_ray.workload import Workload
from gbp_ray.zoo.checkpoint import with_checkpoint
from gbp_ray.zoo.cifar10_files import CLASSES, IMAGE_SIZE, has_cifar10, read_cifar10
from gbp_ray.zoo.images import INPUT_RANGE, Augmentation, build_augment, normalise
from gbp_ray.zoo.subset import take_examples
from gbp_ray.zoo.vision import import_vision
from gbp_ray.zoo.vision_weights import with_vision_weights

__all__ = ["torchvision_classifier"]

_KEY = "workload.options.data"
_TEST_FOLDERS = ("test", "val")
_FOLDER_IMAGE_SIZE = 224
# Their extra heads for training give a tuple, which no loss of a workload takes.
_WITH_EXTRA_HEADS = ("googlenet", "inception_v3")


def torchvision_classifier(
    model: str,
    data: str,
    image_size: int | None = None,
    augment: Sequence[Augmentation] = ("crop", "flip"),
    checkpoint: str | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    weights: str | None = None,
) -> Workload:
    """Makes a torchvision classifier by name, with an output for each class of the data.

    Args:
        model: A name such as "resnet18", "mobilenet_v3_small" or "vit_b_16".
        data: CIFAR-10 in either layout (see `cifar10_files.read_cifar10`), or a folder with
            `train/` and `test/` (or `val/`) that hold a subfolder of images for each class.
        image_size: Height and width the network sees, in pixels. CIFAR-10 is scaled up from 32,
            which is also the default; images in folders are scaled, then cut square, to 224 by
            default. Most vision transformers want 224.
        augment: Some of "crop" (an eighth of black padding), "flip", "rotation" (15 degrees),
            "randaugment", "trivialaugment"; see `cifar10.cifar10_resnet`.
        checkpoint: File with dense weights to start from; None starts from random ones.
        train_examples: Takes fewer training examples: CIFAR-10's first, or an even spread.
        test_examples: Takes fewer test examples likewise.
        weights: Torchvision's own, by name, such as "DEFAULT" or "IMAGENET1K_V1", all but the last
            layer where the data have other classes. Downloaded once, into torch.hub's folder.

    Raises:
        WorkloadError: The model is unknown, or an option, the data or the checkpoint cannot be
            used.
    """
    _check_model(model)
    if weights is not None and checkpoint is not None:
        raise WorkloadError(
            "workload.options.weights: comes from torchvision, workload.options.checkpoint from a "
            "file; give one of them"
        )
    is_whole = isinstance(image_size, int) and not isinstance(image_size, bool)
    if image_size is not None and (not is_whole or image_size < 1):
        raise WorkloadError(
            f"workload.options.image_size = {image_size!r}: must be a whole number of pixels, at "
            "least 1, such as 224"
        )
    if has_cifar10(data):
        classes, stored_size = CLASSES, IMAGE_SIZE
        train, test = read_cifar10(data)
    else:
        stored_size = image_size or _FOLDER_IMAGE_SIZE
        train, test = _open_folders(data, stored_size)
        classes = tuple(train.classes)
    build_model: Callable[[], nn.Module] = partial(_build_model, model, len(classes))
    if weights is not None:
        build_model = with_vision_weights(build_model, model, weights)
    return Workload(
        build_model=with_checkpoint(build_model, checkpoint),
        train=take_examples(train, train_examples, "train_examples"),
        test=take_examples(test, test_examples, "test_examples"),
        prepare=partial(normalise, image_size=image_size),
        augment=build_augment(augment, stored_size),
        input_range=INPUT_RANGE,
        classes=classes,
    )


def _check_model(name: str) -> None:
    models = import_vision("models")
    # The models of this very module classify; its submodules hold detectors and the like.
    names = models.list_models(module=models)
    if name not in names:
        raise WorkloadError(
            f"workload.options.model = {name!r}: torchvision has no such classifier"
            f"{nearest_name(str(name), names)} (there are {len(names)}, such as resnet18, "
            "mobilenet_v3_small and vit_b_16)"
        )


def _build_model(name: str, num_classes: int) -> nn.Module:
    extra = {"aux_logits": False, "init_weights": True} if name in _WITH_EXTRA_HEADS else {}
    return import_vision("models").get_model(name, weights=None, num_classes=num_classes, **extra)


def _open_folders(data: str, size: int) -> tuple[Any, Any]:
    filesystem, path = open_location(data, _KEY)
    folder = Path(path)
    present = [name for name in _TEST_FOLDERS if (folder / name).is_dir()]
    is_local = isinstance(filesystem, LocalFileSystem)
    if not is_local or not (folder / "train").is_dir() or not present:
        raise WorkloadError(
            f"{_KEY} = '{data}': holds neither CIFAR-10 (train*.parquet and test*.parquet, or "
            "'cifar-10-batches-py') nor the folders train/ and test/ (or val/) with images by class"
        )
    train, test = (_open_folder(folder / name, size, data) for name in ("train", present[0]))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise WorkloadError(
            f"{_KEY} = '{data}': train/ and {present[0]}/ must have the same class folders, but "
            f"only one of them has {', '.join(odd[:5])}; add or remove it"
        )
    return train, test


def _open_folder(folder: Path, size: int, data: str) -> Any:
    v2 = import_vision("transforms.v2")
    # Scaled as an image, which smooths; stacked into batches as uint8 (3, size, size).
    to_pixels = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    datasets = import_vision("datasets")
    try:
        return datasets.ImageFolder(str(folder), transform=to_pixels, loader=_load_image)
    except OSError as error:
        raise WorkloadError(
            f"{_KEY} = '{data}': '{folder.name}/' is not a folder of images by class "
            f"({describe_fault(error)}); give each class a subfolder with at least one image"
        ) from error


def _load_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # damaged images raise whatever their decoder does
        raise WorkloadError(
            f"{_KEY}: image '{path}' cannot be decoded ({describe_fault(error)}); remove or mend it"
        ) from error
