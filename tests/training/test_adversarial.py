"""Adversarial examples against closed forms and another library; robustness that is no trick."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from small_networks import ONE_RANK, ConvNet, built, images, in_float64, job_config
from small_trainings import recipe_of, steps, train
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.attack import AdversarialConfig, AttackConfig, Perturbation
from gbp_ray.errors import ConfigError, WorkloadError
from gbp_ray.pruning.checks import check_job
from gbp_ray.training.adversarial import check_attack, perturb, robust_accuracy
from gbp_ray.training.loss import training_loss
from gbp_ray.workloads import digits_convnet
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import derive_seed

MEAN, DEVIATION = (0.4, 0.5), (0.2, 0.3)
RANGE = (
    [-m / d for m, d in zip(MEAN, DEVIATION, strict=True)],
    [(1 - m) / d for m, d in zip(MEAN, DEVIATION, strict=True)],
)


def bright_images(dtype: torch.dtype = torch.float32, num: int = 24) -> Workload:
    """Images of intensities in [0, 1], normalised by channel before the network sees them."""
    pixels = torch.rand(num, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    labels = torch.arange(num) % 3
    mean, deviation = (torch.tensor(v, dtype=dtype).view(2, 1, 1) for v in (MEAN, DEVIATION))
    return Workload(
        ConvNet,
        (pixels, labels),
        (pixels, labels),
        prepare=lambda raw: (raw - mean) / deviation,
        input_range=RANGE,
    )


def attack_on(
    model: nn.Module, workload: Workload, attack: Perturbation, seed: int = 3
) -> tuple[Tensor, Tensor]:
    """Returns the workload's inputs before and after, in intensities."""
    assert workload.prepare is not None
    raw, labels = workload.train
    inputs = workload.prepare(raw)
    changed = perturb(
        model,
        lambda seen: workload.loss(model(seen), labels),
        workload,
        inputs,
        attack,
        seed,
        "attack",
    )
    low, high = (torch.tensor(v, dtype=raw.dtype).view(2, 1, 1) for v in RANGE)
    return raw, (changed - low) / (high - low)


def pgd(epsilon: float = 0.1, steps: int = 7, **more: Any) -> Perturbation:
    return Perturbation(kind="pgd", epsilon=epsilon, steps=steps, **more)


