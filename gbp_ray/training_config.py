"""The sections of a job that say how weights are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gbp_ray.sections import Fraction, Section

__all__ = ["DistillationConfig", "FinetuneConfig", "PretrainConfig", "Recipe"]


class Recipe(Section):
    """How weights are trained; pretrain and finetune each have one."""

    epochs: float = Field(0.0, ge=0.0, le=1e6)
    """Passes over the training data, fractions allowed; finetune: after each round."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Update rule; sgd uses momentum, adamw decouples weight decay."""
    learning_rate: float = Field(0.05, gt=0.0)
    """Peak learning rate, reached after the warm-up."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Momentum of sgd; the others ignore it."""
    weight_decay: float = Field(5e-4, ge=0.0)
    """L2 penalty (sgd, adam) or decoupled decay (adamw); never applied to pruned weights."""
    lr_schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    lr_milestones: tuple[Fraction, ...] = (0.5, 0.75)
    """For lr_schedule = "step": the shares of the training at which the rate drops."""
    lr_gamma: float = Field(0.1, gt=0.0, le=1.0)
    """For lr_schedule = "step": the factor of each drop."""
    warmup_epochs: float = Field(0.0, ge=0.0)
    """Epochs of linear warm-up from zero to learning_rate."""
    batch_size: int = Field(128, ge=1)
    """Examples per optimizer step over all workers together; changing workers keeps it."""
    microbatches: int = Field(4, ge=1)
    """Equal parts each batch is cut into and dealt to the workers; at most this many share a step.
    BatchNorm sees one part at a time, so the result depends on this and never on num_workers."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        if self.microbatches > self.batch_size:
            raise ValueError(
                f"microbatches = {self.microbatches} exceeds batch_size = {self.batch_size}; "
                "lower microbatches"
            )
        return self


class PretrainConfig(Recipe):
    """Training of the dense network before the first round; epochs = 0 takes it as built."""


class DistillationConfig(Section):
    """Fine-tuning that learns from the dense network's outputs beside the labels."""

    weight: Fraction = 0.0
    """Share of the distillation loss, the rest being the workload's own; 0 turns it off."""
    temperature: float = Field(4.0, gt=0.0)
    """What both networks' outputs are divided by before the softmax; higher is softer."""


class FinetuneConfig(Recipe):
    """Training of the kept weights after each round."""

    learning_rate: float = Field(0.01, gt=0.0)
    """Peak learning rate, reached after the warm-up."""
    distillation: DistillationConfig = DistillationConfig()
