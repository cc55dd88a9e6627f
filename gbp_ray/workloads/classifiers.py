"""Any image classifier of torchvision or timm, over CIFAR-10 or over folders of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import torch
from PIL import Image
from pyarrow.fs import LocalFileSystem
from torch import Tensor, nn

from gbp_ray.config.schema import nearest_name
from gbp_ray.errors import WorkloadError
from gbp_ray.workloads.cifar10 import CLASSES, IMAGE_SIZE, has_cifar10, read_cifar10
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import seeded
from gbp_ray.workloads.images import (
    Augmentation,
    Scale,
    build_augment,
    import_vision,
    normalise,
    take_examples,
)
from gbp_ray.workloads.location import describe_fault, open_location
from gbp_ray.workloads.options import check_count, import_extra
from gbp_ray.workloads.weights import find_misfits, load_state, with_checkpoint

__all__ = [
    "timm",
    "torchvision_classifier",
    "with_vision_weights",
]

_KEY = "workload.options.data"
_WEIGHTS_KEY = "workload.options.weights"
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
        data: CIFAR-10 in either layout (see `cifar10.read_cifar10`), or a folder with
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
    _check_one_start(weights, "torchvision", checkpoint)

    def build(num_classes: int, size: int) -> Callable[[], nn.Module]:
        plain = partial(_build_model, model, num_classes)
        return plain if weights is None else with_vision_weights(plain, model, weights)

    counts = (train_examples, test_examples)
    return _classify(
        build, data, image_size, augment, checkpoint, counts, Scale(), _FOLDER_IMAGE_SIZE
    )


def timm(
    model: str,
    data: str,
    image_size: int | None = None,
    augment: Sequence[Augmentation] = ("crop", "flip"),
    checkpoint: str | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    weights: str | None = None,
) -> Workload:
    """Makes a classifier of timm by name, with an output for each class of the data.

    Args:
        model: A name such as "resnet18", "convnext_tiny" or "vit_tiny_patch16_224".
        data: See `torchvision_classifier`, as for all options that are not listed here.
        image_size: Networks that take images of one size, such as vision transformers, are built
            for this one; by default 32 for CIFAR-10, and for folders what the model was made for.
        weights: Those that timm publishes, by tag, such as "a1_in1k", or "DEFAULT", all but the
            last layer where the data have other classes. Downloaded once, into the hub's cache.

    Raises:
        WorkloadError: timm is not installed, the model is unknown, or an option, the data, the
            weights or the checkpoint cannot be used.
    """
    import_vision("models")  # timm imports torchvision, which does not come in without this
    library = import_extra("timm", "timm")
    _check_one_start(weights, "timm", checkpoint)
    if not isinstance(model, str) or not library.is_model(model):
        names = library.list_models()
        raise WorkloadError(
            f"workload.options.model = {model!r}: timm has no such model"
            f"{nearest_name(str(model), names)} (there are {len(names)}, such as resnet18, "
            "convnext_tiny and vit_tiny_patch16_224)"
        )
    tags = [name.partition(".")[2] for name in library.list_pretrained(model)]
    if weights is not None and weights not in ("DEFAULT", *tags):
        raise WorkloadError(
            f"{_WEIGHTS_KEY} = {weights!r}: timm has no such weights of {model}"
            f"{nearest_name(str(weights), tags)} (allowed: DEFAULT, {', '.join(tags)})"
        )
    name = model if weights in (None, "DEFAULT") else f"{model}.{weights}"
    card = library.get_pretrained_cfg(name)
    create = partial(library.create_model, name, pretrained=weights is not None)

    def build(num_classes: int, size: int) -> Callable[[], nn.Module]:
        sized = {"img_size": size} if card.fixed_input_size else {}
        return partial(create, num_classes=num_classes, **sized)

    if weights is not None:
        try:
            with seeded(0):
                create()
        except Exception as error:  # whatever the way there and the file's reader raise
            raise WorkloadError(
                f"{_WEIGHTS_KEY} = '{weights}': the weights of {model} cannot be fetched "
                f"({describe_fault(error)}); leave it out, or give workload.options.checkpoint"
            ) from error
    counts, scale = (train_examples, test_examples), Scale(tuple(card.mean), tuple(card.std))
    native = card.input_size[-1]
    return _classify(build, data, image_size, augment, checkpoint, counts, scale, native)


def _check_one_start(weights: str | None, source: str, checkpoint: str | None) -> None:
    if weights is not None and checkpoint is not None:
        raise WorkloadError(
            f"{_WEIGHTS_KEY}: comes from {source}, workload.options.checkpoint from a file; give "
            "one of them"
        )


def _classify(
    build: Callable[[int, int], Callable[[], nn.Module]],
    data: str,
    image_size: int | None,
    augment: Sequence[Augmentation],
    checkpoint: str | None,
    counts: tuple[int | None, int | None],
    scale: Scale,
    folder_size: int,
) -> Workload:
    """Opens the data and makes the workload.

    Args:
        build: Makes `build_model` of the number of classes and the side of the images.
        counts: Training and test examples to take, None for all.
        folder_size: Side of images from folders where `image_size` says none.
    """
    if image_size is not None:
        check_count("image_size", image_size, "such as 224 pixels")
    if has_cifar10(data):
        classes, stored_size = CLASSES, IMAGE_SIZE
        train, test = read_cifar10(data)
    else:
        stored_size = image_size or folder_size
        train, test = _open_folders(data, stored_size)
        classes = tuple(train.classes)
    return Workload(
        build_model=with_checkpoint(build(len(classes), image_size or stored_size), checkpoint),
        train=take_examples(train, counts[0], "train_examples"),
        test=take_examples(test, counts[1], "test_examples"),
        prepare=partial(normalise, image_size=image_size, scale=scale),
        augment=build_augment(augment, stored_size),
        input_range=scale.bounds,
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


def with_vision_weights(
    build_model: Callable[[], nn.Module], model: str, weights: str
) -> Callable[[], nn.Module]:
    """Returns a builder whose every model starts from torchvision's weights.

    The last layer keeps its fresh weights where it has another number of outputs.

    Args:
        build_model: Makes the model with fresh weights.
        model: Its name in torchvision.
        weights: "DEFAULT", or a name such as "IMAGENET1K_V1".

    Raises:
        WorkloadError: There are no such weights, they cannot be fetched, or they fit no further
            than their name.
    """
    entry = _find_entry(model, weights)
    state = _fetch(entry, model, weights)
    # The ends of a training that predictions do not pass through.
    state = {
        n: t for n, t in state.items() if not n.startswith(("aux.", "aux1.", "aux2.", "AuxLog"))
    }
    with seeded(0):  # the check's own draws must not shift those of the job
        expected = build_model().state_dict()
    num_classes = len(entry.meta["categories"])
    kept = {n: t for n, t in state.items() if not _is_other_head(t, expected.get(n), num_classes)}
    wanted = {n: t for n, t in expected.items() if n in kept or n not in state}
    if faults := find_misfits(kept, wanted):
        raise WorkloadError(
            f"{_WEIGHTS_KEY} = '{weights}': does not fit {model}: {faults}; leave it out, or give "
            "workload.options.checkpoint"
        )
    return partial(_build_loaded, build_model, kept)


def _is_other_head(tensor: Tensor, expected: Tensor | None, num_classes: int) -> bool:
    """Checks whether a tensor gives the weights' own classes where the model has other ones."""
    if expected is None or tensor.shape == expected.shape:
        return False
    return tensor.shape[:1] == (num_classes,) and tensor.shape[1:] == expected.shape[1:]


def _find_entry(model: str, weights: str) -> Any:
    entries = import_vision("models").get_model_weights(model)
    names = [entry.name for entry in entries]
    if not isinstance(weights, str) or (weights != "DEFAULT" and weights not in names):
        raise WorkloadError(
            f"{_WEIGHTS_KEY} = {weights!r}: torchvision has no such weights of {model}"
            f"{nearest_name(str(weights), names)} (allowed: DEFAULT, {', '.join(names)})"
        )
    return entries[weights]


def _fetch(entry: Any, model: str, weights: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = entry.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # whatever the way there and the file's reader raise
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        file = PurePosixPath(urlparse(entry.url).path).name
        raise WorkloadError(
            f"{_WEIGHTS_KEY} = '{weights}': the weights of {model} cannot be fetched from "
            f"{entry.url} ({describe_fault(error)}); put {file} into {folder}, or leave "
            f"{_WEIGHTS_KEY} out"
        ) from error
    return state


def _build_loaded(build_model: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    return load_state(build_model(), state)
