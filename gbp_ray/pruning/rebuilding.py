"""A stored network put together again, to look at and never to train."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from gbp_ray.pruning.agreement import check_on_record, fingerprints_of_network
from gbp_ray.pruning.building import network_of_seed
from gbp_ray.pruning.checkpoint import load_weights
from gbp_ray.workload import Workload

__all__ = ["rebuild_network"]


def rebuild_network(
    workload: Workload,
    seed: int,
    weights: bytes,
    source: str,
    stored: Mapping[str, str] | None = None,
) -> nn.Module:
    """Builds the network of a workload with stored weights, in eval mode.

    Args:
        seed: Draws what the weights do not hold.
        weights: weights.safetensors of a round.
        source: What to call the file in an error.
        stored: Fingerprints of round 0 of their trial, which the network must have.

    Raises:
        StoreError: The weights are damaged or do not fit.
        WorkloadError: The network cannot be built, or is another one than it was.
    """
    model, is_blank = network_of_seed(workload, seed, is_changed=True)
    load_weights(model, weights, source)
    check_on_record(fingerprints_of_network(model, is_blank=is_blank), stored or {}, source)
    return model.eval()
