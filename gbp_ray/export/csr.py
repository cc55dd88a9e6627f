"""model.csr.safetensors: linear layers as compressed sparse rows, where that is measured faster.

A linear layer of which 90 % and more is zero can compute with the weights that are left only. That
pays for large layers and few rows, and costs time otherwise: two layers of a ViT-B/16 at 90 %, over
197 tokens an image, took 2.1 and 2.2 times as long as dense for 32 images. So each candidate is
timed on this machine with the inputs that it meets, dense and CSR in turn, for 1 and 32 examples;
it becomes CSR only if that is faster for both. `load_csr.py`, which is written beside it, is what
measures and checks it, too. Figures for common shapes are in tests/benchmarks/README.md; blocks
(BSR) were slower than dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.errors import name_some
from gbp_ray.export import load_csr as loader
from gbp_ray.export.load_csr import PARTS, CsrLinear, load_network
from gbp_ray.export.traced import compare_outputs
from gbp_ray.training.latency import BATCH_SIZES, time_in_turn, torch_threads
from gbp_ray.training.network import network_of_seed
from gbp_ray.workloads.call import Call
from gbp_ray.workloads.loading import load_workload

__all__ = [
    "CSR_FILES",
    "CsrFile",
    "make_csr",
]

CSR_FILES = ("model.csr.safetensors", "load_csr.py")

LEAST_SPARSITY = 0.9
_LEAST_RATIO = 1.1  # what is nearer to 1 may be noise
_SECONDS = 0.2  # for each layer and batch size, but no less than these passes:
_FEWEST = 3

_TOLERANCE = 1e-5
"""Greatest difference of the outputs, against the greatest output."""


@dataclass(frozen=True)
class CsrFile:
    """A network with CSR layers.

    Attributes:
        data: The file; empty where `fault` says why there is none.
        model: The network as `load_network` makes it of the file; None likewise.
        ratios: By layer and batch size, how many times as long it takes dense.
        difference: Greatest difference of its outputs from the network's.
    """

    data: bytes = b""
    model: nn.Module | None = None
    ratios: dict[str, dict[int, float]] = field(default_factory=dict)
    difference: float = 0.0
    fault: str = ""

    def files(self) -> dict[str, bytes]:
        """Lists the files to write by name."""
        if not self.data:
            return {}
        return dict(zip(CSR_FILES, (self.data, Path(loader.__file__).read_bytes()), strict=True))


def make_csr(
    job: JobConfig, model: nn.Module, state: bytes, call: Call, *, threads: int = 1
) -> CsrFile:
    """Writes the linear layers that are faster so as CSR, and compares the loaded network.

    Args:
        model: The pruned network, in eval mode.
        state: model.safetensors.
        call: Examples to time and compare on.
        threads: Torch's, while layers are timed.

    Returns:
        The file, or why there is none.

    Raises:
        ExportError: The loaded network gives other outputs.
    """
    candidates = _candidates(model)
    if not candidates:
        return CsrFile(fault=f"no linear layer is {LEAST_SPARSITY:.0%} sparse or more")
    with torch_threads(threads):
        ratios = _time_layers(model, candidates, call)
    chosen = {name: found for name, found in ratios.items() if min(found.values()) >= _LEAST_RATIO}
    if not chosen:
        slow = [
            f"{name} ({', '.join(f'{r:.2f} at batch {size}' for size, r in found.items())})"
            for name, found in ratios.items()
        ]
        what = name_some(slow, 3) if slow else "none was reached by the examples"
        return CsrFile(fault=f"no linear layer was faster; dense / CSR: {what}")
    data = save_tensors(_as_csr(load_tensors(state), candidates, list(chosen)))
    # As whoever loads it: into a fresh network of the class, which knows nothing of tied layers.
    workload = load_workload(job.workload.model_copy(update={"tie": ()}), job.seed + 1)
    fresh, _ = network_of_seed(workload, job.seed + 1)
    made = load_network(fresh, load_tensors(data))
    found = compare_outputs(CSR_FILES[0], made, model, call, _TOLERANCE)
    return CsrFile(data, made, chosen, found.difference)


def _candidates(model: nn.Module) -> dict[str, nn.Linear]:
    """Lists the sparse linear layers whose weight is theirs only and is used by calling them."""
    found: dict[str, nn.Linear] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        # A subclass, or one with hooks, may compute something else.
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            continue
        weight = module.weight
        is_own = isinstance(weight, nn.Parameter) and owners[id(weight)] == 1
        num_zeros = weight.numel() - int(weight.count_nonzero())
        # A layer pruned to just this sparsity may be short of it by the fraction of a weight.
        is_sparse = num_zeros > LEAST_SPARSITY * weight.numel() - 1
        if name and is_own and is_sparse and weight.dtype == torch.float32:
            found[name] = module
    return found


@torch.no_grad()
def _time_layers(
    model: nn.Module, layers: Mapping[str, nn.Linear], call: Call
) -> dict[str, dict[int, float]]:
    """Times each layer that a pass calls, dense against CSR, on the inputs that it meets.

    A layer that is slower for few examples is not timed for many.
    """
    met: dict[str, Tensor] = {}
    ratios: dict[str, dict[int, float]] = {}
    left = dict(layers)
    for size in BATCH_SIZES:
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, given, name=name: met.__setitem__(name, given[0].detach())
            )
            for name, layer in left.items()
        ]
        met.clear()
        try:
            call.resized(size).pass_through(model)
        finally:
            for hook in hooks:
                hook.remove()
        for name, inputs in met.items():
            sparse, dense = CsrLinear.of(layers[name]), layers[name]
            runs = {"dense": lambda: dense(inputs), "csr": lambda: sparse(inputs)}  # noqa: B023
            times_s = time_in_turn(runs, seconds=_SECONDS, fewest=_FEWEST)
            ratio = median(times_s["dense"]) / median(times_s["csr"])
            ratios.setdefault(name, {})[size] = ratio
            if ratio < _LEAST_RATIO:
                del left[name]
    return ratios


def _as_csr(
    state: Mapping[str, Tensor], layers: Mapping[str, nn.Linear], chosen: list[str]
) -> dict[str, Tensor]:
    found = dict(state)
    for name in chosen:
        del found[f"{name}.weight"]
        sparse = CsrLinear.of(layers[name]).state_dict()
        found |= {f"{name}.{part}": sparse[part].contiguous() for part in PARTS}
    return found
