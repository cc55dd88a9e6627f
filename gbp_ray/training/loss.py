"""The loss of a part of a batch: the workload's own, a teacher's outputs, adversarial examples.

With `adversarial`, adversarial examples take `weight` of the part's loss; they are made against the
network as it is, by the loss without the teacher. A teacher sees only the clean examples: its
outputs for them are right for the changed ones, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.training import Recipe
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError
from gbp_ray.training.adversarial import perturb
from gbp_ray.training.distillation import Teacher, capture_outputs
from gbp_ray.workloads.batch import Batch, forward, kind_of, logits_of
from gbp_ray.workloads.checks import blaming_labels, check_labels
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import derive_seed, seeded, take_batch
from gbp_ray.workloads.losses import count_items, cross_entropy_options, mean_loss, zero_loss

__all__ = [
    "Mix",
    "check_loss",
    "counts_of",
    "draw_mix",
    "emphases_of",
    "find_varying_counts",
    "training_loss",
]


_NUM_COUNTED = 8
"""Examples whose items are counted twice, to see whether they vary."""


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
    """Computes the mean loss of a part of a batch under a recipe and a teacher.

    Args:
        indices: (B,) the examples.
        draws: Seeds all draws of the part.
        emphasis: Weight of the labels' loss, from `emphases_of`; a teacher's counts by example.
    """
    batch = take_batch(workload, workload.train, indices, device=device, augment_seed=draws)
    targets = batch.targets
    mix = draw_mix(recipe, batch.inputs, draws)
    if mix is not None:
        batch = batch._replace(inputs=mix.inputs)
    lesson = None
    if teacher is not None:
        lesson = teacher.forward(workload, batch, indices, draws, recipe)

    def label_loss(outputs: Any) -> Tensor:
        def loss_of(targets: Any) -> Tensor:
            smoothing = recipe.label_smoothing
            if smoothing == 0:
                return mean_loss(workload, outputs, targets)
            return functional.cross_entropy(logits_of(outputs), targets, label_smoothing=smoothing)

        if emphasis == 0:
            return zero_loss(outputs)
        loss = loss_of(targets) if mix is None else mix.loss(loss_of, targets)
        return loss if emphasis == 1 else emphasis * loss

    def distilled_loss(seen: Any) -> Tensor:
        with capture_outputs(
            model, teacher.config.features if teacher is not None else ()
        ) as features:
            outputs = forward(model, workload, batch._replace(inputs=seen), recipe.precision)
        check_labels(workload, "train", indices, outputs, targets)
        loss = label_loss(outputs)
        if teacher is None or lesson is None:
            return loss
        return teacher.distilled_loss(loss, outputs, features, lesson)

    adversarial = recipe.adversarial
    with blaming_labels(workload, model, "train", indices):
        attacked: Tensor | None = None
        if adversarial.kind != "none":
            attacked = perturb(
                model,
                lambda seen: label_loss(
                    forward(model, workload, batch._replace(inputs=seen), recipe.precision)
                ),
                workload,
                batch.inputs,
                adversarial,
                derive_seed(draws, "attack"),
                "adversarial",
            )
        with seeded(derive_seed(draws, "forward")):
            if attacked is None:
                return distilled_loss(batch.inputs)
            if adversarial.weight == 1:
                return distilled_loss(attacked)
            clean = (1 - adversarial.weight) * distilled_loss(batch.inputs)
            return clean + adversarial.weight * distilled_loss(attacked)


def check_loss(recipe: Recipe, section: str, workload: Workload, batch: Batch) -> None:
    """Raises ConfigError for label smoothing and mixing that loss and inputs do not allow.

    Args:
        batch: Prepared for the network.
    """
    inputs, has_labels = batch.inputs, isinstance(batch.targets, Tensor)
    if recipe.label_smoothing > 0 and not (
        has_labels and workload.loss is functional.cross_entropy
    ):
        raise ConfigError(
            f"{section}.label_smoothing = {recipe.label_smoothing:g}: needs a workload whose loss "
            "is torch.nn.functional.cross_entropy; set it to 0"
        )
    for option in ("mixup", "cutmix"):
        value = getattr(recipe, option)
        if value > 0 and not (isinstance(inputs, Tensor) and batch.is_pair and has_labels):
            raise ConfigError(
                f"{section}.{option} = {value:g}: mixes examples that are pairs of tensors, not "
                f"{kind_of(batch.nest)}; set it to 0"
            )
    if recipe.mixup > 0 and not inputs.is_floating_point():
        raise ConfigError(
            f"{section}.mixup = {recipe.mixup:g}: needs inputs of floating point, not "
            f"{inputs.dtype}; set it to 0"
        )
    if recipe.cutmix > 0 and inputs.ndim != 4:
        raise ConfigError(
            f"{section}.cutmix = {recipe.cutmix:g}: needs images of shape (examples, channels, "
            f"height, width), not {tuple(inputs.shape)}; set it to 0"
        )


@dataclass(frozen=True)
class Mix:
    """The mixed examples of a part.

    Attributes:
        inputs: (B, ...) the mixed examples.
        share: Weight of each example in its mix, in [0, 1].
        partners: (B,) position of the example that each one is mixed with.
    """

    inputs: Tensor
    share: float
    partners: Tensor

    def loss(self, loss_of: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
        """Computes share * loss under the own targets + (1 - share) * loss under the partners'."""
        return self.share * loss_of(targets) + (1 - self.share) * loss_of(targets[self.partners])


