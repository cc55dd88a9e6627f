"""BatchNorm folded into the layer before it, for a network that is done: exactly, or not at all.

In eval mode a BatchNorm scales and shifts each channel by constants, which a convolution or linear
layer in front of it can take into its weight and bias (`torch.nn.utils.fusion`). A weight of zero
stays zero, so masks still fit. The network keeps its class and its code: the BatchNorm becomes an
`nn.Identity`, the layer gets a bias. Who feeds whom is read off the network's graph (`torch.fx`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, symbolic_trace
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from gbp_ray.distributed.sharding import copy_network
from gbp_ray.errors import PruneError, in_one_line
from gbp_ray.workloads.contract import TRANSPOSED, WEIGHT_LAYERS

__all__ = ["fold_batchnorm"]


def fold_batchnorm(model: nn.Module, run: Callable[[nn.Module], object]) -> nn.Module:
    """Copies a network with every BatchNorm folded into the layer that it follows.

    Args:
        run: Passes a few examples through it, to see what shapes the layers meet.

    Returns:
        The copy, in eval mode; it gives the same outputs up to rounding.

    Raises:
        PruneError: There is no BatchNorm, the network's graph cannot be read, or some BatchNorm
            cannot be folded; says which and why.
    """
    folded = copy_network(model).eval()
    norms = {name: m for name, m in folded.named_modules() if isinstance(m, _BatchNorm)}
    if not norms:
        raise PruneError("BatchNorm cannot be folded: the network has none")
    graph = _trace(folded)
    modules = dict(folded.named_modules())
    # All are checked before any is folded, by the module itself: it may have several names.
    pairs: dict[nn.Module, nn.Module] = {}
    for name, norm in norms.items():
        pairs[norm] = _layer_before(name, norm, folded, graph)
    _refuse_sequences(folded, norms, pairs, run)
    fused = {layer: _fuse(layer, norm) for norm, layer in pairs.items()}
    for name, module in modules.items():
        if module in fused:
            _replace(folded, name, fused[module])
        elif module in pairs:
            _replace(folded, name, nn.Identity())
    return folded


def _trace(model: nn.Module) -> Graph:
    try:
        return symbolic_trace(model).graph
    except Exception as error:
        # Whatever a forward pass does with stand-ins for its tensors.
        reason = in_one_line(error)
        raise PruneError(
            f"BatchNorm cannot be folded: torch.fx cannot read the network's graph ({reason}); "
            "export it with its BatchNorm"
        ) from error


def _layer_before(name: str, norm: nn.Module, model: nn.Module, graph: Graph) -> nn.Module:
    """Finds the one layer that a norm always follows, and that nothing else follows.

    Raises:
        PruneError: There is no such layer.
    """

    def called(node: object) -> nn.Module | None:
        is_call = isinstance(node, Node) and node.op == "call_module"
        return model.get_submodule(str(node.target)) if is_call else None  # type: ignore[attr-defined]

    def is_read(path: str) -> bool:
        reads = (str(node.target) for node in graph.nodes if node.op == "get_attr")
        return any(target.startswith(f"{path}.") for target in reads)

    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        raise _fault(name, "it keeps no running statistics")
    calls = [node for node in graph.nodes if called(node) is norm]
    if not calls or is_read(name):
        raise _fault(name, "its tensors are used otherwise than by calling it")
    layers = {called(node.args[0]) for node in calls}
    layer = next(iter(layers))
    if len(layers) > 1 or not isinstance(layer, WEIGHT_LAYERS):
        source = calls[0].args[0]
        found = type(layer).__name__ if layer is not None else f"'{source}'"
        raise _fault(name, f"it follows {found}, not one convolution or linear layer")
    where = next(path for path, module in model.named_modules() if module is layer)
    if isinstance(layer, nn.Linear) and not isinstance(norm, nn.BatchNorm1d):
        raise _fault(name, f"it is no BatchNorm1d, and '{where}' is a linear layer")
    uses = [node for node in graph.nodes if called(node) is layer]
    if is_read(where) or any(user not in calls for node in uses for user in node.users):
        raise _fault(name, f"'{where}' or what it computes is used by others, too")
    if not isinstance(layer.weight, nn.Parameter):
        raise _fault(name, f"the weight of '{where}' is computed from other tensors")
    sharers = [
        path
        for path, module in model.named_modules()
        if module is not layer and any(p is layer.weight for p in module._parameters.values())
    ]
    if sharers:
        raise _fault(name, f"'{where}' shares its weight with '{sharers[0]}', and would no longer")
    return layer


def _refuse_sequences(
    model: nn.Module,
    norms: Mapping[str, nn.Module],
    pairs: Mapping[nn.Module, nn.Module],
    run: Callable[[nn.Module], object],
) -> None:
    """Refuses a norm after a linear layer over more than (B, features): it scales the second axis.

    Raises:
        PruneError: Naming the norm.
    """
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        shapes[norm] = tuple(arguments[0].shape)

    hooks = [norm.register_forward_pre_hook(note) for norm in pairs]
    try:
        with torch.no_grad():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    for name, norm in norms.items():
        if isinstance(pairs[norm], nn.Linear) and len(shapes.get(norm, ())) > 2:
            raise _fault(name, f"it scales axis 1 of {shapes[norm]}, a linear layer makes the last")


def _fuse(layer: nn.Module, norm: nn.Module) -> nn.Module:
    fuse: Callable[..., nn.Module] = (
        fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    )
    options = {"transpose": True} if isinstance(layer, TRANSPOSED) else {}
    with torch.no_grad():
        return fuse(layer, norm, **options)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _fault(name: str, reason: str) -> PruneError:
    return PruneError(
        f"BatchNorm '{name}' cannot be folded: {reason}; export the network with its BatchNorm"
    )
