"""The module and the job file of a user, as the tests of the verbs write them into a folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

USER_MODULE = '''
import torch
from torch import nn

from gbp_ray import Workload


def rings(examples=600, top=1, classes=2):
    """Points inside and outside a circle, labelled 0 and `top`."""
    draws = torch.Generator().manual_seed(0)
    points = torch.rand(examples, 2, generator=draws) * 2 - 1
    labels = (points.norm(dim=1) < 0.7).long() * top
    train, test = slice(0, examples // 2), slice(examples // 2, examples)
    return Workload(
        build_model=lambda: nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, classes)),
        train=(points[train], labels[train]),
        test=(points[test], labels[test]),
    )


def first_rows_first(model, inputs, targets, loss):
    """Ranks weights by their place alone: the first of each parameter goes first."""
    return {
        name: torch.arange(weight.numel(), dtype=torch.float32).view_as(weight)
        for name, weight in model.named_parameters()
    }


def netless():
    data = rings(4).train
    return Workload(build_model=lambda: None, train=data, test=data)


def cursed():
    raise ValueError("it is\\nnot to be")
'''

USER_JOB = """
name = "rings"
[workload]
factory = "rings_of_a_user:rings"
[pretrain]
epochs = 3
optimizer = "adam"
learning_rate = 0.02
batch_size = 50
[prune]
criterion = "taylor"
sparsity = 0.5
rounds = 2
calibration_examples = 100
[finetune]
epochs = 0.5
batch_size = 50
[cluster]
num_workers = 0
"""


@contextmanager
def files_of_a_user(
    folder: Path,
    patch: pytest.MonkeyPatch,
    name: str = "rings_of_a_user",
    module: str = USER_MODULE,
    job: str = USER_JOB,
) -> Iterator[None]:
    """A module and job.toml in a folder; after the block the module is not imported any more.

    `patch` is the test's own, which undoes what the test does to `sys.path` in the right order.
    """
    (folder / f"{name}.py").write_text(module)
    (folder / "job.toml").write_text(job)
    patch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
