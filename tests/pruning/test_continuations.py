"""What follows a layer, and the outputs that make up for the error of a shortcut."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from small_networks import draw, images, job_config
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.activations import find_patch_layers
from gbp_ray.pruning.continuations import Continuation, find_continuations
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.reconstruction import reconstruct


class Residual(nn.Module):
    """A block behind a stem: two layers, a norm behind the second, and its input added."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(4)
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            tensor.data.copy_(torch.rand(6, generator=generator) + 0.5)

    def block(self, hidden: Tensor) -> Tensor:
        inner = self.norm(self.second(torch.relu(self.first(hidden))))
        if self.way == "sliced":
            return inner + functional.pad(hidden[:, 1:], (0, 0, 0, 0, 1, 0))
        if self.way == "turned":
            return hidden + inner
        if self.way == "in place":
            inner += hidden
            return inner
        if self.way == "halved":
            return torch.add(inner, hidden, alpha=0.5)
        if self.way == "cut off":
            return torch.relu_(inner) + hidden
        if self.way == "moved":
            return inner + hidden.mul_(2)
        if self.way == "picked":
            return inner + hidden[torch.arange(len(hidden)), :]
        if self.way == "read again":
            summed = inner + hidden
            self.read = torch.cat([summed, hidden])
            return summed
        return inner + hidden

    def forward(self, inputs: Tensor) -> Tensor:
        summed = self.block(torch.relu(self.stem(inputs)))
        return self.head(torch.relu(summed).mean(dim=(2, 3)))


def has_norm(found: Continuation) -> bool:
    return not torch.equal(found.scale, torch.ones_like(found.scale))


def affine_of(model: Residual) -> tuple[Tensor, Tensor]:
    layers = find_patch_layers(model)
    found = find_continuations(model, layers, lambda: model(draw(2, 2, 4, 4)))["second"]
    return found.scale, found.shift


@pytest.mark.parametrize(
    "way",
    [
        *("plain", "sliced", "turned", "in place", "read again"),
        *("halved", "cut off", "moved", "picked"),
    ],
)
def test_a_sum_is_found_where_it_is_one(way: str) -> None:
    model = Residual(way).eval()
    found = find_continuations(model, find_patch_layers(model), lambda: model(draw(2, 2, 4, 4)))
    is_sum = way in ("plain", "sliced", "turned", "in place", "read again")
    assert found["second"].summand == ("first" if is_sum else None)
    assert has_norm(found["second"])
    for name in ("first", "stem", "head"):
        assert found[name].summand is None
        assert not has_norm(found[name])
    # Cut off, the layer has a ReLU of its own.
    is_free = way not in ("read again", "halved", "moved", "picked")
    assert found["second"].is_rectified == is_free
    assert found["first"].is_rectified
    assert found["stem"].is_rectified
    assert not found["head"].is_rectified
    assert not any(module._forward_hooks for module in model.modules())


def test_what_relu_hides_is_free() -> None:
    after = Continuation(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0]))
    targets = torch.tensor([[1.0, 3.0], [-1.0, 2.0], [-1.0, 0.5]])  # sums 2.5 -2, -1.5 -1, -1.5 0.5
    outputs = torch.tensor([[9.0, 5.0], [-3.0, -4.0], [0.5, 7.0]])  # sums 18.5 -4, -5.5 5, 1.5 -6
    wanted = torch.tensor([[1.0, 5.0], [-3.0, 1.0], [-0.25, 0.5]])
    assert torch.equal(after.free_below_zero(targets, outputs, None), wanted)
    # What is added to the shift and taken from the summand leaves the sums as they are.
    summand = torch.tensor([[0.2, -0.3]])
    shifted = Continuation(after.scale, after.shift - summand[0])
    torch.testing.assert_close(shifted.free_below_zero(targets, outputs, summand), wanted)


def test_norms_that_use_the_statistics_of_the_batch_are_none() -> None:
    model = Residual().train()
    layers = find_patch_layers(model)
    found = find_continuations(model, layers, lambda: model(draw(2, 2, 4, 4)))["second"]
    assert not has_norm(found)
    assert found.summand is None


def test_a_norm_over_tokens_does_not_scale_the_outputs_of_a_linear_layer() -> None:
    for shape, is_scaled in (((4, 6), True), ((4, 6, 6), False)):
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
        found = find_continuations(model, find_patch_layers(model), partial(model, draw(*shape)))
        assert has_norm(found["0"]) == is_scaled


def test_scale_and_shift_are_those_of_layer_and_norm() -> None:
    model = Residual().eval()
    scale, shift = affine_of(model)
    hidden = draw(3, 5, 4, 4)
    expected = model.norm(model.second(hidden))
    product = functional.conv2d(hidden, model.second.weight)
    torch.testing.assert_close(product * scale[:, None, None] + shift[:, None, None], expected)


@pytest.mark.parametrize("way", ["plain", "sliced"])
def test_the_last_layer_of_a_block_makes_up_for_the_error_of_its_shortcut(way: str) -> None:
    """After a training that moved norms and biases, too, sums come as near as they can."""
    workload = images(partial(Residual, way), num_train=24)
    prune = job_config(
        prune={
            "criterion": "magnitude",
            "reconstruct": "least_squares",
            "reconstruct_damping": 0.0,
            "reconstruct_positions": 0,
            "reconstruct_relu_steps": 0,
            "calibration_examples": 24,
            "calibration_augment": False,
        }
    ).prune
    torch.manual_seed(0)
    dense = Residual(way).eval()
    model = copy.deepcopy(dense)
    for parameter in (model.norm.weight, model.norm.bias, model.second.bias):
        parameter.data.mul_(1.2)
    model.norm.running_var.mul_(0.8)
    stem = torch.ones_like(model.stem.weight, dtype=torch.bool)
    stem[::2, 0] = False
    second = draw(*model.second.weight.shape) > 0
    masks = {"stem.weight": stem, "second.weight": second}
    MaskSet(masks).apply_(model)
    reconstruct(
        *(model, dense, workload, prune, Ranks()),
        masks=masks,
        kept_rows={},
        dense_weights=dict(dense.named_parameters()),
    )
    with torch.no_grad():
        inputs = workload.train[0]
        shortcut, wanted = (torch.relu(net.stem(inputs)) for net in (model, dense))
        rows = torch.relu(model.first(shortcut)).movedim(1, -1).reshape(-1, 5).double()
        added = shortcut
        if way == "sliced":
            added = torch.cat([torch.zeros_like(shortcut[:, :1]), shortcut[:, 1:]], dim=1)
        target = dense.block(wanted) - added
        scale, shift = affine_of(model)
        outputs = ((target.movedim(1, -1).reshape(-1, 6) - shift) / scale).double()
        for row, kept in enumerate(second.flatten(1)):
            solution = torch.linalg.lstsq(rows[:, kept], outputs[:, row : row + 1]).solution
            found = model.second.weight[row].flatten()[kept]
            torch.testing.assert_close(found.double(), solution[:, 0], atol=1e-4, rtol=1e-4)
