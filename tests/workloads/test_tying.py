"""Layers tied by name: what is refused, and what they are from then on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gbp_ray.config.workload import WorkloadConfig
from gbp_ray.errors import ConfigError
from gbp_ray.workloads.data import seeded
from gbp_ray.workloads.loading import load_workload
from gbp_ray.workloads.networks import build_cifar_resnet
from gbp_ray.workloads.tying import tie_weights, without_wrappers


def resnet() -> nn.Module:
    with seeded(0):
        return build_cifar_resnet(20)


def test_a_group_has_one_weight_that_of_its_first_layer() -> None:
    model, plain = resnet(), resnet()
    tie_weights(model, [["layer1.2.conv1", "layer1.0.conv2"], ["layer3.[12].conv?"]])
    shared = model.layer1[0].conv2.weight
    assert model.layer1[2].conv1.weight is shared
    assert torch.equal(shared, plain.layer1[0].conv2.weight)
    assert (
        len({id(model.layer3[n].get_parameter(f"conv{m}.weight")) for n in (1, 2) for m in (1, 2)})
        == 1
    )
    # One kernel of 16x16x3x3 and three of 64x64x3x3 less, by hand.
    total = sum(p.numel() for p in model.parameters())
    assert total == 269_722 - 16 * 16 * 9 - 3 * 64 * 64 * 9


def sequence() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()
    )
    nn.utils.parametrizations.orthogonal(model[3])
    return model


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([["layer1.0.conv2", "layer1.0.conv3"]], r"'layer1\.0\.conv3' matches no .* did you mean"),
        ([["layer9.*"]], r"'layer9\.\*' matches no convolution"),
        ([["layer1.0.bn1", "layer1.0.bn2"]], "matches no convolution or linear layer"),
        ([["layer1.0.conv2"]], r"'layer1\.0\.conv2' is alone"),
        ([["conv1", "linear"]], r"'conv1' has shape \(16, 3, 3, 3\) and 'linear' \(10, 64\)"),
        ([["layer1.*.conv1"], ["layer1.0.conv?"]], r"'layer1\.0\.conv1' is in \['layer1\.\*"),
    ],
)
def test_what_cannot_be_tied_is_refused_and_nothing_is(
    groups: list[list[str]], reason: str
) -> None:
    model = resnet()
    with pytest.raises(ConfigError, match=rf"^workload\.tie: in \[.*{reason}"):
        tie_weights(model, groups)
    assert sum(p.numel() for p in model.parameters()) == 269_722


def test_layers_of_one_shape_and_two_meanings_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of '0' and '1' is a transposed convolution"):
        tie_weights(sequence(), [["0", "1"]])
    with pytest.raises(ConfigError, match="'3' is computed from other tensors"):
        tie_weights(sequence(), [["2", "3"]])


def test_a_job_ties_what_its_factory_builds() -> None:
    factory = "gbp_ray.zoo:digits_recurrent"
    apart = WorkloadConfig(factory=factory, options={"shared": False})
    tied = apart.model_copy(update={"tie": (("layer1.kernels.*",), ("layer2.kernels.*",))})
    whole = WorkloadConfig(factory=factory)
    sizes = [
        sum(p.numel() for p in load_workload(config).build_model().parameters())
        for config in (apart, tied, whole)
    ]
    # V and W of both layers, 7 norms less one, the linear layer.
    norms, linear = 2 * 4 * (16 + 32), 32 * 10 + 10
    kernels = 9 * (16 * 16 + 32 * 32)
    drives = 9 * (16 + 16 * 32)
    assert sizes == [drives + n * kernels + norms + linear for n in (3, 1, 1)]


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Sequential(), nn.Linear(4, 2))


def test_wrappers_leave_the_names_alone() -> None:
    def build() -> nn.Module:
        model = Plain()
        model[0] = nn.DataParallel(torch.compile(model[0], backend="eager"))
        model[1] = nn.DataParallel(model[1])
        return torch.compile(nn.DataParallel(model), backend="eager")

    model = without_wrappers(build)()
    assert type(model) is Plain
    assert list(model.state_dict()) == list(Plain().state_dict())
    assert model(torch.zeros(2, 3)).shape == (2, 2)
