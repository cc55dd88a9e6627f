"""Preparation of images for a network: augmentation by name, normalisation.

Images are uint8 (B, channels, H, W) until `normalise`, so that augmentation comes first and the
border that cropping adds is black, as published results have it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Subset

from gbp_ray.config.schema import nearest_name
from gbp_ray.errors import WorkloadError
from gbp_ray.workloads.contract import InputRange
from gbp_ray.workloads.options import check_count

__all__ = [
    "AUGMENTATIONS",
    "INPUT_RANGE",
    "Augmentation",
    "Scale",
    "build_augment",
    "import_vision",
    "normalise",
    "take_examples",
]

AUGMENTATIONS = ("crop", "flip", "rotation", "randaugment", "trivialaugment")
"""Crop after padding by an eighth on each side; mirror half of them; turn by up to 15 degrees; a
few random operations of one strength (Cubuk et al. 2019, 1909.13719); one of random strength
(Mueller and Hutter 2021, 2103.10158). The last two want bytes that use their whole range."""


@dataclass(frozen=True)
class _Parameter:
    """Allowed values of an augmentation's parameter; no default if that depends on the images."""

    default: float | None
    least: float
    most: float


_PARAMETERS: dict[str, dict[str, _Parameter]] = {
    "crop": {"padding": _Parameter(None, 1, 1000)},
    "flip": {"probability": _Parameter(0.5, 0.0, 1.0)},
    "rotation": {"degrees": _Parameter(15.0, 0.0, 180.0)},
    "randaugment": {"num_ops": _Parameter(2, 1, 20), "magnitude": _Parameter(9, 0, 30)},
    "trivialaugment": {"num_magnitude_bins": _Parameter(31, 2, 1000)},
}

Augmentation = str | Mapping[str, Any]
"""A name, or a table of a name and its parameters: { name = "rotation", degrees = 5 }."""

_KEY = "workload.options.augment"


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of each channel that images are normalised by; ImageNet's by default."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def bounds(self) -> InputRange:
        """Values of black and of white after `normalise`."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return [-mean / std for mean, std in pairs], [(1 - mean) / std for mean, std in pairs]


INPUT_RANGE = Scale().bounds
"""Values of black and of white after `normalise` by ImageNet's mean and deviation."""


def build_augment(
    entries: Sequence[Augmentation], image_size: int
) -> Callable[[Tensor], Tensor] | None:
    """Chains augmentations in the order given; each image of a batch draws for itself.

    A transform of torchvision draws once per call, so it is called once per image: 30 to 70 us for
    crop and flip, 120 to 155 us with rotation, on one thread. All draws come from torch's global
    generator.

    Args:
        entries: Some of `AUGMENTATIONS`, with or without parameters; none gives None.
        image_size: Height and width in pixels; a crop pads by an eighth of it, 4 for 32.

    Raises:
        WorkloadError: A name or a parameter is unknown or out of range, or this is not a list.
    """
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        raise WorkloadError(
            f'{_KEY} = {entries!r}: must be a list such as ["crop", "flip"] (allowed: '
            f"{', '.join(AUGMENTATIONS)}; [] for none)"
        )
    chosen = [_read_entry(entry) for entry in entries]
    if not chosen:
        return None
    v2 = import_vision("transforms.v2")
    makers: dict[str, Callable[..., Any]] = {
        "crop": lambda padding=None: v2.RandomCrop(
            image_size, padding=image_size // 8 if padding is None else padding
        ),
        "flip": lambda probability: v2.RandomHorizontalFlip(probability),
        "rotation": lambda degrees: v2.RandomRotation(degrees),
        "randaugment": lambda num_ops, magnitude: v2.RandAugment(num_ops, magnitude),
        "trivialaugment": lambda num_magnitude_bins: v2.TrivialAugmentWide(num_magnitude_bins),
    }
    return partial(_transform_each, v2.Compose([makers[name](**given) for name, given in chosen]))


def _read_entry(entry: Augmentation) -> tuple[str, dict[str, Any]]:
    """Checks an entry of the list; returns its name and all parameters that are known."""
    given: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name: Any = given.pop("name", None)
    if name not in AUGMENTATIONS:
        raise WorkloadError(
            f"{_KEY}: {entry!r}: no augmentation {name!r}"
            f"{nearest_name(str(name), AUGMENTATIONS)} (allowed: {', '.join(AUGMENTATIONS)})"
        )
    known = _PARAMETERS[name]
    for key, value in given.items():
        if key not in known:
            raise WorkloadError(
                f"{_KEY}: {name} has no parameter {key!r}{nearest_name(key, list(known))} "
                f"(allowed: {', '.join(known)})"
            )
        rule = known[key]
        kinds = (int, float) if isinstance(rule.default, float) else (int,)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not rule.least <= value <= rule.most:
            kind = "number" if float in kinds else "whole number"
            raise WorkloadError(
                f"{_KEY}: {name}.{key} = {value!r}: must be a {kind} from {rule.least:g} to "
                f"{rule.most:g}"
            )
    defaults = {key: rule.default for key, rule in known.items() if rule.default is not None}
    return name, defaults | given


def _transform_each(transform: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.stack([transform(image) for image in images])


def normalise(images: Tensor, image_size: int | None = None, scale: Scale | None = None) -> Tensor:
    """Scales bytes to [0, 1], subtracts the mean and divides by the deviation of each channel.

    Args:
        images: uint8 (B, 3, H, W).
        image_size: Resizes to this height and width, bilinear, for networks with a fixed input.
        scale: Mean and deviation; ImageNet's by default.
    """
    scale = scale or Scale()
    mean = torch.tensor(scale.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(scale.std, device=images.device).view(3, 1, 1)
    scaled = (images.float() / 255 - mean) / std
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return scaled
    size = (image_size, image_size)
    return functional.interpolate(scaled, size, mode="bilinear", antialias=True)


def take_examples(split: Any, count: int | None, option: str) -> Any:
    """Keeps some examples of a split.

    Args:
        split: A pair of arrays, of which the first examples are kept, or a data set, of which
            evenly spread ones are kept, because folders of images come class by class.
        count: How many; None keeps all.
        option: Name of the option that holds the count, for messages.

    Raises:
        WorkloadError: The count is not a whole number from 1 to the size of the split.
    """
    if count is None:
        return split
    total = len(split[1]) if isinstance(split, tuple) else len(split)
    check_count(option, count, "leave it out to take all examples", most=total)
    if isinstance(split, tuple):
        return tuple(column[:count] for column in split)
    return Subset(split, [index * total // count for index in range(count)])


_DECLARATIONS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_lock = threading.Lock()


# torch withdraws the declarations when their Library is collected.
_declared: torch.library.Library | None = None


def import_vision(submodule: str) -> ModuleType:
    """Imports `torchvision.<submodule>`, such as "transforms.v2", also without its extension.

    Raises:
        ImportError: torchvision is not installed or does not fit this torch.
    """
    with _lock:
        if "torchvision" not in sys.modules:
            _forget_failed_import()
            if not _load_extension():
                _declare_operators()
        return importlib.import_module(f"torchvision.{submodule}")


def _forget_failed_import() -> None:
    # Python drops a package whose import failed but keeps its submodules; imported again, the
    # package would lack them as attributes.
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]


def _load_extension() -> bool:
    # Finding the package does not run it, so the outcome is known before its import is tried.
    package = importlib.util.find_spec("torchvision")
    if package is None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
    extension = PathFinder.find_spec("_C", package.submodule_search_locations)
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True


def _declare_operators() -> None:
    global _declared
    missing = [name for name in _DECLARATIONS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _declared.define(_DECLARATIONS[name])
