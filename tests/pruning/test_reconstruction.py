"""Refitted weights against numpy's least squares, layer by layer and through a whole network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from refitting import lstsq, lstsq_behind_relu, surgeon
from small_networks import ConvNet, GroupedNet, draw, images, job_config, prune_config
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.reconstruction import check_reconstruction, layers_to_refit, reconstruct
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import derive_seed, shuffled_indices


def columns_of(layer: nn.Module, inputs: Tensor) -> np.ndarray:
    """Returns the patches of a layer's inputs by torch's own unfolding."""
    if isinstance(layer, nn.Linear):
        return inputs.double().numpy()
    assert isinstance(layer, nn.Conv2d)
    unfolded = functional.unfold(inputs, layer.kernel_size, padding=layer.padding)
    return unfolded.transpose(1, 2).flatten(0, 1).double().numpy()


def refitted(
    x: np.ndarray,
    y: np.ndarray,
    mask: Tensor,
    before: Tensor,
    original: np.ndarray,
    affine: np.ndarray | None,
    method: str,
) -> np.ndarray:
    """Returns the weights of one group of a layer, by numpy.

    Args:
        affine: Scale and shift of each output if ReLU follows, (2, M).
    """
    kept, kept_before = (of.flatten(1).numpy() for of in (mask, before))
    if method.endswith("3 steps") and affine is not None:
        return np.stack(
            [
                lstsq_behind_relu(x, y[:, r], kept[r], original[r], 0.02, affine[:, r], 3)
                for r in range(len(kept))
            ]
        )
    if method.startswith("least_squares") or mask.all():
        return np.stack([lstsq(x, y[:, r], kept[r], original[r], 0.02) for r in range(len(kept))])
    if method.endswith(("sparsegpt", "squares")):
        quota = np.count_nonzero(~kept)
        found = surgeon(x, y, kept_before, original, 0.02, [quota], 128)
        if method == "sparsegpt":
            return found
        chosen = found != 0
        return np.stack([lstsq(x, y[:, r], chosen[r], original[r], 0.02) for r in range(len(kept))])
    # Four channels, at each place of the kernel.
    order = np.arange(kept.shape[1]).reshape(mask.shape[1], -1).T.reshape(-1)
    found = np.empty_like(original)
    found[:, order] = surgeon(
        *(x[:, order], y, kept_before[:, order], original[:, order], 0.02),
        *([2 * len(mask)] * (len(order) // 4), 4, 2),
    )
    return found


def affine_of(dense: nn.Module, name: str) -> np.ndarray | None:
    """Returns scale and shift from a layer's products to what ReLU gets; None without it."""
    if name == "head":
        return None
    if name == "conv2":
        return np.stack([np.ones(8), np.zeros(8)])
    norm, bias = dense.norm, dense.conv1.bias
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = (bias - norm.running_mean) * scale + norm.bias
    return torch.stack([scale, shift]).detach().double().numpy()


