"""What training makes of the buffers that a network writes in its forward passes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_networks import ONE_RANK, Remembering, built, draw, job_config, regression
from small_trainings import first_batch, recipe_of, steps, train
from torch import Tensor, nn

from gbp_ray.errors import PruneError
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.workloads.contract import Workload

INPUTS, TARGETS = draw(40, 3, seed=1), draw(40, 2, seed=2)


def workload_of(build: type[nn.Module]) -> Workload:
    return regression(build, INPUTS, TARGETS)


def in_plain_torch(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Passes the batches through a copy, and returns its buffers."""
    twin = copy.deepcopy(model).train()
    for batch in batches:
        twin(INPUTS[batch])
    return dict(twin.named_buffers())


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_steps_of_one_part_leave_the_buffers_that_plain_torch_leaves(decay: float) -> None:
    model = built(Remembering)
    workload = workload_of(Remembering)
    expected = in_plain_torch(model, list(first_batch(workload, 40).split(8)))
    tensors = dict(model.named_buffers())
    train(model, workload, recipe_of(microbatches=1, batch_size=8, ema_decay=decay), steps(5))
    averaged = ("calls", "mean", "low", "high", "queue.rows", "queue.shift") if decay else ()
    for name, buffer in model.named_buffers():
        assert buffer is tensors[name]
        if name not in averaged:
            assert torch.equal(buffer, expected[name]), name
        assert bool(torch.isfinite(buffer).all()), name


def test_steps_of_several_parts_join_what_the_parts_do() -> None:
    model = built(Remembering)
    workload = workload_of(Remembering)
    order = first_batch(workload, 40)
    train(model, workload, recipe_of(microbatches=2, batch_size=20), steps(2))
    assert (model.seen, model.steps, model.calls) == (40, 2, 2)
    halves = INPUTS[order].split(10)
    queue = model.queue
    # The last part of each step, after the places that the one before it took.
    assert torch.equal(queue.rows[:20], torch.cat([halves[1], halves[3]]))
    assert (int(queue.place), bool(queue.is_ready), queue.count.tolist()) == (20, True, [1, 0])
    assert torch.equal(queue.shift, halves[1].mean(dim=0))
    expected = torch.full((3,), 5.0)
    for step in (0, 2):
        expected = expected.lerp(torch.cat(halves[step : step + 2]).mean(dim=0), 0.7)
    torch.testing.assert_close(model.mean, expected)
    assert -math.inf < model.low < model.high < math.inf


def test_only_training_moves_buffers() -> None:
    job = job_config(pretrain={"epochs": 0}, finetune={"epochs": 0}, prune={"sparsity": 0.5})
    fresh = built(Remembering)
    for state in run_rounds(job, workload_of(Remembering), ONE_RANK):
        for name, buffer in state.model.named_buffers():
            assert torch.equal(buffer, fresh.get_buffer(name)), name


class Growing(nn.Linear):
    """An observer that has no shape before its first pass."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("peak", torch.zeros(0))

    def forward(self, inputs: Tensor) -> Tensor:
        self.peak.resize_(3).copy_(inputs.detach().amax(dim=0))
        return super().forward(inputs)


def test_a_buffer_that_changes_its_shape_is_refused_by_name() -> None:
    with pytest.raises(PruneError, match=r"'peak' has shape \(3,\) after .* and \(0,\) before"):
        train(built(Growing), workload_of(Growing), recipe_of(), steps(1))
