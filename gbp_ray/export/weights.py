"""model.safetensors: plain weights for the network's own class, checked in a fresh network.

    model.safetensors    the state dict, with a shared weight under each of its names; in a folder
                         of transformers', which ties its own, under the first of them only

A network whose layers have lost channels no longer fits its class; see `compacted` for those.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.errors import ExportError
from gbp_ray.training.network import network_of_seed
from gbp_ray.workloads.call import Call
from gbp_ray.workloads.loading import load_workload
from gbp_ray.workloads.weights import save_state, tensor_state

__all__ = [
    "beside_tensors",
    "check_state",
    "complete_state",
    "leave_out",
    "shared_names",
]


def complete_state(model: nn.Module, weights: bytes) -> bytes:
    """Writes a shared weight under each of its names, as the network's class loads it.

    Args:
        weights: weights.safetensors of the round, which holds it once.
    """
    own = tensor_state(model)
    if set(own) == set(load_tensors(weights)):
        return weights
    return save_state(own)


def shared_names(model: nn.Module) -> set[str]:
    """Lists the names in a state dict of tensors that have another name before; on meta, too."""
    first: dict[int, str] = {}
    state = tensor_state(model)
    return {name for name, tensor in state.items() if first.setdefault(id(tensor), name) != name}


def leave_out(state: bytes, names: Collection[str]) -> bytes:
    """Writes a state as safetensors without some names; as it is where it has none of them."""
    tensors = load_tensors(state)
    if tensors.keys().isdisjoint(names):
        return state
    return save_state({name: tensor for name, tensor in tensors.items() if name not in names})


def beside_tensors(model: nn.Module) -> list[str]:
    """Lists what a network's state dict holds that is no tensor."""
    tensors = tensor_state(model)
    return [name for name in model.state_dict() if name not in tensors]


def check_state(
    job: JobConfig, state: bytes, call: Call, outputs: Tensor, *, is_whole: bool = True
) -> None:
    """Checks that a fresh network of the class with this state dict gives the same outputs.

    Args:
        is_whole: Whether it has all names; without, it lacks some that the class ties to others.

    Raises:
        ExportError: It does not take the weights, or gives other outputs.
    """
    # As the class makes it: whoever loads it knows nothing of layers that the job has tied.
    workload = load_workload(job.workload.model_copy(update={"tie": ()}), job.seed + 1)
    fresh, _ = network_of_seed(workload, job.seed + 1)
    try:
        fresh.load_state_dict(load_tensors(state), strict=is_whole and not beside_tensors(fresh))
    except RuntimeError as error:
        raise ExportError(
            f"a fresh network does not take the stored weights: {' '.join(str(error).split())}"
        ) from error
    if not torch.equal(call.run(fresh.eval()), outputs):
        raise ExportError(
            "a fresh network with the stored weights gives other outputs: what it computes is not "
            "in its state dict alone, or is drawn at random"
        )
