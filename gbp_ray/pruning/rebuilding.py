"""A stored network put together again, to look at and never to train."""

from __future__ import annotations

from torch import nn

from gbp_ray.pruning.building import network_of_seed
from gbp_ray.pruning.checkpoint import load_weights
from gbp_ray.workload import Workload

__all__ = ["rebuild_network"]


def rebuild_network(workload: Workload, seed: int, weights: bytes, source: str) -> nn.Module:
    """Builds the network of a workload with stored weights, in eval mode.

    Args:
        seed: Draws what the weights do not hold.
        weights: weights.safetensors of a round.
        source: What to call the file in an error.

    Raises:
        StoreError: The weights are damaged or do not fit.
        WorkloadError: The network cannot be built.
    """
    model, _ = network_of_seed(workload, seed)
    load_weights(model, weights, source)
    return model.eval()
