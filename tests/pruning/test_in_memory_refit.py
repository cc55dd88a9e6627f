"""A network in memory that is pruned and refitted: its weights are those of a job's round."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import ConvNet, built, draw, images, job_config
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

import gbp_ray
from gbp_ray.distributed.ranks import Ranks, fixed_kernels
from gbp_ray.errors import GbpError
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.workloads.data import derive_seed

EXAMPLES = {"calibration_examples": 30, "calibration_batch_size": 8}
PLAIN = dataclasses.replace(images(), augment=None)
REFIT = {"criterion": "magnitude", "sparsity": 0.6, "reconstruct": "least_squares", **EXAMPLES}


def network(build: Callable[[], nn.Module] = ConvNet) -> nn.Module:
    """Builds the network as a job under seed 3 does."""
    return built(build, derive_seed(3, "model"))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def prune(model: nn.Module, data: Any = PLAIN.train, **fields: Any) -> gbp_ray.MaskSet:
    return gbp_ray.prune_model(model, data, **{"seed": 3, **REFIT, **fields})


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"criterion": "taylor", "scope": "layer", "exclude": ("conv1.*",)},
        {"reconstruct_positions": 3, "reconstruct_damping": 0.5, "reconstruct_relu_steps": 1},
        {"sparsity": 0.5, "granularity": "2:4", "exclude": ("conv1.*",)},
        {"granularity": "channel", "sparsity": 0.4, "compact": False},
        {"reconstruct": "sparsegpt"},
    ],
    ids=str,
)
def test_weights_are_those_of_a_round_of_a_job(fields: dict[str, Any]) -> None:
    off = {"pretrain": {"epochs": 0}, "finetune": {"epochs": 0}}
    job = job_config(seed=3, prune={**REFIT, "batchnorm_examples": 0, **fields}, **off)
    with fixed_kernels(1):
        *_, wanted = run_rounds(job, PLAIN, Ranks())
    model = network()
    dense = weights_of(model)
    found = prune(model, **fields)
    assert found == wanted.masks
    assert found.find_revived(model) is None
    assert_same(weights_of(model), weights_of(wanted.model))
    assert not torch.equal(
        model.conv2.weight, dense["conv2.weight"].where(found["conv2.weight"], 0)
    )


def test_outputs_are_matched_that_the_network_has_before_masks_are_applied() -> None:
    once, masked = network(), network()
    masks = prune(once)
    first = gbp_ray.prune_model(network(), criterion="magnitude", sparsity=0.4)
    assert prune(masked, masks=first) == masks
    assert_same(weights_of(masked), weights_of(once))


def test_targets_are_not_read_and_nothing_else_changes() -> None:
    wanted = network()
    prune(wanted)
    for data, fields in (
        ((PLAIN.train[0], torch.full((46,), torch.nan)), {}),
        (TensorDataset(PLAIN.train[0]), {"forward": lambda model, batch: model(batch[0])}),
        ([{"inputs": one} for one in PLAIN.train[0]], {}),
    ):
        model = network()
        model.train()
        model.conv1.weight.requires_grad_(False)
        model.conv2.weight.grad = draw(*model.conv2.weight.shape)
        buffers = [buffer.clone() for buffer in model.buffers()]
        before = torch.get_rng_state()
        with torch.inference_mode():
            prune(model, data, **fields)
        assert_same(weights_of(model), weights_of(wanted))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(map(torch.equal, model.buffers(), buffers))
        assert all(module.training for module in model.modules())
        assert torch.equal(model.conv2.weight.grad, draw(*model.conv2.weight.shape))
        assert not model.conv1.weight.requires_grad


def test_units_leave_a_refitted_network() -> None:
    model = network()
    masks = prune(model, granularity="channel", sparsity=0.5)
    masked = copy.deepcopy(model).eval()
    result = gbp_ray.compact(model, masks, PLAIN.train)
    assert result.num_parameters < result.num_parameters_before
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(PLAIN.train[0]), masked(PLAIN.train[0]))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "kind": (
        lambda: prune(network(), reconstruct="lstsq"),
        "reconstruct = 'lstsq': ",
    ),
    "no data": (
        lambda: prune(network(), None),
        "data: reconstruct = 'least_squares' refits weights on examples; give (inputs, targets), ",
    ),
    "shapes": (
        lambda: prune(network(), (PLAIN.train[0].flatten(1), PLAIN.train[1])),
        "data: a pass of 8 examples failed with ",
    ),
    "no layer": (
        lambda: prune(
            nn.Sequential(nn.ConvTranspose2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        ),
        "reconstruct = least_squares: the network has no linear layer or convolution ",
    ),
    "idle": (
        lambda: prune(network(), reconstruct="none", reconstruct_damping=0.1),
        "reconstruct_damping: is of reconstruct, which is none; leave it out, or ",
    ),
    "damping": (lambda: prune(network(), reconstruct_damping=-1), "reconstruct_damping = -1: "),
    "score": (
        lambda: gbp_ray.score(network(), PLAIN.train, reconstruct="least_squares"),
        "reconstruct: refits weights right after a decision, which only prune_model does; ",
    ),
    "select": (
        lambda: gbp_ray.select({"a": draw(3, 3)}, sparsity=0.5, reconstruct_positions=3),
        "reconstruct_positions: is of reconstruct, which is none; ",
    ),
    "Pruner": (
        lambda: gbp_ray.Pruner(network(), sparsity=0.5, end=3, reconstruct="least_squares"),
        "reconstruct: refits weights right after a decision, which only prune_model does; ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_refitted_is_refused(name: str) -> None:
    call, text = REFUSED[name]
    with pytest.raises(GbpError) as caught:
        call()
    told = str(caught.value)
    assert told.startswith(text), told
    assert "\n" not in told
    assert "prune." not in told


def test_a_network_that_fails_on_the_way_has_its_weights_back() -> None:
    model = network()
    model.head.register_forward_pre_hook(
        lambda module, given: given[0] / (model.conv2.weight != 0).all()
    )
    before = weights_of(model)
    with pytest.raises(GbpError, match=r"^reconstruction of 'head.weight': .* NaN or infinite"):
        prune(model)
    assert_same(weights_of(model), before)


def test_a_network_in_shards_is_refused(tmp_path: Path) -> None:
    file = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    try:
        with pytest.raises(
            GbpError, match=r"^model: is sharded by fully_shard, and reconstruct = "
        ):
            prune(fully_shard(network()))
    finally:
        torch.distributed.destroy_process_group()
