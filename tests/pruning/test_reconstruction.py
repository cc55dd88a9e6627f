"""Refitted weights against numpy's least squares, layer by layer and through a whole network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_networks import ConvNet, draw, images, job_config
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.reconstruction import (
    check_reconstruction,
    layers_to_refit,
    least_squares,
    reconstruct,
)
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import derive_seed, shuffled_indices


def lstsq(
    x: np.ndarray, y: np.ndarray, kept: np.ndarray, start: np.ndarray, damping: float
) -> np.ndarray:
    """Solves by numpy for one output: the damping is further rows of the same system."""
    strength = np.sqrt(damping * np.mean(np.sum(x**2, axis=0)))
    rows = np.concatenate([x[:, kept], strength * np.eye(kept.sum())])
    wanted = np.concatenate([y, strength * start[kept]])
    solution = np.zeros(len(kept))
    solution[kept] = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return solution


@pytest.mark.parametrize("damping", [0.0, 0.01, 10.0])
def test_a_solution_is_that_of_numpy(damping: float) -> None:
    x, y, start = (draw(*shape, seed=3).double() for shape in ((40, 6), (40, 5), (2, 6)))
    support = torch.tensor([True, False, True, True, False, True])
    found = least_squares(x.T @ x, x.T @ y, torch.tensor([1, 4]), support, start, damping)
    for row, column in enumerate((1, 4)):
        wanted = lstsq(
            *(x.numpy(), y[:, column].numpy(), support.numpy(), start[row].numpy(), damping)
        )
        np.testing.assert_allclose(found[row].numpy(), wanted, atol=1e-10)


def test_inputs_that_decide_nothing() -> None:
    x = draw(10, 3).double()
    twice = torch.cat([x, x], dim=1)
    moments, support = (twice.T @ twice, twice.T @ draw(10, 1).double()), torch.ones(6).bool()
    start, only = draw(1, 6), torch.tensor([0])
    with pytest.raises(PruneError, match=r"reconstruct_damping: .* linearly dependent"):
        least_squares(moments[0], moments[1], only, support, start, 0.0)
    assert torch.isfinite(least_squares(moments[0], moments[1], only, support, start, 1e-6)).all()
    nothing = (torch.zeros(6, 6).double(), torch.zeros(6, 1).double())
    assert torch.equal(least_squares(*nothing, only, support, start, 0.1).float(), start)
    assert not least_squares(*moments, only, ~support, start, 0.1).any()


def columns_of(layer: nn.Module, inputs: Tensor) -> np.ndarray:
    """Returns the patches of a layer's inputs by torch's own unfolding."""
    if isinstance(layer, nn.Linear):
        return inputs.double().numpy()
    assert isinstance(layer, nn.Conv2d)
    unfolded = functional.unfold(inputs, layer.kernel_size, padding=layer.padding)
    return unfolded.transpose(1, 2).flatten(0, 1).double().numpy()


def test_each_layer_of_a_network_is_refitted_behind_refitted_layers() -> None:
    """The other way is a whole pass of all examples for each layer."""
    workload = images(lambda: ConvNet(dropout=0.0), num_train=23)
    prune = job_config(
        prune={
            "criterion": "magnitude",
            "reconstruct": "least_squares",
            "calibration_examples": 20,
            "calibration_batch_size": 6,
            "calibration_augment": False,
            "reconstruct_positions": 0,
            "reconstruct_damping": 0.02,
        }
    ).prune
    torch.manual_seed(0)
    dense = workload.build_model().eval()
    names = ["conv1", "conv2", "head"]
    masks = {f"{n}.weight": draw(*dense.get_parameter(f"{n}.weight").shape) > 0 for n in names}
    model = copy.deepcopy(dense)
    MaskSet(masks).apply_(model)

    expected = copy.deepcopy(model)
    order = shuffled_indices(23, derive_seed(7, "calibration"))[:20]
    examples = workload.train[0][order]
    for name in names:
        seen: dict[nn.Module, Tensor] = {}
        for network in (dense, expected):
            network.get_submodule(name).register_forward_hook(
                lambda module, given, output, of=network, seen=seen: seen.update({of: given[0]})
            )
            with torch.no_grad():
                network(examples)
        layer, key = expected.get_submodule(name), f"{name}.weight"
        x = columns_of(layer, seen[expected])
        original = dense.get_parameter(key).detach().flatten(1).double().numpy()
        y = columns_of(layer, seen[dense]) @ original.T
        mask = masks[key].flatten(1).numpy()
        rows = [lstsq(x, y[:, r], mask[r], original[r], 0.02) for r in range(len(mask))]
        weight = expected.get_parameter(key)
        weight.data.copy_(torch.from_numpy(np.stack(rows)).view_as(weight))

    before = {name: value.clone() for name, value in dense.state_dict().items()}
    reconstruct(
        *(model, dense, workload, prune, Ranks()),
        masks=masks,
        kept_rows={},
        dense_weights=dict(dense.named_parameters()),
        seed=7,
    )
    for name in names:
        torch.testing.assert_close(
            *(net.get_parameter(f"{name}.weight") for net in (model, expected)),
            atol=2e-5,
            rtol=1e-4,
        )
        assert torch.equal(model.get_parameter(f"{name}.weight") != 0, masks[f"{name}.weight"])
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_batchnorm_statistics_stay_as_the_weights_are_fitted_to_them() -> None:
    job = job_config(prune={"criterion": "magnitude", "reconstruct": "least_squares"})
    states = list(run_rounds(job, images(), Ranks()))
    assert torch.equal(states[1].model.get_buffer("norm1.running_mean"), torch.zeros(8))
    assert states[1].record.score_recalibrated is None


def error_of(workload: Workload, **prune: object) -> float:
    """Prunes once without training; measures how far the outputs are from the dense network's."""
    job = job_config(
        pretrain={"epochs": 2, "batch_size": 12},
        prune={
            "criterion": "magnitude",
            "sparsity": 0.5,
            "calibration_examples": 46,
            **prune,
        },
    )
    examples, outputs = workload.train[0], []
    for state in run_rounds(job, workload, Ranks()):
        with torch.no_grad():
            outputs.append(state.model.eval()(examples))
    return float((outputs[1] - outputs[0]).square().mean())


