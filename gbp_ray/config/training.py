"""The sections of a job for training: pretraining, fine-tuning, distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gbp_ray.config.attack import AdversarialConfig
from gbp_ray.config.schema import MOST_EXAMPLES, Fraction, Idle, Section, Switch

__all__ = ["DistillationConfig", "FinetuneConfig", "PretrainConfig", "Recipe"]

_NOT_STEP = Idle("lr_schedule = {lr_schedule}", lambda recipe: recipe.lr_schedule != "step")
_NOTHING_TO_MIX = Idle(
    "microbatches = {microbatches}", lambda recipe: recipe.microbatches == recipe.batch_size
)


def _has_no_labels(recipe: Any) -> bool:
    return isinstance(recipe, FinetuneConfig) and recipe.distillation.weight == 1


_NOT_SGD = Idle("optimizer = {optimizer}", lambda recipe: recipe.optimizer != "sgd")
_NO_FEATURES = Idle("features = []", lambda distillation: not distillation.features)
_NO_WEIGHT = Idle("weight = 0", lambda distillation: distillation.weight == 0)
_NO_TEACHER = Idle("weight = 0", lambda distillation: not distillation.is_on)
_ONE_ROUND = Idle("prune.rounds = 1", lambda job: job.prune.rounds == 1, of_job=True)
_NO_PATIENCE = Idle("patience = 0", lambda recipe: recipe.patience == 0)
_TAUGHT_ONLY = Idle("distillation.weight = 1", _has_no_labels)


class Recipe(Section):
    """Training of weights; pretrain and finetune each have one."""

    epochs: Annotated[float, Switch(0)] = Field(0.0, ge=0.0, le=1e6)
    """Passes over the training data, fractions allowed; finetune: each time it comes."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Update rule; sgd uses momentum, adamw decouples weight decay."""
    learning_rate: float = Field(0.05, gt=0.0, le=1e30)
    """Peak learning rate, reached after the warm-up."""
    momentum: Annotated[float, _NOT_SGD] = Field(0.9, ge=0.0, lt=1.0)
    """Momentum of sgd; the others ignore it."""
    weight_decay: float = Field(5e-4, ge=0.0, le=1e6)
    """L2 penalty (sgd, adam) or decoupled decay (adamw); never applied to pruned weights."""
    lr_schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    lr_milestones: Annotated[tuple[Fraction, ...], _NOT_STEP] = (0.5, 0.75)
    """For lr_schedule = "step": the fractions of the training at which the rate drops."""
    lr_gamma: Annotated[float, _NOT_STEP] = Field(0.1, gt=0.0, le=1.0)
    """For lr_schedule = "step": the factor of each drop."""
    warmup_epochs: float = Field(0.0, ge=0.0, le=1e6)
    """Epochs of linear warm-up from zero to learning_rate."""
    batch_size: int = Field(128, ge=1, le=MOST_EXAMPLES)
    """Examples per optimizer step over all workers together; changing workers keeps it."""
    microbatches: int = Field(4, ge=1, le=100_000)
    """Equal parts of each batch, dealt to the workers; at most this many workers share a step.
    BatchNorm sees one microbatch at a time: the result depends on this, not on num_workers."""
    label_smoothing: Annotated[float, _TAUGHT_ONLY] = Field(0.0, ge=0.0, lt=1.0)
    """Part of each label that is spread evenly over all classes; needs cross_entropy as loss."""
    mixup: Annotated[float, _NOTHING_TO_MIX] = Field(0.0, ge=0.0, le=100.0)
    """Mixup: alpha of the Beta distribution of mixing weights, such as 0.2; 0 turns it off. Each
    microbatch is mixed with itself in another order, and the loss with the same weights."""
    cutmix: Annotated[float, _NOTHING_TO_MIX] = Field(0.0, ge=0.0, le=100.0)
    """CutMix: likewise, such as 1.0, with a rectangle of another image pasted in. Where mixup is on
    as well, a coin decides for each microbatch."""
    max_gradient_norm: float | None = Field(None, gt=0.0, le=1e30)
    """Largest norm of a step's gradient over all kept weights; longer ones are scaled down. Unset:
    no limit."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Data type of the passes of training (torch.autocast). Weights, gradients, sums, scoring and
    evaluation stay float32, multiplied by torch's default on a GPU, which for convolutions is
    TF32."""
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0)
    """Decay of an exponential moving average of the weights, such as 0.99; 0 turns it off. When a
    training ends, the average becomes the network that is evaluated, stored, scored and trained
    on."""
    freeze: tuple[str, ...] = ()
    """Globs of parameters and buffers that this training does not change, such as "layer1.*"; they
    are scored and pruned like the others. A BatchNorm with running statistics named by a glob
    normalises by them in training and keeps them, but is re-estimated after a prune."""
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
    """Fine-tuning on a teacher's outputs beside the labels."""

    weight: Fraction = 0.0
    """Weight of the distillation loss; the workload's own has the rest. 0 turns it off."""
    temperature: Annotated[float, _NO_WEIGHT] = Field(4.0, gt=0.0, le=1e6)
    """Divisor of both networks' outputs before the softmax; higher is softer."""
    teacher: Annotated[str, _NO_TEACHER] = ""
    """File of the teacher's weights, as for workload.transfer.checkpoint and of the same network;
    empty takes the dense network of this trial."""
    teacher_digest: str = ""
    """SHA-256 of that file, by which the trial is known; filled in when the job is read."""
    features: tuple[str, ...] = ()
    """Names of modules, such as "layer3", whose outputs are to match the teacher's, too."""
    features_weight: Annotated[float, _NO_FEATURES] = Field(1.0, gt=0.0, le=1e12)
    """Factor of the mean squared distance of those outputs in the loss."""

    @property
    def is_on(self) -> bool:
        """Returns whether there is a teacher."""
        return self.weight > 0 or bool(self.features)


class FinetuneConfig(Recipe):
    """Training of the kept weights."""

    after: Annotated[Literal["each", "last"], _ONE_ROUND] = "each"
    """The rounds that it follows: each, or only the last, as suits prune.reconstruct, which refits
    weights from the dense ones in each round."""
    learning_rate: float = Field(0.01, gt=0.0, le=1e30)
    """Peak learning rate, reached after the warm-up."""
    patience: int = Field(0, ge=0, le=1_000_000)
    """Evaluations on the validation split without a better one after which a round's fine-tuning
    stops; its best weights are kept. 0 trains to the end. Needs workload.validation."""
    validate_every: Annotated[float, _NO_PATIENCE] = Field(1.0, gt=0.0, le=1e6)
    """Epochs from one such evaluation to the next."""
    distillation: DistillationConfig = DistillationConfig()
