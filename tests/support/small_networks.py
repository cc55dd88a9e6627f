"""Networks and workloads small enough for a dense Hessian, shared by the tests of the core."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.job import JobConfig
from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import seeded

ONE_RANK = Ranks()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws normal numbers that depend on shape and seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def built(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Builds a network under a seed."""
    with seeded(seed):
        return build()


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def in_float64(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Builds a network whose parameters and buffers are float64."""
    with float64_by_default():
        return built(build, seed)


def prune_config(criterion: str = "taylor", **fields: Any) -> PruneConfig:
    return PruneConfig(**{"criterion": criterion, "sparsity": 0.5, **fields})


def job_config(**sections: Any) -> JobConfig:
    """Fills a job: each section a dict over defaults that make a small job."""
    prune = {"criterion": "taylor", "sparsity": 0.8, **sections.pop("prune", {})}
    workload = {"factory": "nowhere:nothing", **sections.pop("workload", {})}
    return JobConfig(name="small", prune=prune, workload=workload, **sections)


def regression(build: Callable[[], nn.Module], inputs: Tensor, targets: Tensor) -> Workload:
    """A workload under the mean squared error, tested on what it is trained on."""
    return Workload(
        build_model=build,
        train=(inputs, targets),
        test=(inputs, targets),
        loss=functional.mse_loss,
        count_correct=lambda outputs, targets: torch.zeros((), dtype=torch.int64),
    )


class Remembering(nn.Module):
    """Writes buffers of every kind while it trains: what examples were seen is what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))
        self.register_buffer("mean", torch.full((3,), 5.0))
        self.queue = Queue()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen += len(inputs)
                self.steps += 1
                self.low.copy_(torch.minimum(self.low, inputs.min()))
                self.high = torch.maximum(self.high, inputs.max())
                self.mean.lerp_(inputs.mean(dim=0), 0.7)
                self.queue.push(inputs)
        self.calls += 1
        return self.layer(inputs - self.queue.shift)


class Queue(nn.Module):
    """The last inputs, in a ring, and the mean of the first ones, taken once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(32, 3))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("is_ready", torch.tensor(False))
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("count", torch.zeros(2, dtype=torch.uint8))

    def push(self, inputs: Tensor) -> None:
        if not self.is_ready:
            self.shift.copy_(inputs.mean(dim=0))
            self.is_ready.fill_(True)
            self.count[0] += 1
        places = (int(self.place) + torch.arange(len(inputs))) % 32
        self.rows[places] = inputs.float()
        self.place.copy_((self.place + len(inputs)) % 32)


class DrawnItems:
    """A data set that draws noise for each item from every global generator."""

    def __init__(self, total: int = 23) -> None:
        self.inputs, self.targets = draw(total, 3, seed=1), draw(total, 2, seed=2)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(()) + np.random.normal() + random.random()
        return self.inputs[index] + 0.1 * noise, self.targets[index]


def scores_of(model: nn.Module, workload: Workload, config: PruneConfig, **more: Any) -> Any:
    """Scores a model, on one rank or more, and puts the scores together."""
    units = prunable_parameters(model, config.exclude, config.include)
    ranks = more.pop("ranks", ONE_RANK)
    return score(model, units, workload, config, ranks, **more).gather(ranks)


class TanhNet(nn.Sequential):
    """A smooth network: its Hessian is dense and nowhere zero."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class SharedWeightNet(nn.Module):
    """Two linear layers that share one square weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


class ConvNet(nn.Module):
    """A classifier with BatchNorm and dropout whose inputs, but for the first, divide by 4."""

    def __init__(self, dropout: float = 0.25) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(self.conv1(inputs)))
        hidden = functional.relu(self.norm2(self.conv2(hidden)))
        hidden = functional.adaptive_avg_pool2d(hidden, 2).flatten(1)
        return self.head(self.dropout(hidden))


class GroupedNet(nn.Module):
    """A classifier with a convolution in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.head = nn.Linear(32, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.norm(self.conv1(inputs)))
        hidden = functional.adaptive_avg_pool2d(functional.relu(self.conv2(hidden)), 2)
        return self.head(hidden.flatten(1))


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = inputs + self.second(torch.relu(self.first(inputs)))
        return hidden


class BlockNet(nn.Module):
    """Blocks in a list, each a group of its own; two of them share a weight, two freeze one."""

    def __init__(self, *, is_tied: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(18 * 4, 24)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.head = nn.Linear(24, 3)
        if is_tied:
            self.blocks[3].first.weight = self.blocks[1].first.weight
        self.blocks[4].second.weight.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs.flatten(1))
        for block in self.blocks:
            hidden = block(hidden)
        outputs: Tensor = self.head(hidden)
        return outputs


def jitter(images: Tensor) -> Tensor:
    """A random augmentation: noise on every pixel."""
    return images + 0.1 * torch.randn_like(images)


def images(
    build: Callable[[], nn.Module] = ConvNet, num_train: int = 46, num_test: int = 29
) -> Workload:
    """Noise with labels that depend on it; sizes that no batch size divides."""

    def split(total: int, seed: int) -> tuple[Tensor, Tensor]:
        pixels = draw(total, 2, 6, 6, seed=seed)
        labels = (pixels[:, 0].mean(dim=(1, 2)) * 8).round().long().remainder(3)
        return pixels, labels

    return Workload(build, split(num_train, 11), split(num_test, 12), augment=jitter)


class Tagger(nn.Module):
    """Labels each position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


@dataclass(frozen=True)
class Uneven:
    """A loss that is a mean over other things than examples, and labels for it."""

    loss: Callable[[Tensor, Tensor], Tensor]
    build: Callable[[], nn.Module] = TanhNet
    ignored: int = -100
    count: Callable[[Tensor], Tensor] | None = None


_WEIGHTS = torch.tensor([1.0, 24.0], dtype=torch.float64)
_WEIGHTS_3 = torch.tensor([1.0, 24.0, 0.5], dtype=torch.float64)

UNEVEN = {
    "weights": Uneven(partial(functional.cross_entropy, weight=_WEIGHTS)),
    "positions": Uneven(functional.cross_entropy, Tagger),
    "weighted positions": Uneven(nn.CrossEntropyLoss(_WEIGHTS_3, ignore_index=7), Tagger, 7),
    "ignored examples": Uneven(partial(functional.cross_entropy, ignore_index=7), ignored=7),
    "own": Uneven(
        lambda outputs, targets: functional.cross_entropy(outputs, targets, weight=_WEIGHTS),
        count=lambda targets: _WEIGHTS[targets].sum(),
    ),
}


def uneven(kind: str, num_train: int = 46, num_test: int = 29) -> Workload:
    """A workload in float64 under one of `UNEVEN`; half of its examples have few labels or none."""
    made = UNEVEN[kind]
    shape = (3, 6) if made.build is Tagger else (3,)

    def split(total: int, seed: int) -> tuple[Tensor, Tensor]:
        inputs = draw(total, *shape, seed=seed, dtype=torch.float64)
        score = inputs.sum(dim=1)
        labels = (score > 0).long() + (score > 1.5 if made.build is Tagger else 0)
        if made.build is Tagger:
            labels[::4, 2:] = made.ignored
            labels[1::4] = made.ignored
        elif made.ignored >= 0:
            labels[::3] = made.ignored
        return inputs, labels

    return Workload(
        made.build, split(num_train, 11), split(num_test, 12), made.loss, count=made.count
    )
