"""What a finished trial has gained, seen at once: size and time of a pass, dense against pruned.

Both networks are rebuilt from storage, and timed in turn in eager PyTorch on the processor, for a
second or two in all. Batch sizes whose passes would take longer are left out and named;
`gbp-ray export --measure` takes its time, and measures other engines, files and memory as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gbp_ray.export.rebuilt import open_round
from gbp_ray.results.measurements import DENSE, PRUNED, LatencyRecord
from gbp_ray.training.latency import BATCH_SIZES, measure_latency
from gbp_ray.workloads.call import Call

__all__ = [
    "Beside",
    "Size",
    "compare_with_dense",
]

_SECONDS = 0.5  # for each batch size
_MOST_MACS = 3e9
"""Multiply-adds of a pass that nine of each network fit into few seconds on a core."""


@dataclass(frozen=True)
class Size:
    """The size of a network.

    Attributes:
        parameters: Weights of all parameters.
        macs: Multiply-adds of one example; 0 where they cannot be counted.
        num_bytes: Of all parameters.
    """

    parameters: int
    macs: int
    num_bytes: int


@dataclass(frozen=True)
class Beside:
    """A dense and a pruned network beside each other.

    Attributes:
        sizes: Of "dense" and "pruned".
        latency: Of both at each batch size that was timed.
        versions: Of what timed them.
        too_long: Batch sizes that were not timed.
        fault: Why the pruned network still has its removed units, or "".
    """

    sizes: dict[str, Size]
    latency: tuple[LatencyRecord, ...]
    versions: dict[str, str]
    too_long: tuple[int, ...] = ()
    fault: str = ""


def compare_with_dense(
    uri: str | Path, *, trust_code: Sequence[str] = (), seconds: float = _SECONDS
) -> Beside:
    """Rebuilds the networks of a finished trial from storage, and measures both.

    Args:
        uri: A round's folder, or a trial's: that gives the round which the trial is for.
        trust_code: Code that may run though only the record names it; see `admit_code`.
        seconds: To spend on each batch size.

    Raises:
        ConfigError: The record names code that is neither built in nor trusted.
        ExportError: The stored network cannot be compacted.
        StoreError: The round cannot be read, or its trial has not finished.
        WorkloadError: Data or network are not available here.
    """
    source = open_round(uri, trust_code=trust_code)
    weights, packed = source.read("weights.safetensors"), source.read("masks.safetensors")
    masked, masks = source.rebuild_masked(weights, packed)
    compact, fault = source.compact(masked, masks)
    dense = source.rebuild(source.read("weights.safetensors", source.trial.dense))
    models = {DENSE: dense, PRUNED: masked if compact is None else compact.model}
    sizes = {name: _size_of(model, source.count_macs(model)) for name, model in models.items()}
    longest = sizes[DENSE].macs
    sample = Call.of(dense, source.workload, max(BATCH_SIZES))
    timed = [size for size in BATCH_SIZES if size * longest <= _MOST_MACS]
    latency = measure_latency(models, sample, timed, seconds=seconds)
    too_long = tuple(size for size in BATCH_SIZES if size not in timed)
    return Beside(sizes, latency, {"torch": str(torch.__version__)}, too_long, fault)


def _size_of(model: nn.Module, macs: int) -> Size:
    parameters = list(model.parameters())
    return Size(
        parameters=sum(parameter.numel() for parameter in parameters),
        macs=macs,
        num_bytes=sum(tensor.nbytes for tensor in parameters),
    )
