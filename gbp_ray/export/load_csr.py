"""Load model.csr.safetensors: a network whose sparsest linear layers are CSR tensors.

    model = load_network(Network(...), load_file("model.csr.safetensors"))  # safetensors.torch

It takes a network of the class that was pruned and needs PyTorch only. For inference on the
processor: such layers compute with the weights that are left, and learn nothing.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

PARTS = ("crow", "col", "values")


class CsrLinear(nn.Module):
    """A linear layer with its weight as compressed sparse rows, 32-bit indices."""

    def __init__(
        self, width: int, bias: Tensor | None, crow: Tensor, col: Tensor, values: Tensor
    ) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("crow", crow)
        self.register_buffer("col", col)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls sparse tensors a beta
            self.weight = torch.sparse_csr_tensor(crow, col, values, (len(crow) - 1, width))

    @classmethod
    def of(cls, layer: nn.Linear) -> CsrLinear:
        """Makes one of a linear layer; its zeros are left out."""
        weight = layer.weight.detach()
        row, col = weight.nonzero(as_tuple=True)
        ends = torch.bincount(row, minlength=len(weight)).cumsum(0)
        crow = torch.cat([ends.new_zeros(1), ends]).int()
        return cls(layer.in_features, layer.bias, crow, col.int(), weight[row, col])

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        one = len(rows) == 1
        outputs = (self.weight @ rows[0])[None] if one else (self.weight @ rows.t()).t()
        outputs = outputs.contiguous().reshape(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


def load_network(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Puts the weights of model.csr.safetensors into a network, and returns it in eval mode."""
    for name in [key.removesuffix(".crow") for key in tensors if key.endswith(".crow")]:
        path, _, own = name.rpartition(".")
        old, parts = model.get_submodule(name), [tensors[f"{name}.{p}"] for p in PARTS]
        assert isinstance(old, nn.Linear), f"{name} is no linear layer in this network"
        setattr(model.get_submodule(path), own, CsrLinear(old.in_features, old.bias, *parts))
    model.load_state_dict(tensors)
    return model.eval()
