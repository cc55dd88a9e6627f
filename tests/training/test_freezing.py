"""Trainings that leave parts of a network alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_networks import ConvNet, SharedWeightNet, built, images, job_config
from small_trainings import recipe_of, steps, train

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.optimizer import check_freeze, make_optimizer, trainable_parameters


def changed(before: dict[str, Any], model: torch.nn.Module) -> set[str]:
    return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


def test_what_is_frozen_keeps_its_bits_and_the_rest_moves() -> None:
    model = built(ConvNet)
    before = copy.deepcopy(model.state_dict())
    train(model, images(), recipe_of(freeze=("conv1.*", "norm1.*")), steps(3))
    moved = changed(before, model)
    assert moved == {n for n in before if not n.startswith(("conv1.", "norm1."))}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_running_statistics_move_unless_they_are_named() -> None:
    model = built(ConvNet)
    before = copy.deepcopy(model.state_dict())
    train(model, images(), recipe_of(freeze=("norm1.weight", "norm1.bias")), steps(3))
    moved = changed(before, model)
    assert {"norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked"} <= moved
    assert not {"norm1.weight", "norm1.bias"} & moved


def test_a_frozen_part_is_as_one_without_gradients() -> None:
    """The head learns as it would if plain torch had frozen the body in eval mode."""
    frozen, reference = built(ConvNet), built(ConvNet)
    body = ("conv*", "norm*")
    for model in (frozen, reference):
        model.dropout.p = 0.0
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name.startswith("head."))

    for norm in (reference.norm1, reference.norm2):
        norm.train = lambda mode=True: None  # stays as it is whatever it is told
        norm.training = False
    train(frozen, images(), recipe_of(freeze=body), steps(4))
    train(reference, images(), recipe_of(), steps(4))
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


def test_a_tied_weight_is_frozen_by_any_of_its_names() -> None:
    model = built(SharedWeightNet)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    first = [name for name, _ in model.named_parameters()]
    (tied,) = set(names) - set(first)
    assert len(trainable_parameters(model, (tied,))) == len(first) - 1


def test_the_optimizer_holds_what_is_trained_alone() -> None:
    model = built(ConvNet)
    optimizer = make_optimizer(model, recipe_of(freeze=("conv*", "norm*")))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(model.head.weight), id(model.head.bias)}


def test_frozen_layers_are_scored_and_pruned_and_never_trained() -> None:
    freeze = ("conv*", "norm*")
    job = job_config(
        pretrain={"epochs": 1, "batch_size": 12},
        finetune={"epochs": 1, "batch_size": 12, "freeze": freeze},
        prune={"rounds": 2, "calibration_examples": 24, "batchnorm_examples": 0},
    )
    states = []
    for state in run_rounds(job, images(), Ranks()):
        weights = {n: t.clone() for n, t in state.model.state_dict().items()}
        states.append((weights, state.masks))
    dense = states[0][0]
    for weights, masks in states[1:]:
        assert not masks["conv1.weight"].all()
        for name, value in weights.items():
            expected = dense[name]
            if name in masks:
                expected = expected * masks[name]
            is_same = torch.equal(value, expected)
            assert is_same == name.startswith(("conv", "norm")), name


def test_globs_that_freeze_nothing_or_everything_are_refused() -> None:
    model = built(ConvNet)
    with pytest.raises(ConfigError, match=r"finetune\.freeze = 'conv9\.\*': matches no .*conv"):
        check_freeze(model, ("conv9.*",), "finetune")
    with pytest.raises(ConfigError, match=r"pretrain\.freeze: leaves nothing to train"):
        check_freeze(model, ("*",), "pretrain")
    job = job_config(finetune={"epochs": 1, "freeze": ["nothing"]})
    with pytest.raises(ConfigError, match=r"finetune\.freeze = 'nothing'"):
        check_job(job, images())


def test_movement_needs_weights_that_move() -> None:
    job = job_config(prune={"criterion": "movement"}, finetune={"epochs": 1, "freeze": ["conv1.*"]})
    with pytest.raises(ConfigError, match=r"'conv1\.weight' is frozen \(finetune\.freeze\)"):
        check_job(job, images())