# -- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_a_linear_network_is_attacked_into_the_corner_that_hurts_most(kind: str) -> None:
    """The loss of two classes falls with (w_right - w_wrong) x, so its corner is known."""
    workload = bright_images()
    labels = workload.train[1] % 2
    workload = dataclasses.replace(workload, train=(workload.train[0], labels))
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 2))
    attack = Perturbation(kind=kind, epsilon=0.1, steps=12)
    raw, changed = attack_on(model, workload, attack)
    weight = model[1].weight.detach()
    uphill = (weight[1 - labels] - weight[labels]).sign().view_as(raw)
    torch.testing.assert_close(changed, (raw + 0.1 * uphill).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attack", [Perturbation(kind="fgsm", epsilon=0.3), pgd(0.3, steps=5)])
def test_an_attack_stays_within_epsilon_and_within_the_range(attack: Perturbation) -> None:
    raw, changed = attack_on(built(ConvNet), bright_images(), attack)
    assert (changed - raw).abs().max() <= 0.3 + 1e-5
    assert changed.min() >= -1e-5
    assert changed.max() <= 1 + 1e-5
    assert ((changed - raw).abs() > 0.29).float().mean() > 0.3


def test_an_attack_leaves_the_network_as_it_was() -> None:
    model = built(ConvNet)
    model.train()
    model.norm2.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    attack_on(model, bright_images(), pgd())
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training
    assert model.norm1.training
    assert not model.norm2.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_example_is_attacked_alike_beside_any_others() -> None:
    """BatchNorm is in eval mode; in training mode the neighbours would count."""
    model, workload = built(ConvNet), bright_images()
    model.train()
    few = dataclasses.replace(workload, train=tuple(column[:1] for column in workload.train))
    _, all_changed = attack_on(model, workload, Perturbation(kind="fgsm", epsilon=0.1))
    _, changed = attack_on(model, few, Perturbation(kind="fgsm", epsilon=0.1))
    torch.testing.assert_close(changed, all_changed[:1], atol=1e-6, rtol=0)


def test_random_starts_differ_by_seed_alone() -> None:
    model, workload = built(ConvNet), bright_images()
    first, again, other = (attack_on(model, workload, pgd(), seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# -- another library -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "num_steps"), [("fgsm", 1), ("pgd", 1), ("pgd", 7), ("pgd", 20)])
def test_attacks_are_those_of_foolbox(kind: str, num_steps: int) -> None:
    foolbox = pytest.importorskip("foolbox", reason="foolbox comes with the test extra")
    eagerpy = pytest.importorskip("eagerpy")
    epsilon, stride, seed = 0.08, 0.02, 3
    workload = bright_images(torch.float64)
    model = in_float64(ConvNet, seed=2)
    # A network whose gradients are no noise.
    recipe = recipe_of(learning_rate=0.1, batch_size=24)
    train(model, workload, recipe, steps(20))
    model.eval()
    attack = Perturbation(kind=kind, epsilon=epsilon, steps=num_steps, step_size=stride)
    raw, found = attack_on(model, workload, attack, seed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "start"))
    noise = torch.rand(raw.shape, generator=generator, dtype=torch.float64)

    class FromOurStart(foolbox.attacks.LinfPGD):
        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            return eagerpy.astensor((raw + epsilon * (2 * noise - 1)).clamp(0, 1))

    network = foolbox.PyTorchModel(
        model,
        bounds=(0, 1),
        preprocessing={"mean": list(MEAN), "std": list(DEVIATION), "axis": -3},
    )
    if kind == "fgsm":
        reference = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    else:
        reference = FromOurStart(abs_stepsize=stride, steps=num_steps)
    _, expected, _ = reference(network, raw, workload.train[1], epsilons=epsilon)
    assert (expected - raw).abs().max() > 0.9 * epsilon or num_steps == 1
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


# -- training on them ------------------------------------------------------------------------------


def test_the_loss_is_shared_between_clean_and_adversarial_examples() -> None:
    workload, model = bright_images(), built(ConvNet)
    model.dropout.p = 0.0
    indices = torch.arange(12)

    def loss_of(weight: float, kind: str = "pgd") -> float:
        adversarial = AdversarialConfig(kind=kind, epsilon=0.1, weight=weight)
        recipe = recipe_of(adversarial=adversarial)
        twin = copy.deepcopy(model)
        twin.train()
        device = torch.device("cpu")
        return training_loss(twin, workload, recipe, None, indices, 7, device).item()

    clean, mixed, attacked = loss_of(1.0, "none"), loss_of(0.25), loss_of(1.0)
    assert attacked > clean
    assert mixed == pytest.approx(0.75 * clean + 0.25 * attacked, rel=1e-5)


# -- robust accuracy -------------------------------------------------------------------------------


def attack_of(epsilon: float, **more: Any) -> AttackConfig:
    return AttackConfig(kind="pgd", epsilon=epsilon, **more)


@functools.cache
def robust(model: nn.Module, workload: Workload, epsilon: float, **more: Any) -> float:
    return robust_accuracy(model, workload, ONE_RANK, attack_of(epsilon, **more), 250)


@pytest.fixture(scope="module")
def digits() -> tuple[Workload, nn.Module, nn.Module]:
    """A small ConvNet over digits, trained plainly and trained on adversarial examples."""
    workload = digits_convnet(augment=False, width=8)
    # Enough to tell the networks apart, in a third of the time.
    inputs, labels = workload.test
    workload = dataclasses.replace(workload, test=(inputs[:150], labels[:150]))
    plain, hardened = built(workload.build_model), built(workload.build_model)
    fields = {"batch_size": 64, "microbatches": 1, "lr_schedule": "cosine", "learning_rate": 0.1}
    adversarial = AdversarialConfig(kind="pgd", epsilon=0.15, steps=4)
    train(plain, workload, recipe_of(**fields), steps(80))
    train(hardened, workload, recipe_of(**fields, adversarial=adversarial), steps(120))
    return workload, plain.eval(), hardened.eval()


def test_adversarial_training_makes_a_network_robust(digits: Any) -> None:
    workload, plain, hardened = digits
    assert robust(hardened, workload, 0.15) > robust(plain, workload, 0.15) + 0.2


def test_more_steps_and_larger_boxes_never_help_the_network(digits: Any) -> None:
    """Were the gradients merely hidden, small steps would not find what large boxes hold."""
    workload, plain, hardened = digits
    for model in (plain, hardened):
        by_steps = [robust(model, workload, 0.15, steps=n, restarts=1) for n in (1, 3, 20)]
        assert by_steps == sorted(by_steps, reverse=True)
        by_epsilon = [robust(model, workload, e) for e in (0.02, 0.1, 0.3, 0.8)]
        assert by_epsilon == sorted(by_epsilon, reverse=True)
        assert by_epsilon[-1] < 0.02


def test_an_attack_without_gradients_is_no_stronger(digits: Any) -> None:
    """Random points and corners of the box, 60 of each; and what fools another network."""
    workload, plain, hardened = digits
    raw, labels = workload.test
    inputs = workload.prepare(raw)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model, other in ((plain, hardened), (hardened, plain)):
            right = model(inputs).argmax(dim=1) == labels
            for _ in range(60):
                noise = 2 * torch.rand(inputs.shape, generator=generator) - 1
                for shift in (noise, noise.sign()):
                    seen = (inputs + 0.15 * shift).clamp(0, 1)
                    right &= model(seen).argmax(dim=1) == labels
            strongest = robust(model, workload, 0.15)
            assert strongest <= right.float().mean().item()
            transferred = perturb(
                other,
                lambda seen, other=other: functional.cross_entropy(other(seen), labels),
                workload,
                inputs,
                pgd(0.15, steps=20),
                0,
                "attack",
            )
            kept = (model(transferred).argmax(dim=1) == labels).float().mean().item()
            assert strongest <= kept


def test_robust_accuracy_counts_one_example_after_another_where_a_metric_only_counts() -> None:
    workload, model = bright_images(), built(ConvNet)
    expected = robust(model, workload, 0.05)
    own = dataclasses.replace(
        workload, count_correct=lambda outputs, targets: (outputs.argmax(1) == targets).sum()
    )
    assert robust(model, own, 0.05) == expected
    assert 0 < robust(model, workload, 1e-6) < 1


def test_the_first_examples_alone_are_attacked() -> None:
    workload, model = bright_images(), built(ConvNet).eval()
    first = dataclasses.replace(workload, test=tuple(column[:5] for column in workload.test))
    assert robust(model, workload, 0.05, examples=5) == robust(model, first, 0.05)


# -- what is refused -------------------------------------------------------------------------------


def test_a_workload_must_say_what_range_its_inputs_have() -> None:
    for section in ("attack", "pretrain.adversarial"):
        job = job_config(
            pretrain={"epochs": 1, "adversarial": {"kind": "fgsm"} if "." in section else {}},
            attack={} if "." in section else {"kind": "pgd"},
        )
        with pytest.raises(ConfigError, match=rf"{section}\.kind: needs .*input_range"):
            check_job(job, images())


def test_a_range_that_the_inputs_leave_is_refused() -> None:
    workload = dataclasses.replace(bright_images(), input_range=(0.0, 1.0))
    with pytest.raises(WorkloadError, match=r"input_range: inputs run from -.* and leave it"):
        check_attack(workload, built(ConvNet), pgd(), "attack")
    odd = dataclasses.replace(bright_images(), input_range=([0.0, 0.0, 0.0], 1.0))
    with pytest.raises(WorkloadError, match="has 3 values for inputs of shape"):
        check_attack(odd, built(ConvNet), pgd(), "attack")


def test_a_loss_without_a_gradient_in_the_inputs_is_refused() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(inputs.detach().mean(dim=(2, 3)))

    with pytest.raises(ConfigError, match=r"attack\.kind = pgd: the loss has no gradient"):
        check_attack(bright_images(), Deaf(), pgd(), "attack")


def test_an_attack_that_right_answers_cannot_be_counted_under_is_refused_before_training() -> None:
    regression = Workload(
        lambda: nn.Linear(4, 1),
        train=(torch.rand(16, 4), torch.rand(16, 1)),
        test=(torch.rand(16, 4), torch.rand(16, 1)),
        loss=functional.mse_loss,
        input_range=(0.0, 1.0),
        metrics=("rmse",),
    )
    job = job_config(attack={"kind": "fgsm"})
    with pytest.raises(ConfigError, match=r"^attack\.kind = fgsm: right answers cannot.*to none$"):
        check_job(job, regression)
    check_job(job_config(finetune={"epochs": 1, "adversarial": {"kind": "fgsm"}}), regression)
