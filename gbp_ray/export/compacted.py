"""A network without its removed units, and the files that make it of the user's own class.

    model.safetensors    plain weights of the small network
    widths.json          what of the dense network to change before it takes them:
                         shapes      by name of a tensor: its dense shape, and its new one
                         attributes  new values by dotted path, such as "conv1.out_channels"
                         kept        of tensors that no state dict holds: positions by axis
    load.py              does it: PyTorch and safetensors only

A trial stores dense shapes with zeros. Here its units are found anew, and removed as in a round:
the result has computed what the masked network does before anything is made of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.sharding import copy_network
from gbp_ray.errors import ExportError, in_one_line
from gbp_ray.export import load as loader
from gbp_ray.export.load import fill_network
from gbp_ray.export.traced import compare_outputs
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.pruning.structure import Structure
from gbp_ray.pruning.units import excluded_parameters
from gbp_ray.pruning.whole_units import few_of, passing, structure_by
from gbp_ray.training.network import network_of_seed
from gbp_ray.workloads.call import Call
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import first_example
from gbp_ray.workloads.loading import load_workload
from gbp_ray.workloads.weights import save_state, tensor_state

__all__ = [
    "COMPACT_FILES",
    "Compact",
    "check_loader",
    "compact_network",
]

COMPACT_FILES = ("widths.json", "load.py")

_TOLERANCE = 1e-5
"""Greatest difference of the outputs, against the greatest output."""


@dataclass(frozen=True)
class Compact:
    """A network that has lost its removed units.

    Attributes:
        model: In eval mode.
        widths: Content of widths.json.
        uncalled: Paths of cut modules that the compared examples did not go through.
    """

    model: nn.Module
    widths: dict[str, Any]
    uncalled: tuple[str, ...]

    def state(self) -> bytes:
        """Writes model.safetensors, a shared weight under each of its names."""
        return save_state(tensor_state(self.model))

    def files(self) -> dict[str, bytes]:
        """Lists the files beside the weights by name."""
        code = Path(loader.__file__).read_bytes()
        return dict(zip(COMPACT_FILES, (_write(self.widths), code), strict=True))


def compact_network(
    job: JobConfig, workload: Workload, masked: nn.Module, masks: MaskSet
) -> Compact | None:
    """Copies a network without the units that its masks remove.

    Args:
        masked: Of dense shapes, in eval mode, on the processor.

    Returns:
        The copy; None where the job removes single weights, or nothing is removed.

    Raises:
        PruneError: A mask removes parts of units, or the network cannot go without them; names
            the layer.
    """
    if not job.prune.unit_kinds or not masks.num_pruned:
        return None
    # All groups of the network: those that the trial left out have lost nothing.
    excluded = excluded_parameters(masked, job.prune.exclude)
    example = first_example(workload)
    structure = structure_by(workload, masked, example, excluded, job.prune.unit_kinds)
    whole = structure.masks(structure.everything, structure.bytes_per_weight)
    kept_U = structure.units_in({**whole, **dict(masks.items())})
    model = copy_network(masked).eval()
    done = remove_units(
        model, structure, kept_U, passing(workload, few_of(workload, torch.device("cpu")))
    )
    widths = {
        "shapes": _changed_shapes(masked, model),
        "attributes": dict(sorted(done.attributes.items())),
        "kept": _kept_beside(masked, structure, kept_U),
    }
    return Compact(model, widths, done.uncalled)


def check_loader(
    job: JobConfig, compact: Compact, state: bytes, call: Call, masked: nn.Module
) -> float:
    """Loads what is written into a fresh network of the class, and compares it with the masked one.

    Args:
        state: model.safetensors.

    Returns:
        The greatest difference of the outputs.

    Raises:
        ExportError: The class does not take it, or the outputs differ.
    """
    # As the class makes it: whoever loads it knows nothing of layers that the job has tied.
    workload = load_workload(job.workload.model_copy(update={"tie": ()}), job.seed + 1)
    fresh, _ = network_of_seed(workload, job.seed + 1)
    try:
        # As read from the file, and on a copy: a workload may return the same network again.
        widths = json.loads(_write(compact.widths))
        made = fill_network(copy_network(fresh), widths, load_tensors(state))
    except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise ExportError(
            f"load.py: a fresh network does not take the widths: {in_one_line(error)}"
        ) from error
    return compare_outputs(COMPACT_FILES[1], made, masked, call, _TOLERANCE).difference


def _write(widths: Mapping[str, Any]) -> bytes:
    """Writes widths.json, a line for each tensor and attribute."""
    sections = []
    for name, entries in widths.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
        inside = ",\n".join(lines)
        sections.append(f' "{name}": {{\n{inside}\n }}' if lines else f' "{name}": {{}}')
    return ("{\n" + ",\n".join(sections) + "\n}\n").encode()


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Lists parameters and buffers by all of their names, as the loader goes through them."""
    return {
        f"{path}.{key}".lstrip("."): tensor
        for path, module in model.named_modules()
        for own in (module._parameters, module._buffers)
        for key, tensor in own.items()
        if tensor is not None
    }


def _changed_shapes(dense: nn.Module, small: nn.Module) -> dict[str, list[list[int]]]:
    after = _tensors_of(small)
    return {
        name: [list(tensor.shape), list(after[name].shape)]
        for name, tensor in _tensors_of(dense).items()
        if tensor.shape != after[name].shape
    }


def _kept_beside(
    dense: nn.Module, structure: Structure, kept_U: np.ndarray
) -> dict[str, dict[str, list[int]]]:
    """Lists what stays of cut tensors that no state dict holds."""
    tensors, stored = _tensors_of(dense), dense.state_dict()
    found = {}
    for first, axes in structure.kept_positions(kept_U).items():
        same = (name for name, tensor in tensors.items() if tensor is tensors[first])
        for name in (name for name in same if name not in stored):
            found[name] = {
                str(dim): np.flatnonzero(kept).tolist()
                for dim, kept in axes.items()
                if not kept.all()
            }
    return {name: axes for name, axes in found.items() if axes}
