"""What is checked is loaded once, passes once, and is trained with unless it has kept a trace."""

from __future__ import annotations

import collections
import datetime
import itertools
import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import draw, regression
from torch import Tensor, nn
from torch.nn import functional

import gbp_ray
from gbp_ray.config.job import load_job
from gbp_ray.pruning.checks import check_job
from gbp_ray.workloads.contract import Workload

PASSES: list[bool] = []
LOADED: list[Workload] = []


class Net(nn.Sequential):
    """Notes each pass, and whether it is one of training."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        PASSES.append(self.training)
        return super().forward(inputs)


def counted() -> Workload:
    data = (draw(40, 3, seed=1), draw(20, 2, seed=2).repeat(2, 1))
    LOADED.append(replace(regression(Net, *data), count_correct=count_right, input_range=(-9, 9)))
    return LOADED[-1]


def count_right(outputs: Tensor, targets: Tensor) -> int:
    return int((outputs.sign() == targets.sign()).all(dim=1).sum())


@pytest.fixture(autouse=True)
def _nothing_yet() -> None:
    PASSES.clear()
    LOADED.clear()


def job_of(storage: Path, **changed: Any) -> gbp_ray.JobConfig:
    recipe = {"epochs": 1, "batch_size": 16, "microbatches": 4}
    plain = {
        "name": "counted",
        "storage": str(storage),
        "workload.factory": f"{__name__}:counted",
        "workload.options": {},
        "cluster.num_workers": 0,
        "pretrain": dict(recipe),
        "finetune": dict(recipe),
        "prune.criterion": "taylor",
        "prune.rounds": 1,
        "prune.sparsity": 0.5,
    }
    return load_job(None, plain | changed)


EVERYTHING = {
    "finetune.distillation.features": ["0"],
    "pretrain.adversarial.kind": "fgsm",
    "finetune.adversarial.kind": "fgsm",
    "attack.kind": "pgd",
    "attack.steps": 3,
}


@pytest.mark.parametrize(("changed", "in_eval", "in_training"), [({}, 4, 2), (EVERYTHING, 6, 2)])
def test_checks_take_few_passes(
    changed: dict[str, Any], in_eval: int, in_training: int, tmp_path: Path
) -> None:
    check_job(job_of(tmp_path, **changed), counted())
    assert PASSES.count(False) == in_eval  # for what is unused, each split, and the criterion
    assert PASSES.count(True) == in_training


def test_what_was_checked_is_what_is_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path / "once")
    once = gbp_ray.prune(job, is_quiet=True).record
    assert len(LOADED) == 1
    monkeypatch.setattr("gbp_ray.pruning.checks.check_job", lambda *_: False)
    unchecked = gbp_ray.prune(job, {"storage": str(tmp_path / "twice")}, is_quiet=True).record
    assert len(LOADED) == 3
    for one, other in zip(once.rounds, unchecked.rounds, strict=True):
        assert one.files["weights.safetensors"] == other.files["weights.safetensors"]
        assert one.mask_digest == other.mask_digest


class Loss:
    """Counts how often it was asked."""

    number = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.number += 1
        return functional.mse_loss(outputs, targets)


class Items(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Items that depend on how many were read before."""

    def __init__(self) -> None:
        self.read = itertools.count()

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((3,), float(next(self.read))), torch.zeros(2)


class Settling(Net):
    """Sets a parameter in its first pass of training."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.shift.data.fill_(1)
        return super().forward(inputs) + self.shift


def drawn_net() -> Callable[[], nn.Module]:
    """Draws each network anew, whatever the job's seed."""
    own = torch.Generator().manual_seed(0)

    def build() -> nn.Module:
        net = Net()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=own))
        return net

    return build


class Noisy:
    """A loss that draws."""

    def __init__(self) -> None:
        self.own = torch.Generator().manual_seed(0)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs, targets) + 0 * torch.rand((), generator=self.own)


TRACES: dict[str, Callable[[Workload], Workload]] = {
    "a network that is kept": lambda workload: replace(workload, build_model=Kept()),
    "a layer that is kept": lambda workload: replace(workload, build_model=Kept(nn.Sequential)),
    "networks of a generator": lambda workload: replace(workload, build_model=drawn_net()),
    "a loss of a generator": lambda workload: replace(workload, loss=Noisy(), count=len),
    "a loss that counts": lambda workload: replace(workload, loss=Loss()),
    "items that are counted": lambda workload: replace(workload, train=Items()),
    "a parameter that a pass sets": lambda workload: replace(workload, build_model=Settling),
}


class Kept:
    """Builds its network once, and wraps it anew for each that asks."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda net: net) -> None:
        self.net, self.wrap = Net(), wrap

    def __call__(self) -> nn.Module:
        return self.wrap(self.net)


@pytest.mark.filterwarnings("ignore:items of workload")
@pytest.mark.parametrize("name", TRACES)
def test_a_workload_that_keeps_a_trace_of_the_checks_is_loaded_anew(
    name: str, tmp_path: Path
) -> None:
    job = job_of(tmp_path, **{"pretrain.microbatches": 1, "finetune.microbatches": 1})
    assert check_job(job, counted())
    assert not check_job(job, TRACES[name](counted()))


class Holding(Loss):
    """Holds something beside, and always the same."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs, targets)


HELD = [
    *(collections.deque([1]), re.compile("a"), datetime.date(2026, 1, 1), np.dtype("int8")),
    *(np.array([None]), np.array("2026", "M8"), torch.Generator(), random.Random(1), iter([1])),
    *(
        np.random.default_rng(1),
        random.Random(2).random,
        threading.Event(),
        type("Slots", (), {"__slots__": ()})(),
    ),
]


@pytest.mark.parametrize("held", HELD, ids=lambda held: type(held).__name__)
def test_whatever_a_workload_holds_can_be_looked_at(held: Any, tmp_path: Path) -> None:
    job = job_of(tmp_path)
    plain = replace(counted(), loss=Holding({"a": [1.0, "b", None], "c": torch.ones(2)}), count=len)
    assert check_job(job, plain)
    is_plain = isinstance(held, np.ndarray) and held.dtype != object
    assert check_job(job, replace(plain, loss=Holding(held))) == is_plain


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_calibration_batches_do_not_narrow_the_checks(size: int, tmp_path: Path) -> None:
    def watching() -> nn.Module:
        def keep(module: nn.Module, given: tuple[Tensor, ...], outputs: Tensor) -> None:
            if module.training:
                module.most.copy_(given[0].max())

        net = Net()
        net.register_buffer("most", torch.zeros(()))
        net.register_forward_hook(keep)
        return net

    changed = {"prune.calibration_batch_size": size, "finetune.microbatches": 2}
    with pytest.warns(UserWarning, match="most"):
        check_job(job_of(tmp_path, **changed), replace(counted(), build_model=watching))
