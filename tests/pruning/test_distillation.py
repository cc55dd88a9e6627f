from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from small_networks import ConvNet, built, draw, images
from small_trainings import recipe_of, steps, train

from gbp_ray.config import DistillationConfig
from gbp_ray.pruning.objective import Teacher, distillation_loss


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
