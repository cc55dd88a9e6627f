"""What a part of a batch is trained towards: the workload's own loss, and a teacher's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config import DistillationConfig, Recipe
from gbp_ray.errors import ConfigError
from gbp_ray.pruning.mixing import draw_mix, refuse_unmixable
from gbp_ray.pruning.ranks import isolated
from gbp_ray.workload import Workload, blaming_labels, check_labels, derive_seed, seeded, take_batch

__all__ = ["Teacher", "distillation_loss", "refuse_unlearnable", "training_loss"]


@dataclass(frozen=True)
class Teacher:
    """A network whose outputs the one in training learns to give; never trained itself."""

    model: nn.Module
    config: DistillationConfig


def training_loss(
    model: nn.Module,
    workload: Workload,
    recipe: Recipe,
    teacher: Teacher | None,
    indices: Tensor,
    draws: int,
    device: torch.device,
) -> Tensor:
    """Computes the mean loss of a part of a batch, as its recipe and its teacher shape it.

    Args:
        indices: (B,) the examples.
        draws: Seeds all that is drawn for the part.
    """
    inputs, targets = take_batch(
        workload, workload.train, indices, device=device, augment_seed=draws
    )
    mix = draw_mix(recipe, inputs, draws)
    if mix is not None:
        inputs = mix.inputs

    def loss_of(targets: Tensor) -> Tensor:
        if recipe.label_smoothing == 0:
            return workload.loss(outputs, targets)
        return functional.cross_entropy(outputs, targets, label_smoothing=recipe.label_smoothing)

    with (
        blaming_labels(workload, model, "train", indices),
        seeded(derive_seed(draws, "forward")),
    ):
        outputs = _run(model, inputs, recipe)
        check_labels(workload, "train", indices, outputs, targets)
        loss = loss_of(targets) if mix is None else mix.loss(loss_of, targets)
    if teacher is not None:
        teacher.model.eval()
        with torch.no_grad(), isolated(teacher.model, derive_seed(draws, "teacher")):
            taught = _run(teacher.model, inputs, recipe)
        weight = teacher.config.weight
        imitation = distillation_loss(outputs, taught, teacher.config.temperature)
        loss = (1 - weight) * loss + weight * imitation
    return loss


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
