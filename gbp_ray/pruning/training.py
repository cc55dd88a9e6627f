"""Training of masked networks, the same on any number of workers W.

An optimizer step sees one batch, cut into `microbatches` parts. A part is computed whole on one
rank, and the parts' gradients are added in part order (`folding.GradientSums`), so a step gives
the same bits on any number of workers, and on replicated and sharded networks. BatchNorm normalises
each part by itself; its running statistics move by the mean of what the parts would have done
(`buffers` says what becomes of others).

What shapes a step beside the loss (`objective`): its gradient may be clipped (`clipping`), and the
weights averaged over the steps of a training (`averaging`).

Pruned weights stay exactly zero without being reset: their gradients and the optimizer's state for
them are zero, so momentum has nothing to carry, and decay of a zero is a zero.

Shape suffixes: L = weights of one slice, flat; B = as in `buffers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from gbp_ray.config import Recipe
from gbp_ray.errors import PruneError
from gbp_ray.pruning.averaging import MovingAverage
from gbp_ray.pruning.buffers import TrainedBuffers
from gbp_ray.pruning.causes import why_not_finite
from gbp_ray.pruning.clipping import clip_gradients
from gbp_ray.pruning.folding import GradientSums
from gbp_ray.pruning.freezing import trainable_parameters, training_mode
from gbp_ray.pruning.item_counts import emphases_of
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.objective import Teacher, training_loss
from gbp_ray.pruning.ranks import OrderedSum, Ranks
from gbp_ray.pruning.sharding import add_over_ranks, is_shard, is_sharded, leaves, local
from gbp_ray.pruning.slices import cut_rows
from gbp_ray.workload import (
    Workload,
    derive_seed,
    num_examples,
    shuffled_indices,
)
from gbp_ray.workload_checks import check_finite

__all__ = [
    "Span",
    "check_pruned_zero",
    "forget_pruned",
    "learning_rate",
    "make_optimizer",
    "num_steps",
    "train_epochs",
]


@dataclass(frozen=True)
class Span:
    """Which optimizer steps to take, and which stretch the learning rate is planned over.

    Attributes:
        phase: Name of the training ("pretrain", "finetune"); part of every random draw.
        steps: Numbers of the steps to take; examples go on where an earlier span ended.
        planned: All steps of the learning rate's schedule; contains `steps`.
    """

    phase: str
    steps: range
    planned: range


def num_steps(recipe: Recipe, workload: Workload, epochs: float) -> int:
    """Converts epochs to optimizer steps; any epochs above zero make at least one step."""
    if epochs == 0:
        return 0
    return max(1, round(epochs * _steps_per_epoch(recipe, workload)))


def _steps_per_epoch(recipe: Recipe, workload: Workload) -> int:
    # The examples left over from whole batches wait for the next epoch's order: a lone example
    # would break BatchNorm.
    return max(1, num_examples(workload.train) // recipe.batch_size)


def learning_rate(recipe: Recipe, step: int, total: int, warmup: int) -> float:
    """Computes the learning rate of a step.

    Args:
        step: 0 <= step < total.
        total: Steps of the whole schedule, the warm-up included.
        warmup: Steps of linear warm-up; the last of them has the full rate.
    """
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    if recipe.lr_schedule == "cosine":
        return recipe.learning_rate * (1 + math.cos(math.pi * share)) / 2
    if recipe.lr_schedule == "step":
        drops = sum(share >= milestone for milestone in recipe.lr_milestones)
        return recipe.learning_rate * recipe.lr_gamma**drops
    return recipe.learning_rate


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Builds the optimizer of a recipe over the parameters that it trains.

    Raises:
        PruneError: No parameter is trainable.
    """
    trainable = list(trainable_parameters(model, recipe.freeze).values())
    if not trainable:
        raise PruneError(
            "the model has no parameter that requires a gradient, so it cannot be trained; set "
            "pretrain.epochs and finetune.epochs to 0"
        )
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return SGD(trainable, lr=rate, momentum=recipe.momentum, weight_decay=decay)
    if recipe.optimizer == "adam":
        return Adam(trainable, lr=rate, weight_decay=decay)
    return AdamW(trainable, lr=rate, weight_decay=decay)


