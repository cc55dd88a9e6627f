"""The sections of a job for adversarial examples, in training and in evaluation.

Sizes are in intensities, where 0 is the darkest and 1 the brightest input, before any normalisation
by the workload (`Workload.input_range`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gbp_ray.config.schema import MOST_EXAMPLES, Idle, Section, Switch

__all__ = ["AdversarialConfig", "AttackConfig", "Perturbation", "find_weaker_attack"]


_ONE_STEP = Idle("kind = fgsm", lambda perturbation: perturbation.kind == "fgsm")


class Perturbation(Section):
    """The making of adversarial examples."""

    kind: Annotated[Literal["none", "fgsm", "pgd"], Switch("none")] = "none"
    """none; fgsm, one step along the gradient's sign; pgd, several from a random start."""
    epsilon: float = Field(0.03, gt=0.0, le=1.0)
    """Largest change of an intensity, where 1 is the whole range from dark to bright."""
    steps: Annotated[int, _ONE_STEP] = Field(7, ge=1, le=10_000)
    """Steps of pgd."""
    step_size: Annotated[float | None, _ONE_STEP] = Field(None, gt=0.0, le=1.0)
    """Length of a step of pgd, in intensities; unset takes 2.5 * epsilon / steps."""

    @property
    def num_steps(self) -> int:
        """Counts the steps; 0 where nothing is attacked."""
        return {"none": 0, "fgsm": 1, "pgd": self.steps}[self.kind]

    @property
    def step(self) -> float:
        """Returns the length of a step, in intensities."""
        if self.kind == "fgsm":
            return self.epsilon
        return 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size


class AdversarialConfig(Perturbation):
    """Training on adversarial examples made against the network as it is at each step."""

    weight: float = Field(1.0, gt=0.0, le=1.0)
    """Weight of the loss on adversarial examples; that on clean ones has the rest."""


class AttackConfig(Perturbation):
    """The attack under which each round's robust accuracy is measured; none measures none."""

    steps: Annotated[int, _ONE_STEP] = Field(20, ge=1, le=10_000)
    """Steps of pgd; more than any training of the job takes."""
    restarts: Annotated[int, _ONE_STEP] = Field(2, ge=1, le=1000)
    """Random starts of pgd; an example counts as right if it is right after all of them."""
    examples: int = Field(1000, ge=1, le=MOST_EXAMPLES)
    """Test examples attacked, from the first on."""


def find_weaker_attack(attack: AttackConfig, adversarial: AdversarialConfig, section: str) -> str:
    """Describes why an attack is too weak for a network trained so; "" where it is not.

    A network is robust against what it was trained on; only a stronger attack shows how robust.
    """
    if attack.kind == "none" or adversarial.kind == "none":
        return ""
    if attack.num_steps <= adversarial.num_steps:
        taken = f"attack.steps = {attack.steps}"
        if attack.kind == "fgsm":
            taken = "attack.kind = fgsm, of one step,"
        return (
            f"{taken} is no stronger than the {adversarial.num_steps} of {section}.adversarial; "
            f"use pgd with more steps than that, such as {max(20, 3 * adversarial.num_steps)}"
        )
    if attack.epsilon < adversarial.epsilon:
        return (
            f"attack.epsilon = {attack.epsilon:g} is less than {section}.adversarial.epsilon = "
            f"{adversarial.epsilon:g}; raise it to that or more"
        )
    return ""
