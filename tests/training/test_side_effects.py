"""What a network or its data do beside computing is refused or warned of before any training."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import DrawnItems, Remembering, draw, job_config, regression
from torch import Tensor, nn

from gbp_ray.errors import GbpError
from gbp_ray.pruning.checks import check_job
from gbp_ray.workloads.contract import Workload


class Net(nn.Sequential):
    """A network that does something beside computing."""

    def __init__(self, habit: Callable[[Net, Tensor], Tensor | None]) -> None:
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.habit = habit
        self.steps = 0
        self.own = np.random.default_rng(0)
        self.shift = nn.Parameter(torch.zeros(3))
        self.register_buffer("is_ready", torch.tensor(False))
        self.register_buffer("peak", torch.zeros(0))
        self.register_buffer("unsaved", torch.zeros(2, dtype=torch.int32), persistent=False)
        self.register_buffer("low", torch.tensor(torch.inf))

    def forward(self, inputs: Tensor) -> Tensor:
        changed = self.habit(self, inputs.detach())
        return super().forward((inputs if changed is None else changed) - self.shift)


def set_shift(net: Net, inputs: Tensor) -> None:
    if not net.is_ready:
        net.shift.data.copy_(inputs.mean(dim=0))  # as torch's version counter does not see
        net.is_ready.fill_(True)


def in_training(habit: Callable[[Net, Tensor], Any]) -> Callable[[Net, Tensor], Tensor | None]:
    return lambda net, inputs: habit(net, inputs) if net.training else None


def count_steps(net: Net, inputs: Tensor) -> None:
    net.steps += 1


OUTSIDE = [nn.Parameter(torch.zeros(3))]

HABITS: dict[str, tuple[Callable[[Net, Tensor], Tensor | None], str]] = {
    "nothing": (lambda net, inputs: None, ""),
    "sets a parameter": (set_shift, r"in eval mode sets parameter 'shift'; set it in build_model"),
    "sets it in training": (
        in_training(set_shift),
        r"pretrain\.microbatches = 4: a forward pass sets parameter 'shift', which",
    ),
    "makes a layer": (
        lambda net, inputs: setattr(net, "late", nn.Linear(2, 2)),
        r"a forward pass makes parameters 'late\.weight', 'late\.bias', which each worker",
    ),
    "makes one in training": (
        in_training(lambda net, inputs: setattr(net, "late", nn.Linear(2, 2))),
        r"a forward pass makes parameters 'late\.weight', 'late\.bias', which each worker",
    ),
    "holds a parameter outside": (
        lambda net, inputs: inputs + OUTSIDE[0],
        r"the loss depends on parameters outside the network, of shape \(3,\), so they",
    ),
    "grows a buffer": (
        lambda net, inputs: net.peak.resize_(3).copy_(inputs.amax(dim=0)) * 0 + inputs,
        r"gives buffer 'peak' the shape \(3,\) where it had \(0,\)",
    ),
    "binds another shape": (
        lambda net, inputs: setattr(net, "peak", inputs),
        r"in the place of buffer 'peak', of another shape",
    ),
    "counts in an attribute": (count_steps, r"changes attribute 'steps' of the network"),
    "changes what is not saved": (
        in_training(lambda net, inputs: net.unsaved.add_(1)[0] * 0 + inputs),
        r"changes buffer 'unsaved', not saved",
    ),
    "watches the least": (
        in_training(lambda net, inputs: net.low.copy_(inputs.min().minimum(net.low)) * 0 + inputs),
        r"microbatches = 4: after a step of several parts buffer 'low' will not hold",
    ),
    "draws by itself": (
        in_training(lambda net, inputs: inputs + net.own.normal()),
        r"outputs of the network differ from one pass to the next",
    ),
    "draws as all do": (in_training(lambda net, inputs: inputs + np.random.normal()), ""),
    "fails in training": (
        in_training(lambda net, inputs: inputs @ inputs),
        r"workload\.train: 4 examples in training mode failed with RuntimeError",
    ),
}


def told(workload: Workload, **sections: Any) -> str:
    """Returns what a check refuses or warns of."""
    sections["pretrain"] = {"epochs": 1, "batch_size": 16, **sections.pop("pretrain", {})}
    job = job_config(prune={"sparsity": 0.5, "calibration_batch_size": 4}, **sections)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_job(job, workload)
        except GbpError as error:
            return str(error)
    return " / ".join(str(warning.message) for warning in caught)


def regression_of(build: Callable[[], nn.Module]) -> Workload:
    return regression(build, draw(20, 3, seed=1), draw(20, 2, seed=2))


@pytest.mark.parametrize("name", HABITS)
def test_a_pass_that_does_more_than_compute_is_named(name: str) -> None:
    habit, expected = HABITS[name]
    found = told(regression_of(lambda: Net(habit)))
    assert re.search(expected, found) if expected else not found, found
    assert " / " not in found


def test_one_part_on_one_worker_may_set_a_parameter() -> None:
    workload = regression_of(lambda: Net(in_training(set_shift)))
    one = {"microbatches": 1}
    assert told(workload, pretrain=one, finetune=one) == ""
    found = told(workload, pretrain=one, finetune=one, cluster={"strategy": "fsdp"})
    assert "cluster.strategy = fsdp: a forward pass sets parameter 'shift'" in found


def test_buffers_that_parts_leave_otherwise_are_named() -> None:
    found = told(regression_of(Remembering))
    assert "buffers 'low', 'high', 'queue.rows' and 2 more will not hold what" in found
    one = {"microbatches": 1}
    assert told(regression_of(Remembering), pretrain=one, finetune=one) == ""


class CountedItems(DrawnItems):
    """Items that depend on how many were read before."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = itertools.count()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index] + next(self.counter), self.targets[index]


def test_items_that_differ_from_one_reading_to_the_next_are_warned_of() -> None:
    still, own = DrawnItems(), np.random.default_rng(0)
    one = regression_of(lambda: nn.Linear(3, 2))
    for split in ("train", "test", "validation"):
        workload = replace(one, **{"train": still, "test": still, split: CountedItems()})
        assert f"items of workload.{split} differ from one reading" in told(workload)
    drawn = replace(one, prepare=lambda inputs: inputs + np.float32(own.normal()))
    assert "workload.prepare makes of workload.train and workload.test differ" in told(drawn)
    assert told(replace(one, train=still, test=still)) == ""