@pytest.mark.parametrize(
    "prune", [{}, {"scope": "layer"}, {"granularity": "2:4"}, {"granularity": "channel"}], ids=str
)
def test_a_pruned_network_comes_nearer_to_the_dense_one(prune: dict[str, object]) -> None:
    workload = images(lambda: ConvNet(dropout=0.0))
    if prune.get("granularity") == "2:4":
        prune = {**prune, "exclude": ["conv1.weight"]}
    refitted = error_of(workload, **prune, reconstruct="least_squares")
    assert refitted < 0.6 * error_of(workload, **prune)


def test_layers_that_a_pass_calls_twice_or_never_are_left_as_they_are() -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("once", "twice", "never")})

    def run() -> None:
        hidden = model["twice"](model["once"](draw(2, 3)))
        model["twice"](hidden)

    assert list(layers_to_refit(model, run)) == ["once"]


class Choosing(nn.Module):
    """Goes another way for each other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(72, 72), nn.Linear(72, 3), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        hidden = inputs.flatten(1)
        return self.second(self.first(hidden) if self.calls % 2 else hidden)


def test_networks_that_cannot_be_refitted_are_refused_before_training() -> None:
    job = job_config(prune={"criterion": "magnitude", "reconstruct": "least_squares"})
    with pytest.raises(PruneError, match="cannot be passed through layer by layer"):
        check_reconstruction(Choosing(), images(Choosing), job.prune)
    turned = nn.Sequential(nn.ConvTranspose2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError, match=r"prune\.reconstruct = least_squares: the network"):
        check_job(job, images(lambda: copy.deepcopy(turned)))
