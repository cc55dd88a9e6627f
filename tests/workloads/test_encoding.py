"""Encodings in front of a network: codes by hand, networks that stay the same functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gbp_ray.config.workload import EncodingConfig, WorkloadConfig
from gbp_ray.errors import ConfigError, WorkloadError
from gbp_ray.workloads import digits_convnet
from gbp_ray.workloads.checks import check_workload
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import seeded, take_batch
from gbp_ray.workloads.encoding import Levels, encode_network
from gbp_ray.workloads.loading import load_workload

MEAN, DEVIATION = torch.tensor([0.4, 0.5]).view(2, 1, 1), torch.tensor([0.2, 0.3]).view(2, 1, 1)
LOW, HIGH = -MEAN / DEVIATION, (1 - MEAN) / DEVIATION


def intensities(num: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (num, 2, 8, 8), generator=generator) / 255


def convnet() -> nn.Module:
    with seeded(3):
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
        )


def perceptron() -> nn.Module:
    with seeded(3):
        return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 3))


def encoded(network: nn.Module, kind: str, **fields: Any) -> nn.Module:
    config = EncodingConfig(kind=kind, **fields)
    example = LOW + (HIGH - LOW) * intensities(1)
    return encode_network(network, config, LOW, HIGH, example)


# -- codes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [2, 5, 16])
def test_codes_are_what_the_paper_says(num_levels: int) -> None:
    values = [0.0, 0.04, 0.25, 0.5, 0.5001, 0.99, 1.0]
    inputs = torch.tensor(values).view(1, 1, 1, -1)
    one_hot = Levels(num_levels, is_one_hot=True)(inputs)
    thermometer = Levels(num_levels, is_one_hot=False)(inputs)
    for column, value in enumerate(values):
        level = min(num_levels - 1, math.floor(value * num_levels))
        expected = [float(k == level) for k in range(num_levels)]
        assert one_hot[0, :, 0, column].tolist() == expected
        expected = [float(k <= level) for k in range(num_levels)]
        assert thermometer[0, :, 0, column].tolist() == expected


def test_bytes_on_an_edge_go_up_however_they_were_rounded() -> None:
    """255 = 15 * 17: every 17th byte lies on an edge of 15 levels."""
    raw = torch.arange(256).view(1, 1, 1, -1).float() / 255
    there_and_back = ((raw - 0.485) / 0.229 - (0 - 0.485) / 0.229) * 0.229
    assert not torch.equal(raw, there_and_back)
    code = Levels(15, is_one_hot=True)
    assert torch.equal(code(raw), code(there_and_back))
    assert code(raw).argmax(dim=1).flatten().tolist() == [
        min(14, b * 15 // 255) for b in range(256)
    ]


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [convnet, perceptron])
@pytest.mark.parametrize("kind", ["thermometer", "one_hot"])
def test_an_encoded_network_starts_as_the_same_function_of_quantised_inputs(
    build: Any, kind: str
) -> None:
    num_levels = 4  # no byte lies on an edge of it
    raw = intensities()
    middles = (torch.floor(raw * num_levels).clamp(max=num_levels - 1) + 0.5) / num_levels
    expected = build()(LOW + (HIGH - LOW) * middles)
    found = encoded(build(), kind, levels=num_levels)(raw)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_normalising_in_the_network_is_normalising_before_it() -> None:
    raw = intensities()
    expected = convnet()((raw - MEAN) / DEVIATION)
    torch.testing.assert_close(encoded(convnet(), "normalise")(raw), expected)
    own = encoded(convnet(), "normalise", mean=(0.1,), deviation=(0.5, 2.0))(raw)
    scale = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    torch.testing.assert_close(own, convnet()((raw - 0.1) / scale))
    torch.testing.assert_close(
        encoded(convnet(), "normalise", mean=(0.1,))(raw), convnet()(raw - 0.1)
    )


@pytest.mark.parametrize("kind", ["normalise", "thermometer", "one_hot"])
def test_an_encoding_has_no_weights_and_is_saved_with_the_network(kind: str) -> None:
    network = encoded(convnet(), kind)
    assert all(name.startswith("network.") for name, _ in network.named_parameters())
    other = encoded(convnet(), kind, **({"mean": (9.0,)} if kind == "normalise" else {}))
    for buffer in other.encoding.buffers():
        buffer.zero_()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(intensities()), network(intensities()))


@pytest.mark.parametrize("kind", ["thermometer", "one_hot"])
def test_steps_pass_a_gradient_to_whoever_attacks(kind: str) -> None:
    raw = intensities().requires_grad_()
    network = encoded(convnet(), kind, levels=16)
    (gradient,) = torch.autograd.grad(network(raw)[:, 0].sum(), raw)
    plain = intensities().requires_grad_()
    (expected,) = torch.autograd.grad(convnet()(LOW + (HIGH - LOW) * plain)[:, 0].sum(), plain)
    # The network starts as the same function, so its ramps must point the same way.
    inside = (plain > 0.2) & (plain < 0.8)
    same = (gradient.sign() == expected.sign())[inside].float().mean()
    assert same > 0.95
    assert (gradient != 0)[inside].float().mean() > 0.95


# -- workloads -------------------------------------------------------------------------------------


def load(kind: str, factory: str = "gbp_ray.zoo:digits_convnet", **options: Any) -> Workload:
    encoding = {"kind": kind, "levels": 16}
    return load_workload(WorkloadConfig(factory=factory, encoding=encoding, options=options))


@pytest.mark.parametrize("kind", ["normalise", "thermometer", "one_hot"])
def test_an_encoded_workload_gives_intensities_to_a_network_that_takes_them(kind: str) -> None:
    workload = load(kind)
    inputs, _ = take_batch(workload, workload.train, torch.arange(20))
    raw = digits_convnet().train[0][:20]
    assert torch.equal(inputs, raw / 16)
    assert workload.input_range == (0.0, 1.0)
    model = workload.build_model()
    check_workload(workload, model, 8)
    if kind != "normalise":
        assert model.network.conv1.weight.shape == (32, 16, 3, 3)


def test_networks_without_a_first_layer_to_widen_are_refused() -> None:
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten())
    pooled = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 4, 3), nn.Flatten())
    rows = nn.Linear(8, 2)
    with torch.device("meta"):
        blank = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten())
    for network, words in (
        (grouped, "'0' takes the input, but its weight is tied"),
        (pooled, "no convolution or linear layer"),
        (rows, "takes the input, but its weight"),
        (blank, "not on the meta device"),
    ):
        with pytest.raises(WorkloadError, match=words):
            encoded(network, "thermometer")


def test_a_workload_must_say_its_range_before_it_is_encoded(monkeypatch: Any) -> None:
    import gbp_ray.zoo as zoo

    def silent() -> Workload:
        return Workload(convnet, (intensities(), torch.zeros(6)), (intensities(), torch.zeros(6)))

    monkeypatch.setattr(zoo, "silent", silent, raising=False)
    with pytest.raises(ConfigError, match=r"workload\.encoding\.kind: needs .*input_range"):
        load("thermometer", "gbp_ray.zoo:silent")
