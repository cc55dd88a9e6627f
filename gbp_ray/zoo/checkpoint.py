"""Dense weights from a file: the one place where every built-in workload loads a checkpoint.

A file is compared with the model name by name before anything is trained. Nothing in it is run:
safetensors holds tensors alone, and the other format is read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePath

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from gbp_ray.errors import WorkloadError
from gbp_ray.workload import seeded
from gbp_ray.zoo.location import describe_fault, read_bytes

__all__ = ["read_state", "with_checkpoint"]

_KEY = "workload.options.checkpoint"
_PICKLED = (".pt", ".pth", ".th")
_NUM_NAMED = 3


def with_checkpoint(
    build_model: Callable[[], nn.Module], checkpoint: str | None
) -> Callable[[], nn.Module]:
    """Returns a builder whose every model starts from the checkpoint's weights.

    The file is read and checked now, so that its faults show before any training.

    Args:
        build_model: Makes the model with fresh weights.
        checkpoint: Path or s3:// address of a `.safetensors` file or of a `.pt`, `.pth` or `.th`
            state dict, which may lie under "state_dict" and have "module." before each name; None
            leaves `build_model` as it is.

    Raises:
        WorkloadError: The file is missing or damaged, or its names or shapes are not the model's.
    """
    if checkpoint is None:
        return build_model
    state = read_state(checkpoint)
    with seeded(0):  # the check's own draws must not shift those of the job
        expected = build_model().state_dict()
    faults = _compare(state, expected)
    if faults:
        raise WorkloadError(
            f"{_KEY} = '{checkpoint}': does not fit the model: {'; '.join(faults)}; give a "
            "checkpoint of this very model, or another workload.factory"
        )
    return partial(_build_loaded, build_model, state)


def _build_loaded(build_model: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    model = build_model()
    # Counts of BatchNorm batches may be absent; `_compare` has refused every other gap.
    model.load_state_dict(state, strict=False)
    return model


def read_state(checkpoint: str, key: str = _KEY) -> dict[str, Tensor]:
    """Reads a state dict from a file of one of the kinds that `with_checkpoint` takes.

    Args:
        checkpoint: Path or s3:// address.
        key: What to call it in an error.

    Raises:
        WorkloadError: The file is missing, damaged or of another kind.
    """
    content = read_bytes(checkpoint, key)
    suffix = PurePath(checkpoint.partition("?")[0]).suffix
    if suffix == ".safetensors":
        try:
            return load_tensors(content)
        except (SafetensorError, ValueError) as error:
            raise WorkloadError(
                f"{key} = '{checkpoint}': is truncated or not a safetensors file "
                f"({describe_fault(error)}); copy it again"
            ) from error
    if suffix not in _PICKLED:
        raise WorkloadError(
            f"{key} = '{checkpoint}': unknown kind of file '{suffix}' (allowed: .safetensors, "
            f"{', '.join(_PICKLED)}); save the state dict as .safetensors"
        )
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise WorkloadError(
            f"{key} = '{checkpoint}': is truncated or holds more than tensors "
            f"({describe_fault(error)}); save the state dict as .safetensors"
        ) from error
    return _unwrap(loaded, checkpoint, key)


def _unwrap(loaded: object, checkpoint: str, key: str) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise WorkloadError(
            f"{key} = '{checkpoint}': holds no state dict; save model.state_dict() itself, or "
            "under 'state_dict'"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


def _compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    missing = [
        f"'{name}'"
        for name in expected
        if name not in state and not name.endswith(".num_batches_tracked")
    ]
    unexpected = [f"'{name}'" for name in state if name not in expected]
    reshaped = [
        f"'{name}' has shape {tuple(tensor.shape)} where the model has "
        f"{tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    faults = []
    if missing:
        faults.append(f"it lacks {_name_some(missing)}")
    if unexpected:
        faults.append(f"it has the unexpected {_name_some(unexpected)}")
    if reshaped:
        faults.append(_name_some(reshaped))
    return faults


def _name_some(items: list[str]) -> str:
    rest = len(items) - _NUM_NAMED
    return ", ".join(items[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