def draw_mix(recipe: Recipe, inputs: Tensor, draws: int) -> Mix | None:
    """Mixes prepared examples under the seed `draws`; returns None if the recipe mixes nothing."""
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return None
    with seeded(derive_seed(draws, "mix")):
        is_coin_up = bool(torch.rand(()) < 0.5)
        is_mixup = recipe.mixup > 0 and (recipe.cutmix == 0 or is_coin_up)
        alpha = torch.tensor(recipe.mixup if is_mixup else recipe.cutmix, dtype=torch.float64)
        share = torch.distributions.Beta(alpha, alpha).sample().item()
        partners = torch.randperm(len(inputs)).to(inputs.device)
        if is_mixup:
            return Mix(torch.lerp(inputs[partners], inputs, share), share, partners)
        return _cut(inputs, share, partners)


def _cut(images: Tensor, share: float, partners: Tensor) -> Mix:
    """Pastes one rectangle, cut off at the border, whose whole would have 1 - share of the area."""
    height, width = images.shape[-2:]
    side = math.sqrt(1 - share)
    centre_y, centre_x = (int(torch.randint(size, ())) for size in (height, width))
    half_y, half_x = int(height * side / 2), int(width * side / 2)
    top, bottom = max(centre_y - half_y, 0), min(centre_y + half_y, height)
    left, right = max(centre_x - half_x, 0), min(centre_x + half_x, width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[partners, ..., top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (height * width)
    return Mix(mixed, 1 - pasted, partners)


def counts_of(workload: Workload, indices: Tensor, ranks: Ranks) -> Tensor | None:
    """Counts the items of training examples; None if all have the same number. Communicates.

    Args:
        indices: (n,) positions in the training split.

    Returns:
        (n,) float64 on the CPU, the same on all ranks.
    """
    # By the number of ranks: all of a group must have met the same examples.
    if (known := workload.known_counts.get(ranks.world_size)) is None:
        may_differ = ranks.run_collectively(lambda: _may_differ(workload))
        size = num_examples(workload.train) if may_differ else 0
        known = torch.full((size,), torch.nan, dtype=torch.float64)
        workload.known_counts[ranks.world_size] = known
    if not len(known):
        return None
    new = indices[known[indices].isnan()]
    if len(new):
        found = torch.zeros(len(new), dtype=torch.float64)
        own = slice(ranks.rank, None, ranks.world_size)
        found[own] = ranks.run_collectively(lambda: _count(workload, new[own]))
        known[new] = ranks.all_reduce_disjoint(found.to(ranks.device)).cpu()
    counts = known[indices]
    return None if counts[0] > 0 and bool((counts == counts[0]).all()) else counts


def emphases_of(
    workload: Workload, batch: Tensor, parts: list[Tensor] | tuple[Tensor, ...], ranks: Ranks
) -> list[float]:
    """Computes each part's share of a batch's items over its share of the examples. Communicates.

    Args:
        batch: (B,) the examples of a step.
        parts: The same, cut.
    """
    counts = counts_of(workload, batch, ranks)
    total = 0.0 if counts is None else counts.sum().item()
    if counts is None or total == 0:
        return [float(counts is None)] * len(parts)
    own = counts.split([len(part) for part in parts])
    return [
        items.sum().item() / total * (len(batch) / len(part))
        for items, part in zip(own, parts, strict=True)
    ]


def _may_differ(workload: Workload) -> bool:
    if workload.count is not None:
        return workload.count is not len
    options = cross_entropy_options(workload.loss)
    if options is None:
        return False
    if options.get("weight") is not None or options.get("ignore_index", -100) != -100:
        return True
    # Labels of positions, of which some may be ignored; an example's only one must not be.
    targets = _targets(workload, torch.zeros(1, dtype=torch.long))
    return not isinstance(targets, Tensor) or targets.ndim > 1


def find_varying_counts(workload: Workload) -> bool:
    """Returns whether examples have another number of items each time they are trained on."""
    few = torch.arange(min(_NUM_COUNTED, num_examples(workload.train)))
    if isinstance(workload.train, tuple) or not _may_differ(workload):
        return False
    found = []
    for seed in (None, 0, 1):
        batch = take_batch(workload, workload.train, few, augment_seed=seed)
        counts = count_items(workload, batch.targets)
        found.append(None if counts is None else counts.tolist())
    return any(counts != found[0] for counts in found)


def _count(workload: Workload, indices: Tensor) -> Tensor:
    counts = [torch.zeros(0, dtype=torch.float64)]
    # One by one, as a data set's items may be large.
    size = len(indices) if isinstance(workload.train, tuple) else 1
    for part in indices.split(max(1, size)) if len(indices) else ():
        found = count_items(workload, _targets(workload, part))
        counts.append(torch.ones(len(part), dtype=torch.float64) if found is None else found.cpu())
    return torch.cat(counts)


def _targets(workload: Workload, indices: Tensor) -> Any:
    raw = take_batch(replace(workload, prepare=None), workload.train, indices)
    # Of pairs `prepare` is given the inputs only; of other batches it may make the labels.
    if raw.is_pair or workload.prepare is None:
        return raw.targets
    return take_batch(workload, workload.train, indices).targets
