"""Weights that torchvision offers for its models, by name; fetched once, kept by torch.hub.

Where the network is cut off they can be put there by hand; the message names file and folder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from gbp_ray.config import nearest_name
from gbp_ray.errors import WorkloadError
from gbp_ray.location import describe_fault
from gbp_ray.weights import find_misfits, load_state
from gbp_ray.workload import seeded
from gbp_ray.zoo.vision import import_vision

__all__ = ["with_vision_weights"]

_KEY = "workload.options.weights"


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
            f"{_KEY} = '{weights}': does not fit {model}: {faults}; leave it out, or give "
            "workload.options.checkpoint"
        )
    return partial(_build_loaded, build_model, kept)


def _is_other_head(tensor: Tensor, expected: Tensor | None, num_classes: int) -> bool:
    """Whether a tensor gives the weights' own classes where the model has other ones."""
    if expected is None or tensor.shape == expected.shape:
        return False
    return tensor.shape[:1] == (num_classes,) and tensor.shape[1:] == expected.shape[1:]


def _find_entry(model: str, weights: str) -> Any:
    entries = import_vision("models").get_model_weights(model)
    names = [entry.name for entry in entries]
    if not isinstance(weights, str) or (weights != "DEFAULT" and weights not in names):
        raise WorkloadError(
            f"{_KEY} = {weights!r}: torchvision has no such weights of {model}"
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
            f"{_KEY} = '{weights}': the weights of {model} cannot be fetched from {entry.url} "
            f"({describe_fault(error)}); put {file} into {folder}, or leave {_KEY} out"
        ) from error
    return state


def _build_loaded(build_model: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    return load_state(build_model(), state)
