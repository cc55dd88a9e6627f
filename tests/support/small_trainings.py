"""What tests of training share: a small recipe, its steps, and the examples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from small_networks import ONE_RANK, TanhNet, draw, regression
from torch import Tensor, nn
from torch.optim import Optimizer

from gbp_ray.config.training import Recipe
from gbp_ray.training.loop import Span, train_epochs
from gbp_ray.training.optimizer import make_optimizer
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import derive_seed, shuffled_indices

SEED = 5


def recipe_of(**fields: Any) -> Recipe:
    plain = {"lr_schedule": "constant", "batch_size": 16, "microbatches": 3, "learning_rate": 0.05}
    return Recipe(**{**plain, **fields})


def steps(stop: int, start: int = 0, phase: str = "finetune") -> Span:
    return Span(phase, range(start, stop), range(0, stop))


def train(
    model: nn.Module,
    workload: Workload,
    recipe: Recipe,
    span: Span,
    optimizer: Optimizer | None = None,
    **more: Any,
) -> float:
    optimizer = optimizer or make_optimizer(model, recipe)
    return train_epochs(model, workload, recipe, ONE_RANK, optimizer, span, seed=SEED, **more)


def first_batch(workload: Workload, size: int, phase: str = "finetune", epoch: int = 0) -> Tensor:
    total = len(workload.train[0])
    return shuffled_indices(total, derive_seed(SEED, phase, "epoch", epoch))[:size]


def tanh_regression(
    build: Callable[[], nn.Module] = TanhNet, dtype: torch.dtype = torch.float32, total: int = 21
) -> Workload:
    inputs = draw(total, 3, seed=1, dtype=dtype)
    return regression(build, inputs, draw(total, 2, seed=2, dtype=dtype))


def tanh_workload(dtype: torch.dtype = torch.float64, total: int = 23) -> Workload:
    return tanh_regression(TanhNet, dtype, total)
