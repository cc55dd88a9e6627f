"""An exponential moving average of the weights, which becomes the network when a training ends.

The average begins anew with each training (pretrain, or the fine-tuning of a round), at the weights
that it begins with. After the last step it takes the place of the weights, and before that wherever
the training is judged (early stopping), to go on from the weights themselves. So one network is
evaluated, stored, scored for the next decision and trained on: a mask decided on weights that
nobody keeps would be another network's. So a round's files say all that the next one needs, and a
resumed trial has nothing more to read. Pruned weights are zero in every term, and so are they in
the average.

A short training would hardly leave its start behind, so the decay of step t is at most
(1 + t) / (10 + t). Running statistics are averaged alike, counters are those of the last step.

Each rank averages what it holds, element by element: the same bits in shards and in one piece.
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
from gbp_ray.distributed.sharding import (
    cut_rows,
    is_shard,
    local,
    only_requiring,
)
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
    "trainable_parameters",
    "training_mode",
]


class MovingAverage:
    """The average of a model's trainable parameters and of its floating-point buffers.

    Args:
        decay: What a step keeps of the average, at most.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._num_steps = 0
        averaged = [local(p.detach()) for p in model.parameters() if p.requires_grad]
        averaged += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._pairs: list[tuple[Tensor, Tensor]] = [(now, now.clone()) for now in averaged]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after a step into the average."""
        self._num_steps += 1
        decay = min(self._decay, (1 + self._num_steps) / (10 + self._num_steps))
        for now, average in self._pairs:
            # Each operation rounds by itself: a fused one would depend on where a shard ends.
            moved = average + (now - average) * (1 - decay)
            # Infinities, as masks of attention hold them, differ from themselves by NaN, and what
            # was infinite before the first step has no mean with what came after it.
            moved = torch.where(now == average, average, moved)
            average.copy_(torch.where(torch.isfinite(average), moved, now))

    @torch.no_grad()
    def trade_places(self) -> None:
        """Puts the average in the place of the weights, or these back in theirs."""
        for now, average in self._pairs:
            kept = now.clone()
            now.copy_(average)
            average.copy_(kept)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Has the weights in their place for the block, and the average outside it."""
        self.trade_places()
        try:
            yield
        finally:
            self.trade_places()


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
    return math.sqrt(_halve(torch.cat(sums).view(1, -1)).item()) if sums else 0.0


def _sums_of_rows(gradient: Tensor, ranks: Ranks) -> Tensor:
    """Sums the squares of each row, (rows,), on every rank."""
    rows = local(gradient)
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    num_rows = rows.shape[0] if rows.ndim else 1
    squares = rows.to(torch.float64, copy=True).square_()
    own = _halve(squares.view(num_rows, -1)) if rows.numel() else squares.new_zeros(num_rows)
    if not is_shard(gradient):
        return own
    piece = cut_rows("", gradient.shape, ranks.world_size)[ranks.rank]
    everywhere = own.new_zeros(gradient.shape[0])
    first = piece.start // max(1, math.prod(gradient.shape[1:]))
    everywhere[first : first + len(own)] = own
    return ranks.all_reduce_disjoint(everywhere)


def _halve(values: Tensor) -> Tensor:
    """Adds up along the second axis, in place: (R, C) -> (R,)."""
    while (width := values.shape[1]) > 1:
        half = (width + 1) // 2
        values[:, : width - half] += values[:, half:]
        values = values[:, :half]
    return values.reshape(-1)


def trainable_parameters(model: nn.Module, freeze: Sequence[str]) -> dict[str, nn.Parameter]:
    """Lists what a training moves, by first name; a glob may match any name of a tied one."""
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
    """Refuses globs that match nothing, or leave nothing to train.

    Raises:
        ConfigError: Naming the glob.
    """
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
    """Puts a model into training mode but for what is frozen, which takes no gradient in the block.

    Afterwards it is left in training mode.
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