@torch.no_grad()
def forget_pruned(model: nn.Module, optimizer: Optimizer, masks: MaskSet) -> None:
    """Zeroes the optimizer's state (momentum, second moments) of pruned weights."""
    for name, parameter in model.named_parameters():
        if name in masks:
            for value in _state_like(optimizer, parameter).values():
                local(value).masked_fill_(~local(masks[name]), 0)


def check_pruned_zero(model: nn.Module, optimizer: Optimizer | None, masks: MaskSet) -> None:
    """Makes sure that pruned weights, and the optimizer's state for them, are exactly zero.

    Raises:
        PruneError: Naming the first parameter that is not.
    """
    revived = masks.find_revived(model)
    if revived is not None:
        raise PruneError(f"'{revived}': a pruned weight came back to life during training")
    if optimizer is None:
        return
    found: list[tuple[str, str, int]] = []
    for name, parameter in model.named_parameters():
        if name in masks:
            for key, value in _state_like(optimizer, parameter).items():
                pruned = ~local(masks[name])
                found.append((name, key, int(torch.any(local(value)[pruned] != 0))))
    everywhere = add_over_ranks([number for *_, number in found], masks.values())
    for (name, key, _), number in zip(found, everywhere, strict=True):
        if number:
            raise PruneError(f"'{name}': optimizer state '{key}' of a pruned weight is not 0")


