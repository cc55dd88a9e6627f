"""The criteria's formulas, on the whole data at once or one example after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from small_networks import TanhNet, draw, prune_config, regression
from torch import Tensor, nn
from torch.func import functional_call

from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.workloads.contract import Workload

BATCH_SIZE = 4
NUM_EXAMPLES = 10  # Batches of 4, 4 and 2.
GRADIENT_CRITERIA = ["taylor", "snip", "taylor_squared", "fisher", "obd", "grasp"]
LAYER_CRITERIA = ["wanda", "obs", "kfac"]
DATA_FREE_CRITERIA = ["magnitude", "random", "synflow"]


def config_of(name: str, **fields: Any) -> Any:
    return prune_config(name, **{"calibration_batch_size": BATCH_SIZE, **fields})


def tiny(build: Callable[[], nn.Module] = TanhNet, num_outputs: int = 2) -> Workload:
    inputs = draw(NUM_EXAMPLES, 3, seed=1, dtype=torch.float64)
    targets = draw(NUM_EXAMPLES, num_outputs, seed=2, dtype=torch.float64)
    return regression(build, inputs, targets)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().reshape(-1) for name in sorted(tensors)]).double()


def weights_of(model: nn.Module) -> Tensor:
    return flat({unit.name: unit.parameter for unit in prunable_parameters(model)})


def loss_of_weights(
    model: nn.Module, workload: Workload, inputs: Tensor, targets: Tensor
) -> Callable[[Tensor], Tensor]:
    """The mean loss as a function of the flat prunable weights."""
    units = prunable_parameters(model)

    def loss(weights_N: Tensor) -> Tensor:
        pieces = weights_N.split([unit.parameter.numel() for unit in units])
        replaced = {
            unit.name: piece.view_as(unit.parameter)
            for unit, piece in zip(units, pieces, strict=True)
        }
        return workload.loss(functional_call(model, replaced, (inputs,)), targets)

    return loss


def gradient_of(model: nn.Module, workload: Workload, inputs: Tensor, targets: Tensor) -> Tensor:
    weights_N = weights_of(model).requires_grad_()
    loss = loss_of_weights(model, workload, inputs, targets)(weights_N)
    return torch.autograd.grad(loss, weights_N)[0]


def hessian_of(model: nn.Module, workload: Workload, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = loss_of_weights(model, workload, inputs, targets)
    return torch.autograd.functional.hessian(loss, weights_of(model))


def mean_square_of_example_gradients(model: nn.Module, workload: Workload) -> Tensor:
    inputs, targets = workload.train
    squares = [
        gradient_of(model, workload, inputs[i : i + 1], targets[i : i + 1]).square()
        for i in range(len(inputs))
    ]
    return torch.stack(squares).mean(dim=0)


def recorded(workload: Workload) -> tuple[Workload, list[Tensor]]:
    """The same workload, and a list that receives the inputs of each batch that is fetched."""
    batches: list[Tensor] = []

    def prepare(inputs: Tensor) -> Tensor:
        batches.append(inputs.clone())
        return inputs

    return dataclasses.replace(workload, prepare=prepare), batches


def positions_of(batch: Tensor, workload: Workload) -> Tensor:
    """Where the rows of a batch stand in the training data."""
    matches = (batch.flatten(1)[:, None] == workload.train[0].flatten(1)[None]).all(dim=2)
    assert bool((matches.sum(dim=1) == 1).all())
    return matches.int().argmax(dim=1)


def assert_scores(scores: Mapping[str, Tensor], expected_N: Tensor, rtol: float = 2e-6) -> None:
    """Scores are float32: equal up to their rounding."""
    assert expected_N.abs().max() > 0
    atol = 1e-7 * float(expected_N.abs().max())
    torch.testing.assert_close(flat(scores), expected_N.double(), rtol=rtol, atol=atol)
