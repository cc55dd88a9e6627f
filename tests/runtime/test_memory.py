"""What a dry run says of attacks, frozen parts and teachers, against what they hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from small_networks import ONE_RANK, ConvNet, built, images, job_config

from gbp_ray.config.job import JobConfig
from gbp_ray.runtime.estimate import make_plan
from gbp_ray.runtime.memory import Phase
from gbp_ray.training.adversarial import robust_accuracy
from gbp_ray.training.footprint import count_live_bytes
from gbp_ray.workloads.contract import Workload


def workload_of(**changes: Any) -> Workload:
    return dataclasses.replace(images(), input_range=(-6.0, 6.0), **changes)


def job_of(**finetune: Any) -> JobConfig:
    training = {"epochs": 1, "batch_size": 12}
    return job_config(
        pretrain=training,
        finetune={**training, **finetune},
        attack={"kind": "pgd", "epsilon": 0.02, "steps": 20},
        prune={"rounds": 2},
        workload={"eval_batch_size": 29},
    )


def phase_of(job: JobConfig, name: str, workload: Workload | None = None) -> Phase:
    plan = make_plan(job, workload or workload_of())
    (phase,) = [phase for phase in plan.phases if phase.name == name]
    return phase


def bytes_of(names: list[str]) -> int:
    return sum(p.numel() * 4 for name, p in built(ConvNet).named_parameters() if name in names)


def test_an_attack_holds_what_the_plan_says() -> None:
    job, workload, model = job_of(), workload_of(), built(ConvNet)

    def attack() -> object:
        return robust_accuracy(model, workload, ONE_RANK, job.attack, 29)

    attack()
    measured = max(count_live_bytes(attack))
    held = phase_of(job, "attack").held
    assert held["pass"] + held["buffers"] == pytest.approx(measured, rel=0.1)


def test_what_is_frozen_needs_no_optimizer_and_no_gradient() -> None:
    whole = phase_of(job_of(), "finetune")
    head = phase_of(job_of(freeze=["conv*", "norm*"]), "finetune")
    own = bytes_of(["head.weight", "head.bias"])
    assert head.held["optimizer"] == own
    assert head.held["gradients"] == 2 * own
    assert whole.held["optimizer"] > 3 * own
    # The layers before the head keep nothing for a backward pass.
    assert head.held["pass"] < whole.held["pass"]


def test_adversarial_training_holds_more_where_clean_examples_count_too() -> None:
    adversarial = {"kind": "pgd", "epsilon": 0.02, "steps": 3}
    plain = phase_of(job_of(), "finetune")
    alone = phase_of(job_of(adversarial=adversarial), "finetune")
    both = phase_of(job_of(adversarial={**adversarial, "weight": 0.5}), "finetune")
    assert plain.held["pass"] <= alone.held["pass"] < 0.8 * both.held["pass"]


def test_answers_given_once_take_a_table() -> None:
    """A pass of the teacher ends before the network's own, and so adds nothing to the peak."""
    taught = job_of(distillation={"weight": 0.5})
    once = phase_of(taught, "finetune", workload_of(augment=None))
    each = phase_of(taught, "finetune")
    assert once.held["its answers"] == 46 * 3 * 4
    assert "its answers" not in each.held
    assert once.held["pass"] == each.held["pass"]
    assert once.held["teacher"] == each.held["teacher"] > 0
