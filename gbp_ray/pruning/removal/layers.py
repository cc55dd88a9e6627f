"""The layers that torch and transformers make: which can be cut, and the widths that they hold.

A layer keeps its widths as attributes beside its weights. They follow from the new weights; only
how many groups are left of a grouped layer depends on which positions went.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gbp_ray.distributed.sharding import is_shard
from gbp_ray.errors import PruneError
from gbp_ray.pruning.removal.cutting import Axes

__all__ = ["KEPT_AS_ZEROS", "refresh", "why_not_cut", "widths_of"]

KEPT_AS_ZEROS = (
    "set prune.compact = false, which keeps removed units as zeros, or name the layer in "
    "prune.exclude"
)

_QUANTIZED = ("torch.ao.", "torchao.", "bitsandbytes.", "torch.nn.quantized.", "torch.nn.qat.")
_RECURRENT = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}


def why_not_cut(module: nn.Module, tensor: Tensor) -> str:
    """Words why a tensor that a module holds cannot be cut; "" where it can."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is in a module of TorchScript"
    if isinstance(module, ParametrizationList) or is_parametrized(module):
        return "belongs to a layer with a parametrization"
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod) for hook in hooks):
        return "belongs to a layer whose weight is computed from others (weight_norm, prune)"
    if is_shard(tensor):
        return "is sharded"
    is_integer = isinstance(tensor, nn.Parameter) and not (
        tensor.is_floating_point() or tensor.is_complex()
    )
    is_quantized = tensor.is_quantized or is_integer or hasattr(module, "weight_fake_quant")
    if is_quantized or f"{kind.__module__}.".startswith(_QUANTIZED):
        return f"is quantized, or belongs to a layer that quantizes ({kind.__name__})"
    if type(tensor) not in (nn.Parameter, Tensor):
        return f"is a {type(tensor).__name__}, not a plain parameter or buffer"
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        return "has hooks on its gradient, made for the old shape"
    return ""


def widths_of(module: nn.Module, lost: Mapping[str, Axes], path: str) -> dict[str, Any]:
    """Returns the attributes that a layer should have now that its tensors are cut.

    Args:
        lost: Which positions stayed, of the module's own tensors that lost any, by their name in
            the module.
        path: Of the module, for errors.

    Raises:
        PruneError: No widths fit: the layer is left with parts of groups, or with layers of a
            recurrent stack that differ.
    """
    tensors = module._parameters | module._buffers
    weight = tensors.get("weight")
    shape = tuple(weight.shape) if weight is not None else ()
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.Bilinear):
        return dict(zip(("out_features", "in1_features", "in2_features"), shape, strict=True))
    if isinstance(module, _ConvNd):
        return _conv_widths(module, lost.get("weight", {}), shape, path)
    if isinstance(module, nn.GroupNorm):
        groups = _groups_left(module.num_groups, lost.get("weight", {}), path)
        return {"num_channels": shape[0], "num_groups": groups}
    if isinstance(module, _NormBase):
        return {"num_features": next(len(t) for t in tensors.values() if t is not None and t.ndim)}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": shape}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent_widths(module, path)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and len(shape) == 2:
        # Of transformers: a linear layer with its weight the other way round.
        widths = {"nx": shape[0], "nf": shape[1]}
        return {name: width for name, width in widths.items() if name in vars(module)}
    return {}


def refresh(module: nn.Module) -> None:
    """Has a recurrent layer use the tensors that it holds now; it keeps a list of them."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _conv_widths(module: _ConvNd, axes: Axes, shape: tuple[int, ...], path: str) -> dict[str, int]:
    is_transposed = isinstance(module, _ConvTransposeNd)
    groups = _groups_left(module.groups, axes, path)
    first, second = ("in", "out") if is_transposed else ("out", "in")
    return {
        f"{first}_channels": shape[0],
        f"{second}_channels": shape[1] * groups,
        "groups": groups,
    }


def _groups_left(groups: int, axes: Axes, path: str) -> int:
    """Counts the groups of which something is left, along the first axis.

    Raises:
        PruneError: They are not left with equally many channels.
    """
    if 0 not in axes:
        return groups
    left = axes[0].reshape(groups, -1).sum(axis=1)
    left = left[left > 0]
    if len(set(left.tolist())) > 1:
        raise PruneError(
            f"'{path}': its {groups} groups are left with different numbers of channels "
            f"({', '.join(map(str, sorted(set(left.tolist()))))}); {KEPT_AS_ZEROS}",
            path=path,
        )
    return int(np.count_nonzero(left))


def _recurrent_widths(module: nn.RNNBase | nn.RNNCellBase, path: str) -> dict[str, int]:
    kind = getattr(module, "mode", type(module).__name__)
    num_gates = _RECURRENT.get(kind, 1)
    own = module._parameters
    read = own.get("weight_ih_l0", own.get("weight_ih"))
    assert read is not None
    hidden = {
        len(weight) // num_gates
        for name, weight in own.items()
        if weight is not None and name.startswith("weight_hh")
    }
    if len(hidden) > 1:
        raise PruneError(
            f"'{path}': its layers are left with different numbers of units "
            f"({', '.join(map(str, sorted(hidden)))}), and all have one hidden_size; "
            f"{KEPT_AS_ZEROS}",
            path=path,
        )
    widths = {"input_size": read.shape[1], "hidden_size": hidden.pop()}
    if getattr(module, "proj_size", 0):
        widths["proj_size"] = len(module.get_parameter("weight_hr_l0"))
    return widths
