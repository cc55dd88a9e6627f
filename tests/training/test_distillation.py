from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_networks import ConvNet, built, draw, images, job_config
from small_trainings import recipe_of, steps, train

from gbp_ray.config.job import JobConfig
from gbp_ray.config.training import DistillationConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError, WorkloadError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.distillation import (
    Teacher,
    capture_outputs,
    distillation_loss,
    feature_distance,
    is_taught_once,
    prepare_teacher,
)
from gbp_ray.training.loss import training_loss
from gbp_ray.workloads.data import take_batch


def test_the_distillation_loss_is_the_mean_divergence_times_the_squared_temperature() -> None:
    outputs, taught = draw(6, 4, seed=1), draw(6, 4, seed=2)
    expected = 0.0
    for row, wanted in zip(outputs.double(), taught.double(), strict=True):
        p = [math.exp(v / 3.0) for v in wanted.tolist()]
        q = [math.exp(v / 3.0) for v in row.tolist()]
        expected += sum(
            a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True)
        )
    loss = distillation_loss(outputs, taught, 3.0)
    assert loss.item() == pytest.approx(9.0 * expected / 6, rel=1e-5)
    assert distillation_loss(taught, taught, 3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_a_network_that_learns_from_its_teacher_alone_comes_to_answer_like_it() -> None:
    # Labels that say nothing: whatever is learnt comes from the teacher.
    workload = dataclasses.replace(images(), loss=lambda outputs, targets: outputs.sum() * 0)
    torch.manual_seed(3)
    teacher, model = ConvNet(), built(ConvNet)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter *= 3  # untrained networks all answer nearly alike
    kept = copy.deepcopy(teacher.state_dict())
    inputs = workload.train[0]

    def distance() -> float:
        with torch.no_grad():
            outputs, taught = model.eval()(inputs), teacher.eval()(inputs)
        return distillation_loss(outputs, taught, 2.0).item()

    before = distance()
    train(
        model,
        workload,
        recipe_of(learning_rate=0.02),
        steps(60),
        teacher=Teacher(teacher, DistillationConfig(weight=1.0, temperature=2.0)),
    )
    assert distance() < 0.2 * before
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, kept[name]), name


# -- features --------------------------------------------------------------------------------------


def test_matched_features_come_to_be_those_of_the_teacher() -> None:
    workload = dataclasses.replace(images(), loss=lambda outputs, targets: outputs.sum() * 0)
    teacher, model = built(ConvNet, seed=3), built(ConvNet)
    inputs = workload.train[0]

    def distance(name: str) -> float:
        with (
            torch.no_grad(),
            capture_outputs(model, [name]) as found,
            capture_outputs(teacher, [name]) as wanted,
        ):
            model.eval()(inputs)
            teacher.eval()(inputs)
        return feature_distance(found, wanted).item()

    before, elsewhere = distance("conv2"), model.head.weight.clone()
    config = DistillationConfig(features=("conv2",))
    recipe = recipe_of(weight_decay=0.0)
    train(model, workload, recipe, steps(60), teacher=Teacher(teacher, config))
    assert distance("conv2") < 0.3 * before
    # What lies behind the module learns nothing from it.
    assert torch.equal(model.head.weight, elsewhere)