def _state_like(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


def train_epochs(
    model: nn.Module,
    workload: Workload,
    recipe: Recipe,
    ranks: Ranks,
    optimizer: Optimizer,
    span: Span,
    *,
    seed: int,
    masks: MaskSet | None = None,
    teacher: Teacher | None = None,
    movement: Callable[[dict[str, Tensor]], None] | None = None,
    average: MovingAverage | None = None,
    tell: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> float:
    """Trains over a span of steps, keeping pruned weights at zero. Communicates.

    Args:
        masks: Pruned weights; None trains all.
        teacher: Adds its outputs to what is learnt; it sees the same augmented examples.
        movement: Given the gradients of each step by parameter name, before the weights move.
        average: Goes on with this one, and leaves the weights in place. None makes one where the
            recipe asks for it, which takes their place at the end.
        tell: Called after each step with (steps done, steps in all, loss).

    Returns:
        Mean training loss over the last tenth of the span, NaN for an empty span.

    Raises:
        PruneError: The loss or a gradient is not finite; on every rank, before weights move.
        WorkloadError: It is not, and an example of the batch holds NaN or infinity.
    """
    trainable = trainable_parameters(model, recipe.freeze)
    differentiated = leaves(model)
    pieces = {n: cut_rows(n, p.shape, ranks.world_size) for n, p in trainable.items()}
    buffers = TrainedBuffers(model, ranks.device)
    kept = [(trainable[n], mask) for n, mask in (masks or {}).items() if n in trainable]
    warmup = round(recipe.warmup_epochs * _steps_per_epoch(recipe, workload))
    own: MovingAverage | None = None
    if average is None and recipe.ema_decay > 0:
        average = own = MovingAverage(model, recipe.ema_decay)
    recent: list[float] = []
    for done, step in enumerate(span.steps, start=1):
        batch = _batch_of_step(recipe, workload, seed, span.phase, step)
        parts = batch.tensor_split(min(recipe.microbatches, len(batch)))
        emphases = emphases_of(workload, batch, parts, ranks)
        sums = GradientSums(
            ranks,
            trainable,
            {name: differentiated[name] for name in trainable},
            pieces,
            [len(part) / len(batch) for part in parts],
            lambda gradient_L, weight_L, share: gradient_L * share,
            is_sharded=is_sharded(model),
        )
        besides = OrderedSum(ranks, buffers.size + 1, len(parts), buffers.dtype, buffers.dtype)
        buffers.remember(len(parts))
        with training_mode(model, recipe.freeze), sums.listening():
            for item in ranks.deal(len(parts)):
                beside: Tensor | None = None
                with sums.turn():
                    # All ranks pass through a sharded network; one without a part for nothing.
                    number = 0 if item is None and is_sharded(model) else item
                    if number is not None:
                        part, draws = parts[number], derive_seed(seed, span.phase, step, number)
                        loss = training_loss(
                            *(model, workload, recipe, teacher, part, draws, ranks.device),
                            emphasis=emphases[number],
                        )
                        loss.backward()
                        beside = torch.cat([buffers.collect(number), loss.detach().view(1)])
                        beside *= len(part) / len(batch)
                besides.add(None if item is None else beside)
        gradients = sums.totals()
        joined_B, loss_1 = besides.result().split([buffers.size, 1])
        _refuse_non_finite(
            loss_1, gradients, span, step, recipe, ranks, masks or {}, workload, batch
        )
        reached = sums.reached()
        for name, parameter in trainable.items():
            # As torch does, what no part of the batch uses is left alone: no decay, no momentum.
            parameter.grad = gradients[name] if name in reached else None
        if movement is not None:
            movement(gradients)
        for parameter, mask in kept:
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(~local(mask), 0)
        if recipe.max_gradient_norm is not None:
            clip_gradients(gradients.values(), recipe.max_gradient_norm, ranks)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                recipe, step - span.planned.start, len(span.planned), warmup
            )
        optimizer.step()
        buffers.settle(joined_B, ranks)
        if average is not None:
            average.update()
        # A batch without any label has no loss.
        recent += [loss_1.item()] * any(emphases)
        tell(done, len(span.steps), loss_1.item())
    for parameter in trainable.values():
        parameter.grad = None
    if own is not None:
        own.trade_places()
    tail = recent[-max(1, len(recent) // 10) :]
    return sum(tail) / len(tail) if tail else math.nan


def _batch_of_step(recipe: Recipe, workload: Workload, seed: int, phase: str, step: int) -> Tensor:
    epoch, position = divmod(step, _steps_per_epoch(recipe, workload))
    order = _epoch_order(num_examples(workload.train), derive_seed(seed, phase, "epoch", epoch))
    return order[position * recipe.batch_size : (position + 1) * recipe.batch_size]


@lru_cache(maxsize=2)
def _epoch_order(total: int, seed: int) -> Tensor:
    return shuffled_indices(total, seed)


def _refuse_non_finite(
    loss_1: Tensor,
    gradients: Mapping[str, Tensor],
    span: Span,
    step: int,
    recipe: Recipe,
    ranks: Ranks,
    masks: Mapping[str, Tensor],
    workload: Workload,
    batch: Tensor,
) -> None:
    # Read at once: on a GPU every look waits for it.
    are_finite = [torch.isfinite(local(gradient)).all() for gradient in gradients.values()]
    is_bad = torch.stack(are_finite).logical_not().tolist()
    if any(is_shard(gradient) for gradient in gradients.values()):
        # Each rank has seen its own rows alone.
        is_bad = ranks.add_up(torch.tensor(is_bad, dtype=torch.int64)).bool().tolist()
    if bool(torch.isfinite(loss_1).all()) and not any(is_bad):
        return
    check_finite(workload, "train", batch)
    what = f"loss is {loss_1.item():g}"
    if bool(torch.isfinite(loss_1).all()):
        culprit = next(name for name, bad in zip(gradients, is_bad, strict=True) if bad)
        what = f"gradient of '{culprit}' is not finite"
    section = span.phase
    remedy = f"lower {section}.learning_rate = {recipe.learning_rate:g} or check the data for NaN"
    if why := why_not_finite(masks):
        # After the first step the rate may be to blame as well.
        remedy = why if step == span.steps.start else f"{why}; or {remedy}"
    raise PruneError(
        f"{section}: {what} at step {step - span.steps.start + 1} of {len(span.steps)}; {remedy}"
    )
