"""Where rounding in float32 is larger than what is tolerated, networks are compared in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from structures import Case, blocks, channels, kept, mask, structure_of
from torch import Tensor, nn
from torch.optim import Adam

from gbp_ray.errors import PruneError
from gbp_ray.pruning.removal.precision import in_float64
from gbp_ray.pruning.removal.remove import remove_units


class Rounded(nn.Module):
    """Has an error that depends on its width, of float32 only or of any type."""

    def __init__(self, error: float, is_of_float32: bool) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.error, self.is_of_float32 = error, is_of_float32

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.b(self.norm(self.a(x)).relu())
        if outputs.dtype == torch.float64 and self.is_of_float32:
            return outputs
        return outputs * (1 + self.error * self.a.weight.shape[0])


def case_of(error: float, is_of_float32: bool = True) -> Case:
    model = Rounded(error, is_of_float32).eval()
    parts = [*channels("a", 6, norm="norm", statistics=True), ("b.weight", 1, blocks(6))]
    structure = structure_of(model, parts)
    case = Case(model, torch.randn(5, 4), structure, kept(structure, [0, 5]), {})
    mask(model, structure, case.kept_U)
    return case


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_rounding_is_told_from_another_function() -> None:
    case = case_of(2e-5)
    optimizer = Adam(case.model.parameters())
    case.model(case.inputs).square().sum().backward()
    optimizer.step()
    mask(case.model, case.structure, case.kept_U)
    before, gradient = tensors_of(case.model), case.model.b.weight.grad
    moment = optimizer.state[case.model.a.weight]["exp_avg"]
    found = remove_units(
        case.model, case.structure, case.kept_U, lambda net: net(case.inputs), optimizer=optimizer
    )
    assert found.difference < 1e-6
    for name, tensor in case.model.state_dict().items():
        assert tensor.dtype == before[name].dtype, name
    assert torch.equal(case.model.a.weight, before["a.weight"][1:5])
    assert torch.equal(case.model.norm.running_var, before["norm.running_var"][1:5])
    assert torch.equal(case.model.b.weight.grad, gradient[:, 1:5])
    assert case.model.b.weight.grad.dtype == torch.float32
    assert torch.equal(optimizer.state[case.model.a.weight]["exp_avg"], moment[1:5])
    case.model(case.inputs).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("error", "is_of_float32"), [(2e-5, False), (1e-2, True)])
def test_another_function_is_refused_and_nothing_is_changed(
    error: float, is_of_float32: bool
) -> None:
    case = case_of(error, is_of_float32)
    before, own = tensors_of(case.model), dict(case.model.named_parameters())
    with pytest.raises(PruneError, match=r"without its removed units outputs differ by"):
        remove_units(case.model, case.structure, case.kept_U, lambda net: net(case.inputs))
    after = case.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(tensor is own[name] for name, tensor in case.model.named_parameters())


def test_what_takes_float32_only_is_compared_in_it() -> None:
    case = case_of(2e-5)

    def run(net: nn.Module) -> Tensor:
        if net.a.weight.dtype == torch.float64:
            raise NotImplementedError("no such kernel")
        return net(case.inputs)

    with pytest.raises(
        PruneError, match=r"float64, which fails with NotImplementedError: no such kernel\)$"
    ) as refused:
        remove_units(case.model, case.structure, case.kept_U, run)
    assert refused.value.path == ""
    assert case.model.a.weight.dtype == torch.float32
    assert len(case.model.a.weight) == 6


@dataclass
class Answer:
    """Outputs that torch's trees do not know."""

    logits: Tensor


def test_outputs_may_be_anything() -> None:
    case = case_of(2e-5)
    found = remove_units(
        case.model, case.structure, case.kept_U, lambda net: Answer(net(case.inputs).float())
    )
    assert found.difference < 1e-6


def test_tensors_of_other_types_keep_them() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double(), nn.BatchNorm1d(2))
    kept_values = copy.deepcopy(model.state_dict())
    with in_float64(model, lambda net: net(torch.ones(4, 3))) as run:
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}
        assert run(model.eval()).dtype == torch.float64
        model[0].bias = nn.Parameter(torch.ones(2, dtype=torch.float64))
    after = model.state_dict()
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in kept_values.items()}
    assert torch.equal(after["0.weight"], kept_values["0.weight"])
    assert torch.equal(after["0.bias"], torch.ones(2))
