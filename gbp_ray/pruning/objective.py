"""What a part of a batch is trained towards: the workload's own loss, and a teacher's outputs.

With `adversarial`, adversarial examples of the part take the place of `weight` of its loss; they
are made against the network as it is, by the loss without the teacher. A teacher sees the clean
examples alone: what it says of them is what is right for the changed ones, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config import DistillationConfig, Recipe
from gbp_ray.errors import ConfigError
from gbp_ray.means import zero_loss
from gbp_ray.pruning.attack import perturb
from gbp_ray.pruning.features import feature_distance, tapped
from gbp_ray.pruning.mixing import draw_mix, refuse_unmixable
from gbp_ray.pruning.ranks import isolated
from gbp_ray.workload import Workload, derive_seed, seeded, take_batch
from gbp_ray.workload_checks import blaming_labels, check_labels

__all__ = ["Lesson", "Teacher", "distillation_loss", "refuse_unlearnable", "training_loss"]


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of some examples.

    Attributes:
        outputs: Its outputs; None where only features count.
        features: What its modules put out, by name.
    """

    outputs: Tensor | None
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """A network whose outputs the one in training learns to give; never trained itself.

    Attributes:
        known: What it says of every training example, (examples, ...), where that was computed once
            for all; the network itself is not asked then.
    """

    model: nn.Module
    config: DistillationConfig
    known: Tensor | None = None

    def teach(self, inputs: Tensor, indices: Tensor, draws: int, recipe: Recipe) -> Lesson:
        """Says what it makes of some examples.

        Args:
            inputs: (B, ...) prepared.
            indices: (B,) which training examples they are.
        """
        if self.known is not None:
            return Lesson(self.known[indices.to(self.known.device)].to(inputs.device))
        self.model.eval()
        with (
            torch.no_grad(),
            isolated(self.model, derive_seed(draws, "teacher")),
            tapped(self.model, self.config.features) as features,
        ):
            outputs = _run(self.model, inputs, recipe)
        return Lesson(outputs if self.config.weight > 0 else None, features)

    def mark(
        self, loss: Tensor, outputs: Tensor, features: Mapping[str, Tensor], lesson: Lesson
    ) -> Tensor:
        """Adds to a loss how far outputs and features are from what was taught."""
        if lesson.outputs is not None:
            weight = self.config.weight
            imitation = distillation_loss(outputs, lesson.outputs, self.config.temperature)
            loss = (1 - weight) * loss + weight * imitation
        if lesson.features:
            distance = feature_distance(features, lesson.features)
            loss = loss + self.config.features_weight * distance
        return loss


def training_loss(
    model: nn.Module,
    workload: Workload,
    recipe: Recipe,
    teacher: Teacher | None,
    indices: Tensor,
    draws: int,
    device: torch.device,
    *,
    emphasis: float = 1.0,
) -> Tensor:
    """Computes the mean loss of a part of a batch, as its recipe and its teacher shape it.

    Args:
        indices: (B,) the examples.
        draws: Seeds all that is drawn for the part.
        emphasis: Of its labels' loss, from `item_counts.emphases_of`; what a teacher says counts by
            example.
    """
    inputs, targets = take_batch(
        workload, workload.train, indices, device=device, augment_seed=draws
    )
    mix = draw_mix(recipe, inputs, draws)
    if mix is not None:
        inputs = mix.inputs
    lesson = None if teacher is None else teacher.teach(inputs, indices, draws, recipe)

    def label_loss(outputs: Tensor) -> Tensor:
        def loss_of(targets: Tensor) -> Tensor:
            smoothing = recipe.label_smoothing
            if smoothing == 0:
                return workload.loss(outputs, targets)
            return functional.cross_entropy(outputs, targets, label_smoothing=smoothing)

        if emphasis == 0:
            return zero_loss(outputs)
        loss = loss_of(targets) if mix is None else mix.loss(loss_of, targets)
        return loss if emphasis == 1 else emphasis * loss

    def lesson_loss(seen: Tensor) -> Tensor:
        with tapped(model, teacher.config.features if teacher is not None else ()) as features:
            outputs = _run(model, seen, recipe)
        check_labels(workload, "train", indices, outputs, targets)
        loss = label_loss(outputs)
        if teacher is None or lesson is None:
            return loss
        return teacher.mark(loss, outputs, features, lesson)

    adversarial = recipe.adversarial
    with blaming_labels(workload, model, "train", indices):
        attacked: Tensor | None = None
        if adversarial.kind != "none":
            attacked = perturb(
                model,
                lambda seen: label_loss(_run(model, seen, recipe)),
                workload,
                inputs,
                adversarial,
                derive_seed(draws, "attack"),
                "adversarial",
            )
        with seeded(derive_seed(draws, "forward")):
            if attacked is None:
                return lesson_loss(inputs)
            if adversarial.weight == 1:
                return lesson_loss(attacked)
            clean = (1 - adversarial.weight) * lesson_loss(inputs)
            return clean + adversarial.weight * lesson_loss(attacked)


def _run(model: nn.Module, inputs: Tensor, recipe: Recipe) -> Any:
    """Passes inputs through a network in the recipe's precision; a loss gets float32."""
    if recipe.precision == "float32":
        return model(inputs)
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        outputs = model(inputs)
    is_narrow = isinstance(outputs, Tensor) and outputs.dtype is torch.bfloat16
    return outputs.float() if is_narrow else outputs


def refuse_unlearnable(recipe: Recipe, section: str, workload: Workload) -> None:
    """Refuses a recipe whose objective the workload does not allow.

    Raises:
        ConfigError: Smoothed labels of a loss that takes none, or inputs that cannot be mixed.
    """
    if recipe.epochs == 0:
        return
    if recipe.label_smoothing > 0 and workload.loss is not functional.cross_entropy:
        raise ConfigError(
            f"{section}.label_smoothing = {recipe.label_smoothing:g}: needs a workload whose loss "
            "is torch.nn.functional.cross_entropy; set it to 0"
        )
    if recipe.mixup > 0 or recipe.cutmix > 0:
        first = torch.zeros(1, dtype=torch.long)
        inputs, _ = take_batch(workload, workload.train, first, augment_seed=0)
        refuse_unmixable(recipe, section, inputs)


def distillation_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Computes T^2 * mean over examples of KL(softmax(taught / T) || softmax(outputs / T)).

    T^2 keeps its gradient of the size of the labels' own, whatever the temperature.

    Args:
        outputs: (B, classes, ...) logits of the network in training.
        taught: The teacher's, likewise.

    Source:
        Hinton, Vinyals and Dean 2015 (1503.02531), section 2.
    """
    divergence = functional.kl_div(
        functional.log_softmax(outputs / temperature, dim=1),
        functional.log_softmax(taught / temperature, dim=1),
        reduction="none",
        log_target=True,
    )
    return temperature**2 * divergence.sum(dim=1).mean()