@pytest.mark.parametrize(
    "method",
    [
        "least_squares",
        "least_squares, 3 steps",
        "sparsegpt",
        "sparsegpt, 2:4",
        "sparsegpt_least_squares",
    ],
)
def test_each_layer_of_a_network_is_refitted_behind_refitted_layers(method: str) -> None:
    """The other way is a whole pass of all examples for each layer."""
    workload = images(GroupedNet, num_train=23)
    is_patterned = method.endswith("2:4")
    prune = job_config(
        prune={
            "criterion": "magnitude",
            "sparsity": 0.5,
            "granularity": "2:4" if is_patterned else "weight",
            "reconstruct": method.partition(",")[0],
            "calibration_examples": 20,
            "calibration_batch_size": 6,
            "calibration_augment": False,
            "reconstruct_positions": 0,
            "reconstruct_damping": 0.02,
            "reconstruct_relu_steps": 3 if method.endswith("3 steps") else 0,
        }
    ).prune
    torch.manual_seed(0)
    dense = workload.build_model().eval()
    dense.norm.running_mean.copy_(0.3 * draw(8, seed=11))
    dense.norm.weight.data.copy_(1 + 0.3 * draw(8, seed=12))
    names = ["conv1", "conv2", "head"]
    masks, before = {}, {}
    for key in [f"{name}.weight" for name in names]:
        shape = dense.get_parameter(key).shape
        masks[key] = draw(*shape) > 0
        if is_patterned:
            channel = torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))
            masks[key] = (channel % 4 < 2).expand(shape).clone()
        before[key] = masks[key] | (draw(*shape, seed=9) > 0)
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
        groups = getattr(layer, "groups", 1)
        original = dense.get_parameter(key).detach().flatten(1).double().numpy()
        affine = affine_of(dense, name)
        of_groups = zip(
            *(np.split(columns_of(layer, seen[net]), groups, axis=1) for net in (expected, dense)),
            *(of[key].chunk(groups) for of in (masks, before)),
            np.split(original, groups),
            [None] * groups if affine is None else np.split(affine, groups, axis=1),
            strict=True,
        )
        parts = [
            refitted(x, x0 @ w0.T, mask, kept_before, w0, scale_and_shift, method)
            for x, x0, mask, kept_before, w0, scale_and_shift in of_groups
        ]
        weight = expected.get_parameter(key)
        weight.data.copy_(torch.from_numpy(np.concatenate(parts)).view_as(weight))

    unchanged = {name: value.clone() for name, value in dense.state_dict().items()}
    chosen = reconstruct(
        *(model, dense, workload, prune, Ranks()),
        masks=masks,
        masks_before=before,
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
    found = masks if method.startswith("least_squares") else chosen
    for key, mask in found.items():
        assert torch.equal(model.get_parameter(key) != 0, mask)
        assert mask.sum() == masks[key].sum()
        assert not (mask & ~before[key]).any()
    assert found.keys() == masks.keys()
    assert bool(chosen) == method.startswith("sparsegpt")
    assert all(torch.equal(value, unchanged[name]) for name, value in dense.state_dict().items())


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
    "prune",
    [
        {},
        {"scope": "layer"},
        {"granularity": "2:4"},
        {"granularity": "channel"},
        {"reconstruct": "sparsegpt"},
        {"reconstruct": "sparsegpt", "granularity": "2:4"},
    ],
    ids=str,
)
def test_a_pruned_network_comes_nearer_to_the_dense_one(prune: dict[str, object]) -> None:
    workload = images(lambda: ConvNet(dropout=0.0))
    if prune.get("granularity") == "2:4":
        prune = {**prune, "exclude": ["conv1.weight"]}
    refitted = error_of(workload, **{"reconstruct": "least_squares", **prune})
    assert refitted < 0.6 * error_of(workload, **{**prune, "reconstruct": "none"})


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_what_sparsegpt_has_pruned_stays_pruned(granularity: str) -> None:
    job = job_config(
        pretrain={"epochs": 1, "batch_size": 12},
        prune={
            "criterion": "magnitude",
            "sparsity": 0.5,
            "granularity": granularity,
            "rounds": 3,
            "reconstruct": "sparsegpt",
            "exclude": ["conv1.weight"],
        },
        finetune={"epochs": 0.5, "batch_size": 12, "momentum": 0.9},
    )
    by_magnitude = job.model_copy(
        update={"prune": job.prune.model_copy(update={"reconstruct": "none"})}
    )
    chosen, others = (list(run_rounds(of, images(), Ranks())) for of in (job, by_magnitude))
    for before, after, other in zip(chosen, chosen[1:], others[1:], strict=False):
        assert before.masks.num_pruned < after.masks.num_pruned == other.masks.num_pruned
        assert after.masks != other.masks
        assert after.masks.intersection(before.masks) == after.masks
        assert (after.masks.parent, after.masks.round) == (before.masks.digest, after.record.round)
        if granularity == "2:4":
            for mask in after.masks.values():
                assert (mask.unflatten(1, (-1, 4)).sum(dim=2) >= 2).all()
    assert [state.record.mask_digest for state in chosen] == [s.masks.digest for s in chosen]
    assert chosen[-1].record.sparsity == 0.5


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


def test_a_network_may_be_refitted_without_damping() -> None:
    prune = {"criterion": "magnitude", "reconstruct": "least_squares", "reconstruct_damping": 0.0}
    check_job(job_config(prune=prune), images())


def test_networks_that_cannot_be_refitted_are_refused_before_training() -> None:
    job = job_config(prune={"criterion": "magnitude", "reconstruct": "least_squares"})
    with pytest.raises(PruneError, match="cannot be passed through layer by layer"):
        check_reconstruction(Choosing(), images(Choosing), job.prune)
    turned = nn.Sequential(nn.ConvTranspose2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError, match=r"prune\.reconstruct = least_squares: the network"):
        check_job(job, images(lambda: copy.deepcopy(turned)))
    with pytest.raises(ValidationError, match=r"chooses single weights, and granularity = .*head"):
        prune_config(reconstruct="sparsegpt", granularity="head")
