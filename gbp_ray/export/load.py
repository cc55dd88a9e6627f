"""Load a network that was pruned of whole channels or heads, from the files beside this one.

    from load import load_network
    model = load_network(Network(...))  # a fresh network of the class that was pruned

It needs PyTorch and safetensors only. The network is changed in place, to what widths.json lists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def load_network(model: nn.Module, folder: str | Path = Path(__file__).parent) -> nn.Module:
    """Cuts a dense network to the widths of a folder, loads its weights, and sets eval mode."""
    widths = json.loads((Path(folder) / "widths.json").read_text())
    return fill_network(model, widths, load_file(Path(folder) / "model.safetensors"))


def fill_network(model: nn.Module, widths: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """Does what `load_network` does, with the content of the files."""
    left, made = dict(widths["shapes"]), dict[Tensor, Tensor]()  # what was shared stays shared
    for path, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, old in own.items():
                name = f"{path}.{key}".lstrip(".")
                if old is not None and name in left:
                    before, after = left.pop(name)
                    if list(old.shape) != before:
                        raise ValueError(f"{name}: is {list(old.shape)} here, and was {before}")
                    if old not in made:
                        made[old] = _cut(old, after, widths["kept"].get(name, {}))
                    own[key] = made[old]
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    assert not left, f"{next(iter(left))}: is not in this network, and is in widths.json"
    for name, value in widths["attributes"].items():
        path, _, key = name.rpartition(".")
        held = vars(model.get_submodule(path))
        held[key] = tuple(value) if isinstance(held[key], tuple) else value
    missing, unexpected = model.load_state_dict(weights, strict=False)
    state = model.state_dict(keep_vars=True)
    loaded = {id(state[name]) for name in weights if name in state}  # once, under any of its names
    missing = [n for n in missing if not n.endswith("_extra_state") and id(state[n]) not in loaded]
    if lacking := [*missing, *unexpected]:
        raise ValueError(f"{lacking[0]}: is not in both the network and model.safetensors")
    return model.eval()


def _cut(old: Tensor, shape: list[int], kept: dict[str, list[int]]) -> Tensor:
    new = old.detach() if kept else old.detach().new_empty(shape)
    for dim, positions in kept.items():  # a buffer that is not among the weights
        new = new.index_select(int(dim), torch.tensor(positions, device=new.device))
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
