from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_networks import ConvNet, built, draw
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import PruneError
from gbp_ray.export.fold import fold_batchnorm
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.workloads.images import import_vision
from gbp_ray.workloads.networks import RecurrentConvNet, build_cifar_resnet
from gbp_ray.workloads.tying import tie_weights


class Rerun(nn.Module):
    """One layer and one norm, always together, used twice; the norm has no affine part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(images)))
        return self.norm(self.conv(hidden))


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def mobilenet() -> nn.Module:
    # Depthwise convolutions and BatchNorm in branches.
    return import_vision("models").mobilenet_v3_small(num_classes=10)


def resnet18() -> nn.Module:
    return import_vision("models").resnet18(num_classes=10)


FOLDED: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (ConvNet, (5, 2, 6, 6)),
    (lambda: build_cifar_resnet(20), (3, 3, 16, 16)),
    (Rerun, (3, 4, 5, 5)),
    (transposed, (3, 4, 5, 5)),
    (linear, (9, 4, 4, 4)),
    (mobilenet, (2, 3, 64, 64)),
    (resnet18, (2, 3, 64, 64)),
]


def lived_in(build: Callable[[], nn.Module]) -> nn.Module:
    """Gives every BatchNorm statistics and an affine part as after a training."""
    model = built(build)
    with torch.no_grad():
        for number, norm in enumerate(model.modules()):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                size = norm.num_features
                norm.running_mean.copy_(0.3 * draw(size, seed=number))
                norm.running_var.copy_(0.5 + draw(size, seed=number + 1).abs())
                if norm.affine:
                    norm.weight.copy_(1 + 0.2 * draw(size, seed=number + 2))
                    norm.bias.copy_(0.2 * draw(size, seed=number + 3))
    return model.train()


@pytest.mark.parametrize(("build", "shape"), FOLDED)
def test_a_folded_network_computes_the_same_with_the_same_sparsity(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = lived_in(build)
    masks = MaskSet(
        {
            unit.name: draw(*unit.parameter.shape, seed=n) > 0.5
            for n, unit in enumerate(prunable_parameters(model))
        }
    )
    masks.apply_(model)
    kept = copy.deepcopy(model.state_dict())
    inputs = draw(*shape, seed=7)
    folded = fold_batchnorm(model, lambda network: network(inputs))
    with torch.no_grad():
        expected, found = copy.deepcopy(model).eval()(inputs), folded(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert type(folded) is type(model)
    # The model itself is as it was.
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])
    assert masks.find_revived(folded) is None
    for name, mask in masks.items():
        assert torch.count_nonzero(folded.get_parameter(name)) == mask.sum()


class Norm(nn.Module):
    """One way or another to meet a BatchNorm."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=way != "untracked")

    def forward(self, images: Tensor) -> Tensor:
        if self.way == "before":
            return self.conv(torch.relu(self.norm(images)))
        hidden = self.conv(images)
        if self.way == "used twice":
            return self.norm(hidden) + hidden
        if self.way == "read":
            return self.norm(hidden) + self.conv.weight.sum()
        if self.way == "opened":
            return functional.batch_norm(hidden, self.norm.running_mean, self.norm.running_var)
        if self.way == "by value" and hidden.sum() > 0:
            return hidden
        return self.norm(hidden)


def recurrent() -> nn.Module:
    return RecurrentConvNet(1, 10, 4, 2, True)


def tied() -> nn.Module:
    model = build_cifar_resnet(20)
    tie_weights(model, [["layer1.*.conv2"]])
    return model


REFUSED = [
    (nn.ReLU, "the network has none"),
    (lambda: Norm("untracked"), "'norm' cannot be folded: it keeps no running statistics"),
    (lambda: Norm("before"), "'norm' cannot be folded: it follows 'images', not one convolution"),
    (lambda: Norm("used twice"), "'conv' or what it computes is used by others"),
    (lambda: Norm("read"), "'conv' or what it computes is used by others"),
    (lambda: Norm("opened"), "its tensors are used otherwise"),
    (lambda: Norm("by value"), r"torch\.fx cannot read the network's graph \(TraceError"),
    (recurrent, r"'layer1\.norms\.0' cannot be folded: 'layer1\.drive' or what it computes"),
    (tied, r"'layer1\.0\.bn2' .*'layer1\.0\.conv2' shares its weight with 'layer1\.1\.conv2'"),
    (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), "'1' .* it follows ReLU"),
]


@pytest.mark.parametrize(("build", "reason"), REFUSED)
def test_what_cannot_be_folded_is_refused_with_its_reason(
    build: Callable[[], nn.Module], reason: str
) -> None:
    with pytest.raises(PruneError, match=reason):
        fold_batchnorm(built(build), lambda network: network(draw(2, 4, 8, 8)))


def test_a_norm_over_the_steps_of_a_sequence_is_not_folded_into_their_layer() -> None:
    """It scales steps; that there are as many of them as features hides it."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    with pytest.raises(PruneError, match=r"'1' .* scales axis 1 of \(2, 5, 5\)"):
        fold_batchnorm(lived_in(lambda: model), lambda network: network(draw(2, 5, 4)))
    assert fold_batchnorm(model, lambda network: network(draw(2, 4))) is not model
