"""Training of masked networks, the same on any number of ranks.

An optimizer step sees one batch, cut into microbatches. Each is computed whole on one rank, and
their gradients are added in order (`GradientReducer`), so a step gives the same bits on any number
of ranks, for replicated and sharded networks. BatchNorm normalises each microbatch by itself; its
running statistics move by the mean of their changes (`buffers` defines it for other buffers).

Pruned weights stay exactly zero without being reset: their gradients and the optimizer's state for
them are zero, so momentum adds nothing, and decay of a zero is a zero.

Shape suffixes: L = weights of one slice, flat; B = as in `buffers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gbp_ray.config.training import Recipe
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import cut_rows, is_shard, is_sharded, leaves, local
from gbp_ray.distributed.sums import GradientReducer, OrderedSum
from gbp_ray.errors import PruneError
from gbp_ray.training.buffers import TrainedBuffers
from gbp_ray.training.distillation import Teacher
from gbp_ray.training.evaluation import Evaluation
from gbp_ray.training.loss import emphases_of, training_loss
from gbp_ray.training.non_finite import why_not_finite
from gbp_ray.training.optimizer import (
    MovingAverage,
    clip_gradients,
    learning_rate,
    steps_per_epoch,
    trainable_parameters,
    training_mode,
)
from gbp_ray.training.progress import OnProgress, Progress, ignore_progress
from gbp_ray.workloads.checks import check_finite
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import derive_seed, shuffled_indices
from gbp_ray.workloads.weights import tensor_state

__all__ = ["Outcome", "Span", "train_epochs", "train_until_stale"]


@dataclass(frozen=True)
class Span:
    """The optimizer steps to take, and those that the learning rate's schedule covers.

    Attributes:
        phase: Name of the training ("pretrain", "finetune"); part of every random draw.
        steps: Numbers of the steps to take; the order of examples continues from earlier spans.
        planned: All steps of the schedule; contains `steps`.
    """

    phase: str
    steps: range
    planned: range


def train_epochs(
    model: nn.Module,
    workload: Workload,
    recipe: Recipe,
    ranks: Ranks,
    optimizer: Optimizer,
    span: Span,
    *,
    seed: int,
    masks: Mapping[str, Tensor] | None = None,
    teacher: Teacher | None = None,
    movement: Callable[[dict[str, Tensor]], None] | None = None,
    average: MovingAverage | None = None,
    on_progress: OnProgress = ignore_progress,
) -> float:
    """Trains over a span of steps, keeping pruned weights at zero. Communicates.

    Args:
        masks: None trains all weights.
        teacher: Adds the loss of distillation; it sees the same augmented examples.
        movement: Called with the gradients of each step by name, before the weights change.
        average: Updated, without replacing the weights. None makes one where the recipe asks for
            it, which replaces the weights at the end.

    Returns:
        Mean training loss over the last tenth of the span, NaN for an empty span.

    Raises:
        PruneError: The loss or a gradient is not finite; on every rank, before weights change.
        WorkloadError: So is an example of the batch.
    """
    trainable = trainable_parameters(model, recipe.freeze)
    differentiated = leaves(model)
    slices = {n: cut_rows(n, p.shape, ranks.world_size) for n, p in trainable.items()}
    buffers = TrainedBuffers(model, ranks.device)
    kept = [(trainable[n], mask) for n, mask in (masks or {}).items() if n in trainable]
    warmup = round(recipe.warmup_epochs * steps_per_epoch(recipe, workload))
    own: MovingAverage | None = None
    if average is None and recipe.ema_decay > 0:
        average = own = MovingAverage(model, recipe.ema_decay)
    recent: list[float] = []
    for done, step in enumerate(span.steps, start=1):
        batch = _batch_of_step(recipe, workload, seed, span.phase, step)
        microbatches = batch.tensor_split(min(recipe.microbatches, len(batch)))
        emphases = emphases_of(workload, batch, microbatches, ranks)
        sums = GradientReducer(
            ranks,
            trainable,
            {name: differentiated[name] for name in trainable},
            slices,
            [len(microbatch) / len(batch) for microbatch in microbatches],
            lambda gradient_L, weight_L, share: gradient_L * share,
            is_sharded=is_sharded(model),
        )
        num_extras = buffers.size + 1
        extras_sum = OrderedSum(ranks, num_extras, len(microbatches), buffers.dtype, buffers.dtype)
        buffers.remember(len(microbatches))
        with training_mode(model, recipe.freeze), sums.listening():
            for item in ranks.deal(len(microbatches)):
                extras: Tensor | None = None
                with sums.turn():
                    # All ranks pass through a sharded network; one without an item uses item 0.
                    number = 0 if item is None and is_sharded(model) else item
                    if number is not None:
                        microbatch = microbatches[number]
                        draws = derive_seed(seed, span.phase, step, number)
                        loss = training_loss(
                            *(model, workload, recipe, teacher, microbatch, draws, ranks.device),
                            emphasis=emphases[number],
                        )
                        loss.backward()
                        extras = torch.cat([buffers.collect(number), loss.detach().view(1)])
                        extras *= len(microbatch) / len(batch)
                extras_sum.add(None if item is None else extras)
        gradients = sums.totals()
        buffer_delta_B, loss_1 = extras_sum.result().split([buffers.size, 1])
        if fault := _find_non_finite(loss_1, gradients, ranks):
            check_finite(workload, "train", batch)
            remedy = (
                f"lower {span.phase}.learning_rate = {recipe.learning_rate:g} or check the data "
                "for NaN"
            )
            if why := why_not_finite(masks or {}):
                # After the first step the learning rate may be the cause as well.
                remedy = why if done == 1 else f"{why}; or {remedy}"
            raise PruneError(f"{span.phase}: {fault} at step {done} of {len(span.steps)}; {remedy}")
        reached = sums.reached()
        for name, parameter in trainable.items():
            # As in torch, a parameter that no microbatch uses gets no decay and no momentum.
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
        buffers.settle(buffer_delta_B, ranks)
        if average is not None:
            average.update()
        # A batch without any label has no loss.
        recent += [loss_1.item()] * any(emphases)
        on_progress(Progress(span.phase, done, len(span.steps), loss_1.item()))
    for parameter in trainable.values():
        parameter.grad = None
    if own is not None:
        own.swap()
    tail = recent[-max(1, len(recent) // 10) :]
    return sum(tail) / len(tail) if tail else math.nan


def _batch_of_step(recipe: Recipe, workload: Workload, seed: int, phase: str, step: int) -> Tensor:
    epoch, position = divmod(step, steps_per_epoch(recipe, workload))
    order = _epoch_order(num_examples(workload.train), derive_seed(seed, phase, "epoch", epoch))
    return order[position * recipe.batch_size : (position + 1) * recipe.batch_size]


@lru_cache(maxsize=2)
def _epoch_order(total: int, seed: int) -> Tensor:
    return shuffled_indices(total, seed)


def _find_non_finite(loss_1: Tensor, gradients: Mapping[str, Tensor], ranks: Ranks) -> str | None:
    # Read together: on a GPU each read waits for it.
    are_finite = [torch.isfinite(local(gradient)).all() for gradient in gradients.values()]
    is_bad = torch.stack(are_finite).logical_not().tolist()
    if any(is_shard(gradient) for gradient in gradients.values()):
        # Each rank has checked only its own rows.
        is_bad = ranks.all_reduce_counts(torch.tensor(is_bad, dtype=torch.int64)).bool().tolist()
    if not bool(torch.isfinite(loss_1).all()):
        return f"loss is {loss_1.item():g}"
    bad = (name for name, is_bad_one in zip(gradients, is_bad, strict=True) if is_bad_one)
    return next((f"gradient of '{name}' is not finite" for name in bad), None)


@dataclass(frozen=True)
class Outcome:
    """The end of a training that may have stopped early.

    Attributes:
        kept_step: Steps after which the network was kept; 0 is the start.
        validation: Of that network, on examples that are not trained on.
        train_loss: Of the last steps trained; NaN without any.
    """

    kept_step: int
    validation: Evaluation
    train_loss: float


def train_until_stale(
    model: nn.Module,
    optimizer: Optimizer,
    steps: range,
    *,
    every: int,
    patience: int,
    train: Callable[[range], float],
    validate: Callable[[], Evaluation],
    start: Evaluation,
    rank: Callable[[float], float],
) -> Outcome:
    """Trains until `patience` validations in a row were no better, or to the end; keeps the best.

    Better is a better score, and of equals less loss.

    Args:
        steps: All that may be taken.
        every: Steps between validations; the last step is validated, too.
        train: Takes some steps, and returns their training loss.
        start: The validation before the first step.
        rank: Gives the greater number for the better score.
    """

    def merit(found: Evaluation) -> tuple[float, float]:
        return rank(found.score), -found.loss

    best, kept_step, kept = start, 0, _Snapshot(model, optimizer)
    stale, done, train_loss = 0, 0, math.nan
    while done < len(steps) and stale < patience:
        next_steps = steps[done : done + every]
        train_loss = train(next_steps)
        done += len(next_steps)
        found = validate()
        if merit(found) > merit(best):
            best, kept_step, stale = found, done, 0
            kept = _Snapshot(model, optimizer)
        else:
            stale += 1
    if kept_step < done:
        kept.restore()
    return Outcome(kept_step, best, train_loss)


class _Snapshot:
    """A copy of a network and its optimizer's state; of a sharded one this rank's rows."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._tensors = {name: t.detach().clone() for name, t in tensor_state(model).items()}
        self._state = {
            parameter: {
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in state.items()
            }
            for parameter, state in optimizer.state.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        for name, tensor in tensor_state(self._model).items():
            tensor.copy_(self._tensors[name])
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
