"""Dense weights from a file: how every built-in workload takes its option `checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from gbp_ray.errors import WorkloadError
from gbp_ray.weight_files import read_weights
from gbp_ray.weights import find_misfits, fit_state, load_state
from gbp_ray.workload import seeded

__all__ = ["with_checkpoint"]

_KEY = "workload.options.checkpoint"


def with_checkpoint(
    build_model: Callable[[], nn.Module], checkpoint: str | None
) -> Callable[[], nn.Module]:
    """Returns a builder whose every model starts from the checkpoint's weights.

    The file is read and checked now, so that its faults show before any training.

    Args:
        build_model: Makes the model with fresh weights.
        checkpoint: Path or s3:// address of a file as `weight_files.read_weights` takes it; None
            leaves `build_model` as it is.

    Raises:
        WorkloadError: The file is missing or damaged, or its names or shapes are not the model's.
    """
    if checkpoint is None:
        return build_model
    file = read_weights(checkpoint, _KEY)
    with seeded(0):  # the check's own draws must not shift those of the job
        expected = build_model().state_dict()
    state = fit_state(file, expected)
    if faults := find_misfits(state, expected):
        raise WorkloadError(
            f"{_KEY} = '{checkpoint}': does not fit the model: {faults}; give a checkpoint of this "
            "very model, another workload.factory, or workload.transfer with a new_head"
        )
    return partial(_build_loaded, build_model, state)


def _build_loaded(build_model: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    return load_state(build_model(), state)
