"""What a network costs, measured from its weights as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gbp_ray.pruning.masks import Prunable
from gbp_ray.pruning.sharding import add_over_ranks, local
from gbp_ray.store import CostRecord, LayerRecord

__all__ = ["count_macs", "measure"]


@torch.no_grad()
def count_macs(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Counts the multiply-adds of one forward pass by module name.

    Args:
        example: (1, ...) one prepared input.

    Returns:
        Module name ("" for the whole model) to multiply-adds of its convolutions and matrix
        products, dense; a module that is used twice counts twice.
    """
    was_training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    # Fused kernels hide their products from the counter.
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter, sdpa_kernel(SDPBackend.MATH):
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
        model.train(was_training)
    root = type(model).__name__
    macs: dict[str, int] = {}
    for name, by_operation in counter.get_flop_counts().items():
        path = "" if name in ("Global", root) else name.removeprefix(f"{root}.")
        # A multiply-add is two floating-point operations.
        macs[path] = sum(by_operation.values()) // 2
    return macs


@torch.no_grad()
def measure(model: nn.Module, units: list[Prunable], macs: Mapping[str, int]) -> CostRecord:
    """Measures size, sparsity and multiply-adds. Communicates where the network is sharded.

    Args:
        units: The prunable parameters.
        macs: From `count_macs`, which pruning does not change.

    Returns:
        Counts over the whole model and by prunable layer. Multiply-adds of the pruned network leave
        out those with a zero weight. Bytes are those of the dense tensors; `num_bytes_sparse` is
        what non-zero weights and one bit per prunable weight would take.
    """
    # A tied weight works in each of the modules that hold it.
    users: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(parameter, set()).add(name.rpartition(".")[0])
    # parameters() yields a tied parameter once.
    parameters = list(model.parameters())
    counted = [int(torch.count_nonzero(local(p))) for p in parameters]
    nonzero = dict(zip(parameters, add_over_ranks(counted, parameters), strict=True))
    layers = []
    spared = 0
    for unit in units:
        num_weights = unit.parameter.numel()
        num_nonzero = nonzero[unit.parameter]
        layer_macs = sum(macs.get(user, 0) for user in users[unit.parameter])
        macs_nonzero = layer_macs * num_nonzero // num_weights
        spared += layer_macs - macs_nonzero
        layers.append(
            LayerRecord(
                name=unit.name,
                shape=tuple(unit.parameter.shape),
                num_weights=num_weights,
                num_nonzero=num_nonzero,
                macs=layer_macs,
                macs_nonzero=macs_nonzero,
            )
        )
    state = [*parameters, *model.buffers()]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state)
    spared_bytes = sum(
        (unit.parameter.numel() - layer.num_nonzero) * unit.parameter.element_size()
        for unit, layer in zip(units, layers, strict=True)
    )
    mask_bytes = sum(-(-layer.num_weights // 8) for layer in layers)
    return CostRecord(
        num_parameters=sum(p.numel() for p in parameters),
        num_nonzero=sum(nonzero.values()),
        macs=macs.get("", 0),
        macs_nonzero=macs.get("", 0) - spared,
        num_bytes=num_bytes,
        num_bytes_sparse=num_bytes - spared_bytes + mask_bytes,
        layers=tuple(layers),
    )
