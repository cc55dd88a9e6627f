"""The sections of a job that say how weights are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gbp_ray.config.attack import AdversarialConfig
from gbp_ray.config.schema import MOST_EXAMPLES, Fraction, Idle, Section, Switch

__all__ = [
    "DistillationConfig",
    "FinetuneConfig",
    "PretrainConfig",
    "Recipe",
]


_NOT_STEP = Idle("lr_schedule = {lr_schedule}", lambda recipe: recipe.lr_schedule != "step")
_NOTHING_TO_MIX = Idle(
    "microbatches = {microbatches}", lambda recipe: recipe.microbatches == recipe.batch_size
)


def _has_no_labels(recipe: Any) -> bool:
    return isinstance(recipe, FinetuneConfig) and recipe.distillation.weight == 1


_TAUGHT_ONLY = Idle("distillation.weight = 1", _has_no_labels)


class Recipe(Section):
    """How weights are trained; pretrain and finetune each have one."""

    epochs: Annotated[float, Switch(0)] = Field(0.0, ge=0.0, le=1e6)
    """Passes over the training data, fractions allowed; finetune: after each round."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Update rule; sgd uses momentum, adamw decouples weight decay."""
    learning_rate: float = Field(0.05, gt=0.0, le=1e30)
    """Peak learning rate, reached after the warm-up."""
    momentum: Annotated[
        float, Idle("optimizer = {optimizer}", lambda recipe: recipe.optimizer != "sgd")
    ] = Field(0.9, ge=0.0, lt=1.0)
    """Momentum of sgd; the others ignore it."""
    weight_decay: float = Field(5e-4, ge=0.0, le=1e6)
    """L2 penalty (sgd, adam) or decoupled decay (adamw); never applied to pruned weights."""
    lr_schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    lr_milestones: Annotated[tuple[Fraction, ...], _NOT_STEP] = (0.5, 0.75)
    """For lr_schedule = "step": the shares of the training at which the rate drops."""
    lr_gamma: Annotated[float, _NOT_STEP] = Field(0.1, gt=0.0, le=1.0)
    """For lr_schedule = "step": the factor of each drop."""
    warmup_epochs: float = Field(0.0, ge=0.0, le=1e6)
    """Epochs of linear warm-up from zero to learning_rate."""
    batch_size: int = Field(128, ge=1, le=MOST_EXAMPLES)
    """Examples per optimizer step over all workers together; changing workers keeps it."""
    microbatches: int = Field(4, ge=1, le=100_000)
    """Equal parts each batch is cut into and dealt to the workers; at most this many share a step.
    BatchNorm sees one part at a time, so the result depends on this and never on num_workers."""
    label_smoothing: Annotated[float, _TAUGHT_ONLY] = Field(0.0, ge=0.0, lt=1.0)
    """Share of each label that is spread evenly over all classes; needs cross_entropy as loss."""
    mixup: Annotated[float, _NOTHING_TO_MIX] = Field(0.0, ge=0.0, le=100.0)
    """Mixup: alpha of the Beta distribution that shares are drawn from, such as 0.2; 0 turns it
    off. Each part of a batch is mixed with itself in another order, the loss in the same shares."""
    cutmix: Annotated[float, _NOTHING_TO_MIX] = Field(0.0, ge=0.0, le=100.0)
    """CutMix: likewise, such as 1.0, with a rectangle of another image pasted in. Where mixup is on
    as well, a coin decides for each part."""
    max_gradient_norm: float | None = Field(None, gt=0.0, le=1e30)
    """Scales down the gradient of a step whose norm over all kept weights exceeds this; unset never
    does."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Numbers inside the passes of training (torch.autocast). Weights, gradients and sums stay
    float32, and so do scoring and evaluation; there a GPU multiplies as torch has it do, which for
    convolutions is TF32."""
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0)
    """Decay of an exponential moving average of the weights, such as 0.99; 0 turns it off. When a
    training ends, the average becomes the network: what is evaluated, stored, scored next and
    trained on."""
    freeze: tuple[str, ...] = ()
    """Globs of parameters and buffers that this training leaves alone, such as "layer1.*"; they are
    scored and pruned like the others. A BatchNorm whose running statistics a glob names normalises
    by them in training, and keeps them; the re-estimation after a prune covers it all the same."""
    adversarial: AdversarialConfig = AdversarialConfig()

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
    """Fine-tuning that learns from a teacher's outputs beside the labels."""

    weight: Fraction = 0.0
    """Share of the distillation loss, the rest being the workload's own; 0 turns it off."""
    temperature: Annotated[float, Idle("weight = 0", lambda teaching: teaching.weight == 0)] = (
        Field(4.0, gt=0.0, le=1e6)
    )
    """What both networks' outputs are divided by before the softmax; higher is softer."""
    teacher: Annotated[str, Idle("weight = 0", lambda teaching: not teaching.is_on)] = ""
    """File of the teacher's weights, as for workload.transfer.checkpoint and of the same network;
    empty takes the dense network of this trial."""
    teacher_digest: str = ""
    """SHA-256 of that file, by which the trial is known; filled in when the job is read."""
    features: tuple[str, ...] = ()
    """Names of modules, such as "layer3", whose outputs are to match the teacher's as well."""
    features_weight: Annotated[
        float, Idle("features = []", lambda teaching: not teaching.features)
    ] = Field(1.0, gt=0.0, le=1e12)
    """What the mean squared distance of those outputs is multiplied by before it joins the loss."""

    @property
    def is_on(self) -> bool:
        """Whether there is a teacher at all."""
        return self.weight > 0 or bool(self.features)


class FinetuneConfig(Recipe):
    """Training of the kept weights after each round."""

    learning_rate: float = Field(0.01, gt=0.0, le=1e30)
    """Peak learning rate, reached after the warm-up."""
    patience: int = Field(0, ge=0, le=1_000_000)
    """Evaluations on the validation split without a better one after which a round's fine-tuning
    stops; its best weights are kept. 0 trains to the end. Needs workload.validation."""
    validate_every: Annotated[float, Idle("patience = 0", lambda recipe: recipe.patience == 0)] = (
        Field(1.0, gt=0.0, le=1e6)
    )
    """Epochs from one such evaluation to the next."""
    distillation: DistillationConfig = DistillationConfig()