def test_a_lesson_adds_up_to_its_parts() -> None:
    """The loss by hand: labels, outputs and features in their shares."""
    workload = dataclasses.replace(images(), augment=None)
    teacher, model = built(ConvNet, seed=3), built(ConvNet)
    model.dropout.p = 0.0
    indices = torch.arange(9)
    config = DistillationConfig(
        weight=0.3, temperature=2.0, features=("norm1", "conv2"), features_weight=0.7
    )
    recipe = recipe_of()
    arguments = (indices, 5, torch.device("cpu"))
    found = training_loss(model.train(), workload, recipe, Teacher(teacher, config), *arguments)
    inputs, targets = workload.train[0][:9], workload.train[1][:9]
    twin = built(ConvNet)
    twin.dropout.p = 0.0
    kept: dict[str, dict[str, torch.Tensor]] = {"model": {}, "teacher": {}}
    for key, network in (("model", twin.train()), ("teacher", teacher.eval())):
        for name in ("norm1", "conv2"):
            network.get_submodule(name).register_forward_hook(
                lambda m, i, o, key=key, name=name: kept[key].update({name: o})
            )
    outputs, taught = twin(inputs), teacher(inputs)
    imitation = distillation_loss(outputs, taught, 2.0)
    squares = [(kept["model"][n] - kept["teacher"][n]).square().mean() for n in ("norm1", "conv2")]
    expected = 0.7 * workload.loss(outputs, targets) + 0.3 * imitation + 0.7 * sum(squares) / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# -- who teaches -----------------------------------------------------------------------------------


def job_of(**distillation: Any) -> JobConfig:
    training = {"epochs": 1, "batch_size": 12}
    return job_config(
        pretrain=training,
        finetune={**training, "distillation": {"weight": 0.5, **distillation}},
        prune={"rounds": 2, "calibration_examples": 24},
    )


def test_a_checkpoint_teaches_in_place_of_the_dense_network(tmp_path: Path) -> None:
    teacher = built(ConvNet, seed=9)
    path = str(tmp_path / "teacher.safetensors")
    save_file(teacher.state_dict(), path)
    prepared = prepare_teacher(
        Teacher(built(ConvNet), DistillationConfig(weight=0.5, teacher=path)),
        job_of(teacher=path),
        images(),
        Ranks(),
    )
    for name, value in prepared.model.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name
    dense, other = (
        [s.record.mask_digest for s in run_rounds(job, images(), Ranks())]
        for job in (job_of(), job_of(teacher=path))
    )
    assert dense[:2] == other[:2]
    assert dense[2] != other[2]


def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "teacher.safetensors")
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match=r"distillation\.teacher = .*: does not fit the network"):
        check_job(job_of(teacher=path), images())
    with pytest.raises(WorkloadError, match=r"distillation\.teacher = .*no such file"):
        check_job(job_of(teacher="nowhere.pt"), images())
    with pytest.raises(ConfigError, match=r"features = 'conv3': .* no such module, did you mean"):
        check_job(job_of(features=["conv3"]), images())


# -- answers once for all --------------------------------------------------------------------------


def test_answers_are_computed_once_where_that_is_the_same_and_cheaper() -> None:
    plain, model = dataclasses.replace(images(), augment=None), built(ConvNet)
    assert is_taught_once(job_of(), plain, model)
    assert not is_taught_once(job_of(), images(), model), "augmented examples look ever different"
    drawn = dataclasses.replace(plain, prepare=lambda inputs: inputs + torch.rand(()))
    assert not is_taught_once(job_of(), drawn, model), "and so do those that are drawn when read"
    assert not is_taught_once(job_of(features=["conv2"]), plain, model)
    for recipe in ({"epochs": 0.2}, {"mixup": 0.2}, {"cutmix": 1.0}):
        tree = job_of().model_dump(exclude_unset=True)
        tree["finetune"] |= recipe
        assert not is_taught_once(JobConfig.model_validate(tree), plain, model), recipe


def test_answers_known_beforehand_are_those_given_each_time() -> None:
    workload, teacher = dataclasses.replace(images(), augment=None), built(ConvNet, seed=3)
    asked = Teacher(teacher, DistillationConfig(weight=0.5))
    known = prepare_teacher(asked, job_of(), workload, Ranks())
    assert known.known is not None
    assert known.known.shape == (46, 3)
    indices = torch.tensor([7, 0, 45])
    batch = take_batch(workload, workload.train, indices)
    recipe = recipe_of()
    expected = asked.forward(workload, batch, indices, 1, recipe).outputs
    found = known.forward(workload, batch, indices, 1, recipe).outputs
    torch.testing.assert_close(found, expected)
