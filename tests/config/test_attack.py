"""The sections about attacks, encodings and transfer: what contradicts, what does nothing."""

from __future__ import annotations

from typing import Any

import pytest

from gbp_ray.config.attack import Perturbation
from gbp_ray.config.job import JobConfig
from gbp_ray.config.schema import find_idle_options
from gbp_ray.errors import ConfigError


def job_of(**sections: Any) -> JobConfig:
    from gbp_ray.config.job import load_job

    overrides = {"pretrain.epochs": 1, "finetune.epochs": 1, "prune.rounds": 1}
    return load_job(None, {**overrides, **{k.replace("__", "."): v for k, v in sections.items()}})


def test_steps_and_their_length() -> None:
    assert Perturbation().num_steps == 0
    fgsm = Perturbation(kind="fgsm", epsilon=0.1, steps=9, step_size=0.5)
    assert (fgsm.num_steps, fgsm.step) == (1, 0.1)
    assert Perturbation(kind="pgd", epsilon=0.1, steps=10).step == pytest.approx(0.025)
    assert Perturbation(kind="pgd", epsilon=0.1, step_size=0.5).step == 0.5


@pytest.mark.parametrize("section", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ({"kind": "pgd", "steps": 7}, "attack.steps = 7 is no stronger than the 7 of"),
        ({"kind": "fgsm"}, "attack.kind = fgsm, of one step, is no stronger"),
        ({"kind": "pgd", "epsilon": 0.02}, "attack.epsilon = 0.02 is less than"),
    ],
)
def test_the_measuring_attack_is_the_stronger_one(
    section: str, attack: dict[str, Any], words: str
) -> None:
    adversarial = {"kind": "pgd", "steps": 7, "epsilon": 0.03}
    with pytest.raises(ConfigError) as caught:
        job_of(**{f"{section}.adversarial": adversarial, "attack": attack})
    assert words in str(caught.value)
    assert f"{section}.adversarial" in str(caught.value)
    job_of(**{f"{section}.adversarial": adversarial, "attack": {"kind": "pgd", "steps": 20}})
    job_of(**{f"{section}.adversarial": adversarial})
    job_of(**{f"{section}.adversarial": adversarial, f"{section}.epochs": 0, "attack": attack})


def test_a_one_hot_code_of_ones_says_nothing_to_synflow() -> None:
    with pytest.raises(ConfigError, match=r"synflow sends ones .* use thermometer"):
        job_of(prune__criterion="synflow", workload__encoding__kind="one_hot")
    job_of(prune__criterion="synflow", workload__encoding__kind="thermometer")


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        ({"attack.steps": 9}, {"attack.steps"}),
        ({"attack.kind": "fgsm", "attack.restarts": 9, "attack.steps": 9}, "attack.restarts steps"),
        ({"attack.kind": "pgd", "attack.restarts": 9}, ""),
        ({"finetune.adversarial.epsilon": 0.2}, {"finetune.adversarial.epsilon"}),
        ({"finetune.adversarial": {"kind": "pgd", "steps": 3, "epsilon": 0.2}}, ""),
        ({"finetune.adversarial": {"kind": "fgsm", "step_size": 0.1}}, "step_size"),
        ({"workload.encoding.levels": 4}, {"workload.encoding.levels"}),
        ({"workload.encoding": {"kind": "one_hot", "levels": 4}}, ""),
        ({"workload.encoding": {"kind": "one_hot", "mean": [0.1]}}, "mean"),
        ({"workload.encoding": {"kind": "normalise", "mean": [0.1], "levels": 4}}, "levels"),
        ({"workload.transfer.new_head": ["a"]}, {"workload.transfer.new_head"}),
        ({"workload.transfer": {"new_head": ["a"], "checkpoint": "b"}}, ""),
        ({"finetune.distillation": {"teacher": "a"}}, "teacher"),
        ({"finetune.distillation": {"teacher": "a", "features": ["b"]}}, ""),
        ({"finetune.distillation": {"features_weight": 2.0, "weight": 0.1}}, "features_weight"),
        ({"finetune.freeze": ["a"], "finetune.epochs": 0}, {"finetune.freeze"}),
    ],
)
def test_options_without_effect_are_found(overrides: dict[str, Any], idle: Any) -> None:
    found = {key for key, _ in find_idle_options(job_of(**overrides))}
    found = {key for key in found if not key.startswith(("prune.", "finetune.batch", "finetune.l"))}
    if isinstance(idle, set):
        assert found == idle
    else:
        assert {key.rpartition(".")[2] for key in found} == {
            k.rpartition(".")[2] for k in idle.split()
        }
