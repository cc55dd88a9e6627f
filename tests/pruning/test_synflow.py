from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from oracles import assert_scores, config_of, flat, tiny
from small_networks import (
    ConvNet,
    SharedWeightNet,
    built,
    draw,
    float64_by_default,
    images,
    in_float64,
    scores_of,
)
from torch import Tensor, nn

from gbp_ray.errors import PruneError


def relu_net(*sizes: int, bias: bool = False) -> nn.Module:
    layers = [
        layer
        for i in range(len(sizes) - 1)
        for layer in (nn.Linear(sizes[i], sizes[i + 1], bias=bias), nn.ReLU())
    ]
    return nn.Sequential(*layers[:-1])


def assert_flow_is_conserved(scores: Mapping[str, Tensor]) -> None:
    sums = torch.stack([values.double().sum() for values in scores.values()])
    assert sums.min() > 0
    torch.testing.assert_close(sums, sums[0].expand_as(sums), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_synflow_is_the_flow_over_all_paths_through_a_weight(bias: bool) -> None:
    model = built(lambda: relu_net(3, 5, 4, 2, bias=bias))
    scores = scores_of(model, tiny(), config_of("synflow"))
    matrices = [layer.weight.detach().double().abs() for layer in (model[0], model[2], model[4])]
    into = [torch.ones(3, dtype=torch.float64)]
    out_of = [torch.ones(2, dtype=torch.float64)]
    for matrix in matrices:
        into.append(matrix @ into[-1])
    for matrix in reversed(matrices):
        out_of.insert(0, matrix.T @ out_of[0])
    flows = [
        out_of[i + 1][:, None] * matrix * into[i][None, :] for i, matrix in enumerate(matrices)
    ]
    expected_N = torch.cat([flow.reshape(-1) for flow in flows])
    assert_scores(scores, expected_N / expected_N.max() * flat(scores).max())
    assert_flow_is_conserved(scores)


@pytest.mark.parametrize("is_fresh", [True, False])
def test_synflow_is_conserved_with_biases_and_batchnorm(is_fresh: bool) -> None:
    model = built(ConvNet)
    if not is_fresh:
        with torch.no_grad():
            for number, norm in enumerate((model.norm1, model.norm2)):
                norm.weight.copy_(draw(8, seed=number))
                norm.bias.copy_(draw(8, seed=number + 2))
                norm.running_mean.copy_(draw(8, seed=number + 4))
                norm.running_var.copy_(draw(8, seed=number + 6).square())
    scores = scores_of(model, images(), config_of("synflow"))
    assert list(scores) == ["conv1.weight", "conv2.weight", "head.weight"]
    assert_flow_is_conserved(scores)


def test_synflow_does_not_depend_on_the_data() -> None:
    model = built(ConvNet)
    one, other = images(num_train=46), images(num_train=5)
    pixels, labels = other.train
    other = dataclasses.replace(other, train=(pixels * torch.nan, labels))
    first = scores_of(model, one, config_of("synflow"), seed=0)
    second = scores_of(model, other, config_of("synflow", calibration_examples=1), seed=1)
    assert torch.equal(flat(first), flat(second))


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e-3])
def test_synflow_stays_finite_through_sixty_layers(factor: float) -> None:
    model = built(lambda: relu_net(3, *[16] * 59, 2))
    unscaled = scores_of(model, tiny(), config_of("synflow"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    scores = scores_of(model, tiny(), config_of("synflow"))
    assert len(scores) == 60
    assert bool(torch.isfinite(flat(scores)).all())
    assert_flow_is_conserved(scores)
    # A factor common to all weights changes the order of none.
    share, unscaled_share = (flat(s) / flat(s).max() for s in (scores, unscaled))
    torch.testing.assert_close(share, unscaled_share, rtol=1e-3, atol=1e-9)


def narrowing(cast: Callable[[Tensor], Tensor]) -> nn.Module:
    """A network that casts what it meets, as to the dtype that inputs usually have."""
    model = relu_net(3, 5, 2)
    model[0].register_forward_pre_hook(lambda module, inputs: (cast(inputs[0]),))
    model[1].register_forward_hook(lambda module, inputs, hidden: cast(hidden))
    return model


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "named": lambda x: x.to(dtype=torch.float16, copy=True),
    "state": lambda x: x @ torch.eye(x.shape[1]) + torch.zeros(x.shape[1], dtype=torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
def test_synflow_passes_casts_in_float64(cast: str) -> None:
    plain, casting = built(lambda: relu_net(3, 5, 2)), built(lambda: narrowing(CASTS[cast]))
    expected = scores_of(plain, tiny(), config_of("synflow"))
    found = scores_of(casting, tiny(), config_of("synflow"))
    assert torch.equal(flat(found), flat(expected))
    assert torch.get_default_dtype() is torch.float32


def test_what_cannot_pass_in_float64_is_told_with_the_criterion() -> None:
    kept_aside = {size: torch.eye(size) for size in (3, 5)}
    model = built(lambda: narrowing(lambda x: x @ kept_aside[x.shape[1]]))
    with pytest.raises(PruneError, match=r"^prune\.criterion = synflow: .* in float64, and that"):
        scores_of(model, tiny(), config_of("synflow"))


def test_synflow_of_a_network_without_any_path_is_zero() -> None:
    model = built(lambda: relu_net(3, 4, 2))
    with torch.no_grad():
        model[2].weight.zero_()
    assert not flat(scores_of(model, tiny(), config_of("synflow"))).any()


def test_synflow_of_a_tied_weight_flows_through_all_its_uses() -> None:
    model = in_float64(SharedWeightNet)
    weight = model.first.weight.detach().abs().requires_grad_()
    with float64_by_default():
        flow = (torch.tanh(torch.ones(1, 3) @ weight.T) @ weight.T).sum()
    (gradient,) = torch.autograd.grad(flow, weight)
    expected_N = (weight * gradient).detach().reshape(-1)
    scores = scores_of(model, tiny(num_outputs=3), config_of("synflow"))
    assert_scores(scores, expected_N / expected_N.max() * flat(scores).max())
