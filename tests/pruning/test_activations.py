"""Rows of layers' inputs against the layers themselves, and passes that stop in step."""

from __future__ import annotations

import threading

import pytest
import torch
from small_networks import draw
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from gbp_ray.errors import PruneError
from gbp_ray.pruning.activations import (
    Lane,
    PatchLayer,
    find_patch_layers,
    in_step,
    outputs_at,
    rows_of,
)

LAYERS: dict[str, tuple[PatchLayer, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear over tokens": (nn.Linear(5, 3), (4, 7, 5)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6)),
    "strides": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1)), (2, 4, 7, 6)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same"), (2, 4, 6, 6)),
    "depthwise": (nn.Conv1d(4, 8, 3, groups=4, padding="valid"), (3, 4, 9)),
    "even kernel": (nn.Conv1d(2, 3, 4, padding="same", dilation=2), (3, 2, 9)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    "reflected": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 2, 5)),
    "volumes": (nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 2, 4, 5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_are_the_outputs(name: str) -> None:
    layer, shape = LAYERS[name]
    inputs = draw(*shape)
    rows = rows_of(layer, inputs)
    weight = layer.weight.detach().flatten(1).unflatten(0, (rows.shape[1], -1))
    found = torch.einsum("rkc,kmc->rkm", rows, weight).flatten(1)
    outputs = layer(inputs)
    channel = outputs.ndim - 1 if isinstance(layer, nn.Linear) else 1
    bias = layer.bias.view([-1 if axis == channel else 1 for axis in range(outputs.ndim)])
    expected = (outputs - bias).movedim(channel, -1).reshape(-1, len(layer.bias))
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["strides", "linear over tokens", "volumes"])
def test_drawn_rows_are_some_of_all_and_the_same_for_each_network(name: str) -> None:
    layer, shape = LAYERS[name]
    inputs = draw(*shape)
    every = rows_of(layer, inputs).unflatten(0, (shape[0], -1))
    drawn = rows_of(layer, inputs, most=3, seed=5).unflatten(0, (shape[0], -1))
    assert drawn.shape[1] == 3
    places = [
        [
            next(place for place, row in enumerate(of_example) if torch.equal(row, wanted))
            for wanted in chosen
        ]
        for of_example, chosen in zip(every, drawn, strict=True)
    ]
    assert all(of_example == sorted(set(of_example)) for of_example in places)
    assert any(of_example != places[0] for of_example in places)
    assert torch.equal(rows_of(layer, 2 * inputs, 3, 5), 2 * rows_of(layer, inputs, 3, 5))
    assert not torch.equal(rows_of(layer, inputs, 3, 5), rows_of(layer, inputs, 3, 6))
    assert torch.equal(rows_of(layer, inputs, most=10_000), rows_of(layer, inputs))
    weight = layer.weight.detach().flatten(1)
    outputs = outputs_at(layer, layer(inputs), 3, 5) - layer.bias
    expected = drawn.flatten(0, 1)[:, 0] @ weight.T
    torch.testing.assert_close(outputs.detach(), expected, atol=1e-5, rtol=1e-5)


def test_layers_of_tied_and_parametrized_weights_are_left_out() -> None:
    model = nn.ModuleDict(
        {
            "own": nn.Linear(3, 3),
            "first": nn.Linear(3, 3),
            "second": nn.Linear(3, 3),
            "normed": weight_norm(nn.Linear(3, 3)),
            "turned": nn.ConvTranspose2d(3, 3, 1),
        }
    )
    model["second"].weight = model["first"].weight
    model["again"] = shared = nn.Linear(3, 3)
    model["and again"] = shared
    assert list(find_patch_layers(model)) == ["own"]


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs))
        if inputs.sum() > 100:  # a way of its own
            return hidden
        return self.second(functional.dropout(hidden))


def lanes_of(model: Steps, batches: list[Tensor], outputs: dict[int, Tensor]) -> list[Lane]:
    def run(number: int) -> None:
        outputs[number] = model(batches[number])

    return [
        Lane(
            {"first": model.first, "second": model.second},
            lambda number=number: run(number),
            lambda stretch, number=number: torch.manual_seed(100 * number + stretch),
        )
        for number in range(len(batches))
    ]


def test_a_layer_that_changes_at_the_stop_is_what_later_layers_see() -> None:
    model, batches = Steps(), [draw(3, 4, seed=seed) for seed in range(3)]
    before = model.first.weight.detach().clone()
    outputs: dict[int, Tensor] = {}
    seen: list[tuple[str, list[Tensor]]] = []

    def meet(name: str, inputs: list[Tensor]) -> None:
        seen.append((name, inputs))
        if name == "first":
            model.first.weight.mul_(2)

    in_step(lanes_of(model, batches, outputs), meet)
    assert [name for name, _ in seen] == ["first", "second"]
    for number, batch in enumerate(batches):
        assert seen[0][1][number] is batch
        hidden = torch.relu(functional.linear(batch, 2 * before, model.first.bias))
        torch.manual_seed(100 * number + 1)
        torch.testing.assert_close(seen[1][1][number], functional.dropout(hidden))
        assert not outputs[number].requires_grad
    assert not model.first._forward_pre_hooks


def test_ways_that_depend_on_inputs_and_failures_are_raised_and_leave_no_thread() -> None:
    model, before = Steps(), threading.active_count()
    with pytest.raises(PruneError, match="'second' and the end"):
        in_step(lanes_of(model, [draw(2, 4), 1e4 + draw(2, 4)], {}), lambda name, inputs: None)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        in_step(lanes_of(model, [draw(2, 4), draw(2, 5)], {}), lambda name, inputs: None)

    def fail(name: str, inputs: list[Tensor]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_step(lanes_of(model, [draw(2, 4), draw(2, 4)], {}), fail)
    assert threading.active_count() == before
    assert not model.first._forward_pre_hooks


def test_a_layer_that_is_called_twice_is_refused() -> None:
    layer = nn.Linear(3, 3)
    lanes = [Lane({"layer": layer}, lambda: layer(layer(draw(2, 3))))]
    with pytest.raises(PruneError, match="'layer': is called more than once"):
        in_step(lanes, lambda name, inputs: None)
