"""What a part of a batch is trained towards: the workload's own loss, and a teacher's outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config import DistillationConfig
from gbp_ray.pruning.ranks import isolated
from gbp_ray.workload import Workload, blaming_labels, check_labels, derive_seed, seeded, take_batch

__all__ = ["Teacher", "distillation_loss", "training_loss"]


@dataclass(frozen=True)
class Teacher:
    """A network whose outputs the one in training learns to give; never trained itself."""

    model: nn.Module
    config: DistillationConfig


def training_loss(
    model: nn.Module,
    workload: Workload,
    teacher: Teacher | None,
    indices: Tensor,
    draws: int,
    device: torch.device,
) -> Tensor:
    inputs, targets = take_batch(
        workload, workload.train, indices, device=device, augment_seed=draws
    )
    with (
        blaming_labels(workload, model, "train", indices),
        seeded(derive_seed(draws, "forward")),
    ):
        outputs = model(inputs)
        check_labels(workload, "train", indices, outputs, targets)
        loss = workload.loss(outputs, targets)
    if teacher is not None:
        teacher.model.eval()
        with torch.no_grad(), isolated(teacher.model, derive_seed(draws, "teacher")):
            taught = teacher.model(inputs)
        weight = teacher.config.weight
        imitation = distillation_loss(outputs, taught, teacher.config.temperature)
        loss = (1 - weight) * loss + weight * imitation
    return loss


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
