"""Training, evaluation and BatchNorm re-estimation of masked networks, the same on any W.

An optimizer step sees one batch, cut into `microbatches` parts. A part is computed whole on one
rank, and the parts' gradients are added in part order (`gradients.GradientSums`), so a step gives
the same bits on any number of workers, and on replicated and sharded networks. BatchNorm normalises
each part by itself; its running statistics move by the mean of what the parts would have done.

Pruned weights stay exactly zero without being reset: their gradients and the optimizer's state for
them are zero, so momentum has nothing to carry, and decay of a zero is a zero.

Shape suffixes: L = weights of one slice, flat; B = buffer elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer

from gbp_ray.config import DistillationConfig, Recipe
from gbp_ray.errors import PruneError
from gbp_ray.pruning.gradients import GradientSums
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.ranks import OrderedSum, Ranks, buffer_slots, isolated
from gbp_ray.pruning.sharding import is_shard, is_sharded, leaves, local
from gbp_ray.pruning.slices import cut_rows
from gbp_ray.workload import (
    Workload,
    blaming_labels,
    check_finite,
    check_labels,
    cut_batches,
    derive_seed,
    num_examples,
    seeded,
    shuffled_indices,
    take_batch,
)

__all__ = [
    "Span",
    "Teacher",
    "check_pruned_zero",
    "distillation_loss",
    "evaluate",
    "forget_pruned",
    "learning_rate",
    "make_optimizer",
    "num_steps",
    "recalibrate_batchnorm",
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


@dataclass(frozen=True)
class Teacher:
    """A network whose outputs the one in training learns to give; never trained itself."""

    model: nn.Module
    config: DistillationConfig


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
    """Builds the optimizer of a recipe over the trainable parameters.

    Raises:
        PruneError: No parameter is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
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
    for name, parameter in model.named_parameters():
        if name in masks:
            for key, value in _state_like(optimizer, parameter).items():
                if bool(torch.any(local(value)[~local(masks[name])] != 0)):
                    raise PruneError(
                        f"'{name}': optimizer state '{key}' of a pruned weight is not 0"
                    )


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
    tell: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> float:
    """Trains over a span of steps, keeping pruned weights at zero. Communicates.

    Args:
        masks: Pruned weights; None trains all.
        teacher: Adds its outputs to what is learnt; it sees the same augmented examples.
        movement: Given the gradients of each step by parameter name, before the weights move.
        tell: Called after each step with (steps done, steps in all, loss).

    Returns:
        Mean training loss over the last tenth of the span, NaN for an empty span.

    Raises:
        PruneError: The loss or a gradient is not finite; on every rank, before weights move.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differentiated = leaves(model)
    pieces = {n: cut_rows(n, p.shape, ranks.world_size) for n, p in trainable.items()}
    buffers = _Buffers(model, ranks.device)
    kept = [(trainable[n], mask) for n, mask in (masks or {}).items() if n in trainable]
    warmup = round(recipe.warmup_epochs * _steps_per_epoch(recipe, workload))
    model.train()
    recent: list[float] = []
    for done, step in enumerate(span.steps, start=1):
        batch = _batch_of_step(recipe, workload, seed, span.phase, step)
        parts = batch.tensor_split(min(recipe.microbatches, len(batch)))
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
        buffers.remember()
        with sums.listening():
            for item in ranks.deal(len(parts)):
                beside: Tensor | None = None
                with sums.turn():
                    # All ranks pass through a sharded network; one without a part for nothing.
                    number = 0 if item is None and is_sharded(model) else item
                    if number is not None:
                        part, draws = parts[number], derive_seed(seed, span.phase, step, number)
                        loss = _loss_of(model, workload, teacher, part, draws, ranks.device)
                        loss.backward()
                        beside = torch.cat([buffers.collect_change(), loss.detach().view(1)])
                        beside *= len(part) / len(batch)
                besides.add(None if item is None else beside)
        gradients = sums.totals()
        moved_B, loss_1 = besides.result().split([buffers.size, 1])
        _refuse_non_finite(loss_1, gradients, span, step, recipe, ranks)
        for name, parameter in trainable.items():
            parameter.grad = gradients[name]
        if movement is not None:
            movement(gradients)
        for parameter, mask in kept:
            assert parameter.grad is not None
            local(parameter.grad).masked_fill_(~local(mask), 0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                recipe, step - span.planned.start, len(span.planned), warmup
            )
        optimizer.step()
        buffers.move(moved_B)
        recent.append(loss_1.item())
        tell(done, len(span.steps), recent[-1])
    for parameter in trainable.values():
        parameter.grad = None
    tail = recent[-max(1, len(recent) // 10) :]
    return sum(tail) / len(tail) if tail else math.nan


def _batch_of_step(recipe: Recipe, workload: Workload, seed: int, phase: str, step: int) -> Tensor:
    epoch, position = divmod(step, _steps_per_epoch(recipe, workload))
    order = _epoch_order(num_examples(workload.train), derive_seed(seed, phase, "epoch", epoch))
    return order[position * recipe.batch_size : (position + 1) * recipe.batch_size]


@lru_cache(maxsize=2)
def _epoch_order(total: int, seed: int) -> Tensor:
    return shuffled_indices(total, seed)


def _loss_of(
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


def _refuse_non_finite(
    loss_1: Tensor,
    gradients: Mapping[str, Tensor],
    span: Span,
    step: int,
    recipe: Recipe,
    ranks: Ranks,
) -> None:
    is_bad = [not bool(torch.isfinite(local(gradient)).all()) for gradient in gradients.values()]
    if any(is_shard(gradient) for gradient in gradients.values()):
        # Each rank has seen its own rows alone.
        is_bad = ranks.add_up(torch.tensor(is_bad, dtype=torch.int64)).bool().tolist()
    if bool(torch.isfinite(loss_1).all()) and not any(is_bad):
        return
    what = f"loss is {loss_1.item():g}"
    if bool(torch.isfinite(loss_1).all()):
        culprit = next(name for name, bad in zip(gradients, is_bad, strict=True) if bad)
        what = f"gradient of '{culprit}' is not finite"
    section = span.phase
    raise PruneError(
        f"{section}: {what} at step {step - span.steps.start + 1} of {len(span.steps)}; lower "
        f"{section}.learning_rate = {recipe.learning_rate:g} or check the data for NaN"
    )


class _Buffers:
    """The buffers of a model that a forward pass may change, as one flat vector.

    Each part of a batch starts from the same values; the step moves floating-point buffers (running
    statistics) by the mean change, and integer scalars that changed (counters of batches seen) by
    one. A change of exactly zero leaves constants untouched, bit for bit.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._slots = buffer_slots(model)
        buffers = list({id(buffer): buffer for _, _, buffer in self._slots}.values())
        self._floating = [b for b in buffers if b.is_floating_point()]
        self._counters = [b for b in buffers if b.ndim == 0 and b.dtype is torch.int64]
        self._all = buffers
        self._device = device
        self._before: dict[Tensor, Tensor] = {}
        self.size = sum(b.numel() for b in self._floating) + len(self._counters)
        kinds = (tensor.dtype for tensor in (*self._floating, *model.parameters()))
        self.dtype = reduce(torch.promote_types, kinds, torch.float32)

    def remember(self) -> None:
        self._before = {b: b.clone() for b in self._all}

    @torch.no_grad()
    def collect_change(self) -> Tensor:
        """Returns (B,) what a forward pass changed, and undoes it."""
        for owner, name, buffer in self._slots:
            found, owner[name] = owner[name], buffer
            if found is not None and found is not buffer and found.shape == buffer.shape:
                buffer.copy_(found)
        changes = [torch.zeros(0, device=self._device)]
        for buffer in self._floating:
            before = self._before[buffer]
            # Infinity minus itself is NaN, and attention masks hold infinities.
            changes.append((buffer - before).masked_fill(buffer == before, 0).reshape(-1))
        for counter in self._counters:
            changes.append((counter != self._before[counter]).float().view(1))
        self._restore()
        return torch.cat(changes)

    @torch.no_grad()
    def move(self, change_B: Tensor) -> None:
        """Moves by the step's change."""
        self._restore()
        pieces = change_B.split(
            [*(b.numel() for b in self._floating), *(1 for _ in self._counters)]
        )
        moved = zip([*self._floating, *self._counters], pieces, strict=True)
        for buffer, piece in moved:
            change = piece.view_as(buffer)
            if buffer.is_floating_point():
                # -0.0 plus 0.0 would lose its sign.
                buffer.copy_(torch.where(change == 0, buffer, buffer + change))
            else:
                buffer += change > 0

    def _restore(self) -> None:
        for buffer, before in self._before.items():
            buffer.copy_(before)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    batch_size: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, float]:
    """Measures accuracy and mean loss on the test split, each example once. Communicates.

    Returns:
        (accuracy in [0, 1], mean loss).

    Raises:
        WorkloadError: An input or a target is NaN or infinite and the loss with it, or a label is
            out of range; on every rank, naming the example.
    """
    total = num_examples(workload.test)
    batches = cut_batches(total, batch_size)
    losses = torch.zeros(len(batches), dtype=torch.float64, device=ranks.device)
    correct = torch.zeros((), dtype=torch.int64, device=ranks.device)
    model.eval()

    def measure(item: int) -> None:
        indices = torch.arange(batches[item].start, batches[item].stop)
        inputs, targets = take_batch(workload, workload.test, indices, device=ranks.device)
        with blaming_labels(workload, model, "test", indices):
            with isolated(model, derive_seed("evaluate", item)):
                outputs = model(inputs)
            check_labels(workload, "test", indices, outputs, targets)
            losses[item] = workload.loss(outputs, targets).double() * len(indices)
        correct.add_(workload.count_correct(outputs, targets))

    def measure_own() -> None:
        for turn, item in enumerate(ranks.deal(len(batches))):
            if item is not None:
                measure(item)
            tell(min((turn + 1) * ranks.world_size, len(batches)), len(batches))
        for item in (~torch.isfinite(losses)).nonzero().flatten().tolist():
            check_finite(workload, "test", torch.arange(batches[item].start, batches[item].stop))

    # Nothing is exchanged before the end, so a rank that fails must not leave the others there.
    ranks.together(measure_own)
    losses, correct = ranks.fill_in(losses), ranks.fill_in(correct)
    return correct.item() / total, losses.sum().item() / total


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    *,
    examples: int,
    batch_size: int,
    seed: int,
) -> int:
    """Re-estimates BatchNorm's running statistics on training examples, augmented as in training.

    Pruning shifts what each layer receives; stale statistics alone can cost most of the accuracy.
    So can statistics of clean images: the weights were trained beside those of augmented ones, and
    a CIFAR-10 ResNet-20 loses 2.5 points at once when only its statistics change to clean ones.
    Running mean and variance become the mean over batches of the batch statistics, and where a
    module is called several times in a forward pass, of each of its calls. Communicates.

    Returns:
        Examples used; 0 where the model has no running statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    available = num_examples(workload.train)
    examples = min(examples, available)
    # One example has no variance over a batch.
    batches = [b for b in cut_batches(examples, batch_size) if len(b) > 1]
    if not norms or not batches:
        return 0
    chosen = shuffled_indices(available, derive_seed(seed, "batchnorm"))[:examples]
    statistics = [s for n in norms for s in (n.running_mean, n.running_var) if s is not None]
    momenta = [norm.momentum for norm in norms]
    wire_dtype = torch.promote_types(statistics[0].dtype, torch.float32)
    sums = OrderedSum(
        ranks, sum(s.numel() for s in statistics), len(batches), torch.float64, wire_dtype
    )
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    for item in ranks.deal(len(batches)):
        vector: Tensor | None = None
        if item is not None:
            batch = batches[item]
            indices = chosen[batch.start : batch.stop]
            draws = derive_seed(seed, "batchnorm", item)
            with sums.attempt():
                inputs, _ = take_batch(
                    workload, workload.train, indices, device=ranks.device, augment_seed=draws
                )
                with isolated(model, derive_seed(draws, "forward")), _averaged_over_calls(norms):
                    model(inputs)
                    vector = torch.cat([s.reshape(-1) for s in statistics]) * len(batch)
        sums.add(vector)
    total = sum(len(batch) for batch in batches)
    means = (sums.result() / total).split([s.numel() for s in statistics])
    for statistic, mean in zip(statistics, means, strict=True):
        statistic.copy_(mean.view_as(statistic))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    return total


@contextmanager
def _averaged_over_calls(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Makes the running statistics the mean over a module's calls in the block.

    With a momentum of 1 they are those of the last call alone. A single call keeps its bits.
    """
    means: dict[_BatchNorm, tuple[int, list[Tensor]]] = {}

    def note(norm: nn.Module, inputs: object, outputs: object) -> None:
        assert isinstance(norm, _BatchNorm)
        own = [s for s in (norm.running_mean, norm.running_var) if s is not None]
        calls, earlier = means.get(norm, (0, own))
        if calls:
            for statistic, mean in zip(own, earlier, strict=True):
                statistic.lerp_(mean, calls / (calls + 1))
        means[norm] = calls + 1, [statistic.clone() for statistic in own]

    hooks = [norm.register_forward_hook(note) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
