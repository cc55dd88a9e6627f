"""Networks and optimizers that units cannot be removed from are refused, and left as they were."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from structures import (
    Case,
    blocks,
    channels,
    compacted_twin,
    kept,
    linear,
    mask,
    randomize,
    recurrent,
    repeated,
    structure_of,
    train,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import LBFGS, Adafactor, Adam, Optimizer

from gbp_ray.errors import PruneError
from gbp_ray.pruning.removal.cutting import cut_state, shrink_structure
from gbp_ray.pruning.removal.remove import remove_units


def check_refused(case: Case, match: str, optimizer: Optimizer | None = None) -> None:
    """Holds that a refusal leaves everything as it was, objects and bits."""
    model, inputs = case.model, case.inputs
    mask(model, case.structure, case.kept_U)
    objects = dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    movement = {name: torch.ones_like(p, dtype=torch.float64) for name, p in objects.items()}
    moved = dict(movement)
    numbers = [
        (module, {k: v for k, v in vars(module).items() if isinstance(v, (int, tuple))})
        for module in model.modules()
    ]
    before = copy.deepcopy(optimizer.state_dict()) if optimizer else None
    training = model.training
    with pytest.raises(PruneError, match=match):
        remove_units(
            model, case.structure, case.kept_U, lambda m: m(inputs), optimizer=optimizer,
            movement=movement,
        )  # fmt: skip
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in objects.items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(movement[name] is value for name, value in moved.items())
    for module, values in numbers:
        assert {key: vars(module)[key] for key in values} == values
    assert model.training is training
    assert not any(m._forward_hooks for m in model.modules())
    if optimizer is not None:
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
            id(p) for p in model.parameters()
        ]
        for index, own in optimizer.state_dict()["state"].items():
            for key, value in own.items():
                assert torch.equal(value, before["state"][index][key])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.b = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


def test_a_network_that_would_compute_something_else_is_restored() -> None:
    torch.manual_seed(0)
    model = randomize(Normed())
    parts = [*channels("a", 7, norm="norm"), ("b.weight", 1, blocks(7))]
    structure = structure_of(model, parts)
    case = Case(model, torch.randn(4, 5), structure, kept(structure, [1, 4]), {})
    optimizer = Adam(model.parameters())
    train(model, optimizer, case.inputs, {}, 1)
    check_refused(case, r"'norm': .* differ.*prune\.exclude", optimizer)


def test_a_recurrent_layer_is_restored() -> None:
    torch.manual_seed(0)
    case = recurrent(nn.LSTM, 4)
    model = randomize(case.model)
    structure = structure_of(
        model,
        [(name, 0, repeated(4, 4)) for name in ("rnn.weight_ih_l1", "rnn.weight_hh_l1")]
        + [(name, 0, repeated(4, 4)) for name in ("rnn.bias_ih_l1", "rnn.bias_hh_l1")]
        + [("rnn.weight_hh_l1", 1, blocks(4)), ("fc.weight", 1, blocks(4))],
    )
    case = case._replace(structure=structure, kept_U=kept(structure, [1]))
    check_refused(case, r"'rnn': its layers are left with different numbers of units \(3, 4\)")
    assert torch.isfinite(model(case.inputs)).all()


def test_channels_that_are_missing_from_a_structure_are_named() -> None:
    torch.manual_seed(0)
    case = linear()
    randomize(case.model)
    structure = structure_of(case.model, channels("a", 7))
    case = case._replace(structure=structure, kept_U=kept(structure, [1]))
    check_refused(case, r"'b': without its removed units it fails with RuntimeError")


def parametrized(layer: nn.Linear) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    register_parametrization(layer, "weight", Doubled())


def with_hook(layer: nn.Linear) -> None:
    layer.weight.register_hook(lambda gradient: gradient)


def quantized(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.ones(7, 5, dtype=torch.int8), requires_grad=False)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.float(), layer.bias)


@pytest.mark.parametrize(
    ("change", "name", "match"),
    [
        (parametrized, "parametrizations.weight.original", "parametrization"),
        (parametrizations.weight_norm, "parametrizations.weight.original1", "parametrization"),
        (nn.utils.spectral_norm, "weight_orig", "computed from others"),
        (
            lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5),
            "weight_orig",
            "computed from others",
        ),
        (with_hook, "weight", "hooks on its gradient"),
        (quantized, "weight", "quantized"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused_by_name(
    change: Callable[[Any], Any], name: str, match: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    change(model[0])
    parts = [(f"0.{name}", 0, blocks(7)), ("0.bias", 0, blocks(7)), ("2.weight", 1, blocks(7))]
    structure = structure_of(model, parts)
    model.eval()  # spectral norm moves on in training
    case = Case(model, torch.randn(4, 5), structure, kept(structure, [2]), {})
    check_refused(case, rf"'0\.{name}': .*{match}.*prune\.compact = false")


@pytest.mark.parametrize(
    ("make", "match"),
    [(LBFGS, "LBFGS"), (Adafactor, r"optimizer state 'row_var'")],
)
def test_optimizers_whose_state_cannot_be_cut_are_refused(
    make: Callable[[Any], Optimizer], match: str
) -> None:
    torch.manual_seed(0)
    case = linear()
    randomize(case.model)
    optimizer = make(case.model.parameters())

    def closure() -> Tensor:
        loss = case.model(case.inputs).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    mask(case.model, case.structure, case.kept_U)
    with pytest.raises(PruneError, match=r"has no parameter of this network|LBFGS"):
        compacted_twin(case, optimizer=optimizer)
    with pytest.raises(PruneError, match=match):
        remove_units(
            case.model, case.structure, case.kept_U, lambda m: m(case.inputs), optimizer=optimizer
        )


def test_units_and_shapes_that_do_not_fit_are_refused() -> None:
    case = linear()
    run = lambda model: model(case.inputs)  # noqa: E731
    mask(case.model, case.structure, case.kept_U)
    small = compacted_twin(case)
    with pytest.raises(PruneError, match=r"'a\.weight': the network has \(5, 5\)"):
        remove_units(small, case.structure, case.kept_U, run)
    with pytest.raises(PruneError, match=r"must be bool of shape \(7,\)"):
        remove_units(case.model, case.structure, case.kept_U[1:], run)
    with pytest.raises(PruneError, match="all of its 7 units are removed"):
        remove_units(case.model, case.structure, np.zeros(7, dtype=bool), run)
    with pytest.raises(PruneError, match=r"'a\.weight': has 25 values of shape"):
        cut_state(case.structure, case.kept_U, {"a.weight": torch.zeros(5, 5)})
    shared = linear().model
    shared.act.extra = nn.Linear(5, 7)
    shared.act.extra.weight.data = shared.a.weight.data
    with pytest.raises(PruneError, match=r"'act\.extra\.weight': shares the memory of 'a\.weight'"):
        remove_units(shared, case.structure, case.kept_U, run)


def test_a_unit_that_shares_positions_with_a_removed_one_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    structure = structure_of(model, [("0.weight", 0, np.array([[0, 1], [1, 2]]))])
    with pytest.raises(PruneError, match="has positions of a removed one"):
        shrink_structure(structure, np.array([True, False]))


class Auxiliary(nn.Module):
    """Reads the channels in the middle, too, but only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 3)
        self.width = 7

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).view(len(x), self.width)
        return self.b(hidden) + (self.aux(hidden) if self.training else 0)


@pytest.mark.parametrize("is_found", [True, False])
def test_layers_that_only_training_calls(is_found: bool) -> None:
    torch.manual_seed(0)
    model = randomize(Auxiliary())
    parts = [*channels("a", 7), ("b.weight", 1, blocks(7))]
    parts += [("aux.weight", 1, blocks(7))] if is_found else []
    structure = structure_of(model, parts)
    case = Case(model, torch.randn(4, 5), structure, kept(structure, [1]), {})
    if not is_found:
        check_refused(case, "'aux': is called in training only, .* fails with RuntimeError")
        return
    mask(model, structure, case.kept_U)
    found = remove_units(model, structure, case.kept_U, lambda m: m(case.inputs))
    assert found.uncalled == ("aux",)
    assert found.attributes["width"] == model.width == 6
