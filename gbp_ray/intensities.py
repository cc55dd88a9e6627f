"""What stands for the darkest and the brightest in the inputs of a network.

A workload says it once; attacks stay inside, and encodings measure intensities by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gbp_ray.errors import ConfigError, WorkloadError

__all__ = ["InputRange", "bounds_of_inputs", "check_range"]

InputRange = tuple[float | Sequence[float], float | Sequence[float]]
"""(darkest, brightest), each a number or one for each channel."""


def bounds_of_inputs(
    input_range: InputRange | None, inputs: Tensor, key: str
) -> tuple[Tensor, Tensor]:
    """Gives what stands for the darkest and the brightest intensity in prepared inputs.

    Args:
        input_range: Of the workload.
        inputs: (B, ...) a prepared batch.
        key: Dotted name of the option that needs to know, for messages.

    Returns:
        (low, high), each shaped to spread over `inputs`.

    Raises:
        ConfigError: The workload does not say, or its inputs are not floating point.
        WorkloadError: It says something else than a range of these inputs.
    """
    if input_range is None or not inputs.is_floating_point():
        raise ConfigError(
            f"{key}: needs a workload of floating-point inputs that says what its darkest and "
            "brightest are; give Workload(input_range=(low, high)), as the network is given them"
        )
    bounds = []
    for bound in input_range:
        values = torch.as_tensor(bound, dtype=inputs.dtype, device=inputs.device)
        if values.ndim == 1 and inputs.ndim >= 2 and len(values) == inputs.shape[1]:
            values = values.view(-1, *[1] * (inputs.ndim - 2))
        elif values.ndim:
            raise WorkloadError(
                f"workload.input_range: has {values.numel()} values for inputs of shape "
                f"{tuple(inputs.shape)}; give a number, or one for each channel"
            )
        bounds.append(values)
    return bounds[0], bounds[1]


def check_range(inputs: Tensor, low: Tensor, high: Tensor) -> None:
    """Refuses inputs outside of what `bounds_of_inputs` gave for them.

    Raises:
        WorkloadError: Some are, by more than rounding; or the range is empty.
    """
    slack = 1e-3 * (high - low)
    is_outside = (inputs < low - slack) | (inputs > high + slack)
    if bool((low >= high).any()) or bool(is_outside.any()):
        raise WorkloadError(
            f"workload.input_range: inputs run from {inputs.min():.4g} to {inputs.max():.4g} and "
            "leave it; it must hold what `prepare` makes of the intensities 0 and 1"
        )
