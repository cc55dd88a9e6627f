"""A row that is pruned whole, and what divides by its length: the message names the row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_networks import ONE_RANK, draw, job_config
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import PruneError
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.non_finite import find_pruned_whole
from gbp_ray.workloads.contract import Workload


class Normed(nn.Module):
    """Divides the rows of its second weight by something, as cosine classifiers do."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(24, 3)
        self.norm = norm

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.norm(self.second.weight)
        return self.last(torch.relu(torch.relu(self.first(inputs)) @ rows.T))


NORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "by the length": (lambda w: w / w.norm(dim=1, keepdim=True), "round 1: the test loss is nan; "),
    "by the spread": (lambda w: w / w.std(dim=1, keepdim=True), "round 1: the test loss is nan; "),
    "of the columns": (lambda w: w / w.norm(dim=0), "round 1: the test loss is nan; "),
    "finite, but for its gradient": (
        lambda w: w / (w.square().sum(dim=1, keepdim=True).sqrt() + 1e-6),
        "finetune: gradient of 'second.weight' is not finite at step 1 of",
    ),
    "guarded": (lambda w: functional.normalize(w, dim=1), ""),
}


@pytest.mark.parametrize("name", NORMS)
def test_what_was_pruned_whole_is_blamed_and_not_the_learning_rate(name: str) -> None:
    norm, expected = NORMS[name]
    inputs = draw(40, 6)
    split = inputs, inputs[:, :3].argmax(dim=1)
    workload = Workload(lambda: Normed(norm), train=split, test=split)
    training = {"epochs": 1, "batch_size": 20, "learning_rate": 0.01}
    job = job_config(pretrain=training, finetune=training, prune={"sparsity": 0.95, "rounds": 2})
    try:
        assert len(list(run_rounds(job, workload, ONE_RANK))) == 3
        told = ""
    except PruneError as error:
        told = str(error)
    assert told.startswith(expected), told
    assert bool(told) == bool(expected), told
    if told:
        assert "of 'second.weight'" in told
        assert "pruned whole" in told
        assert "learning_rate" not in told


def test_rows_and_columns_are_counted() -> None:
    weight = torch.ones(4, 3)
    weight[1], weight[2], weight[:, 0] = 0, 0, 0
    weights = {"w": weight, "dense": torch.ones(2, 2), "bias": torch.zeros(3)}
    assert find_pruned_whole(weights) == "2 rows of 'w', 1 column of 'w'"
