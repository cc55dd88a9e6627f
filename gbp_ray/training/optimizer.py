"""Optimizers, learning rates, gradient clipping, frozen parameters, and the average of the weights.

The exponential moving average starts anew with each training (pretrain, or the fine-tuning of a
round), from the weights at its start. After the last step it replaces the weights; where early
stopping validates the network before that, only for the validation. So one network is evaluated,
stored, scored and trained on: masks are never decided on weights that nobody keeps. A round's files
hold all that the next one needs. Pruned weights are zero in every term, hence in the average.

A short training would hardly leave its start behind, so the decay of step t is at most
(1 + t) / (10 + t). Running statistics are averaged alike, counters are those of the last step.

Each rank averages what it holds, element by element: the same bits for sharded networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer

from gbp_ray.config.schema import is_matched, match_names, nearest_glob
from gbp_ray.config.training import Recipe
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import cut_rows, is_shard, local, only_requiring
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.workloads.contract import Workload, num_examples

__all__ = [
    "MovingAverage",
    "check_freeze",
    "clip_gradients",
    "gradient_norm",
    "learning_rate",
    "make_optimizer",
    "num_steps",
    "steps_per_epoch",
    "trainable_parameters",
    "training_mode",
]


class MovingAverage:
    """The average of a model's trainable parameters and of its floating-point buffers.

    Args:
        decay: Weight of the old average in a step, at most.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._num_steps = 0
        averaged = [local(p.detach()) for p in model.parameters() if p.requires_grad]
        averaged += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._pairs: list[tuple[Tensor, Tensor]] = [(now, now.clone()) for now in averaged]

    @torch.no_grad()
    def update(self) -> None:
        """Adds the weights after a step to the average."""
        self._num_steps += 1
        decay = min(self._decay, (1 + self._num_steps) / (10 + self._num_steps))
        for now, average in self._pairs:
            # Separate operations round the same way everywhere; a fused one, not at a shard's end.
            moved = average + (now - average) * (1 - decay)
            # Infinity minus itself is NaN, and attention masks hold infinities. A value that was
            # infinite before the first step starts its average after it.
            moved = torch.where(now == average, average, moved)
            average.copy_(torch.where(torch.isfinite(average), moved, now))

    @torch.no_grad()
    def swap(self) -> None:
        """Swaps the average and the weights."""
        for now, average in self._pairs:
            kept = now.clone()
            now.copy_(average)
            average.copy_(kept)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Swaps the weights in for the block, and the average after it."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


@torch.no_grad()
def clip_gradients(gradients: Iterable[Tensor], max_norm: float, ranks: Ranks) -> float:
    """Scales gradients in place where their common norm exceeds `max_norm`; returns the norm.

    Communicates where they are shards.
    """
    gradients = list(gradients)
    norm = gradient_norm(gradients, ranks)
    if norm > max_norm:
        for gradient in gradients:
            local(gradient).mul_(max_norm / norm)
    return norm


@torch.no_grad()
def gradient_norm(gradients: Iterable[Tensor], ranks: Ranks) -> float:
    """Computes the Euclidean norm over all gradients. Communicates where they are shards."""
    sums = [_sums_of_rows(gradient, ranks) for gradient in gradients]
    return math.sqrt(_sum_pairwise(torch.cat(sums).view(1, -1)).item()) if sums else 0.0


def _sums_of_rows(gradient: Tensor, ranks: Ranks) -> Tensor:
    """Sums the squares of each row, (rows,), on every rank."""
    rows = local(gradient)
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    num_rows = rows.shape[0] if rows.ndim else 1
    squares = rows.to(torch.float64, copy=True).square_()
    own = _sum_pairwise(squares.view(num_rows, -1)) if rows.numel() else squares.new_zeros(num_rows)
    if not is_shard(gradient):
        return own
    rank_slice = cut_rows("", gradient.shape, ranks.world_size)[ranks.rank]
    everywhere = own.new_zeros(gradient.shape[0])
    first = rank_slice.start // max(1, math.prod(gradient.shape[1:]))
    everywhere[first : first + len(own)] = own
    return ranks.all_reduce_disjoint(everywhere)


def _sum_pairwise(values: Tensor) -> Tensor:
    """Sums along the second axis pairwise, in place: (R, C) -> (R,)."""
    while (width := values.shape[1]) > 1:
        half = (width + 1) // 2
        values[:, : width - half] += values[:, half:]
        values = values[:, :half]
    return values.reshape(-1)


def trainable_parameters(model: nn.Module, freeze: Sequence[str]) -> dict[str, nn.Parameter]:
    """Returns the parameters to train by first name; a glob may match any name of a tied one."""
    frozen = {
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if is_matched(name, freeze)
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in frozen
    }


def check_freeze(model: nn.Module, freeze: Sequence[str], section: str) -> None:
    """Raises ConfigError for globs that match nothing, or leave nothing to train."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    for pattern in freeze:
        if not match_names(pattern, names):
            raise ConfigError(
                f"{section}.freeze = '{pattern}': matches no parameter or buffer"
                f"{nearest_glob(pattern, names)}"
            )
    if freeze and not trainable_parameters(model, freeze):
        raise ConfigError(
            f"{section}.freeze: leaves nothing to train; name less, or set {section}.epochs to 0"
        )


@contextmanager
def training_mode(model: nn.Module, freeze: Sequence[str]) -> Iterator[None]:
    """Sets training mode, except for frozen norms; frozen parameters get no gradient in the block.

    Leaves the model in training mode.
    """
    model.train()
    if not freeze:
        yield
        return
    held = [
        module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and is_matched(f"{path}.running_mean".lstrip("."), freeze)
    ]
    for module in held:
        module.eval()
    try:
        with only_requiring(model, trainable_parameters(model, freeze)):
            yield
    finally:
        for module in held:
            module.train()


def num_steps(recipe: Recipe, workload: Workload, epochs: float) -> int:
    """Converts epochs to optimizer steps; any epochs above zero make at least one step."""
    if epochs == 0:
        return 0
    return max(1, round(epochs * steps_per_epoch(recipe, workload)))


def steps_per_epoch(recipe: Recipe, workload: Workload) -> int:
    """Counts the whole batches of an epoch."""
    # Examples beyond the last whole batch are dropped: a single one would break BatchNorm.
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
