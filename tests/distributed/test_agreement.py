"""Ranks, and later rounds, that do not hold the network and the data of the first."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_program import reports_of_world
from small_networks import draw
from torch import Tensor, nn

from gbp_ray.distributed.agreement import (
    check_on_record,
    digest_tensor,
    fingerprint,
    fingerprints_of_data,
)
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import WorkloadError
from gbp_ray.training.network import build_start, network_of_seed
from gbp_ray.workloads.contract import Workload

STRATEGIES = ("replicated", "fsdp")


class Net(nn.Module):
    """Two layers, and a constant that no state dict holds."""

    def __init__(self, scale: float = 1.0, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), activation or nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("scale", torch.full((3,), scale), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs) * self.scale
        return outputs


class Items(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A data set of which some items cannot be read."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise FileNotFoundError(f"no item {index}")
        return torch.full((4,), float(index)), index % 3


def seeded_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def numpy_net(seed: int) -> nn.Module:
    net, generator = Net(), np.random.default_rng(seed)
    with torch.no_grad():
        net.layers[2].weight.copy_(torch.from_numpy(generator.normal(size=(3, 8))))
    return net


class Drawn(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.value)
        nn.init.zeros_(self.bias)

    value = 0.0


def blank_net(value: float) -> nn.Module:
    with torch.device("meta"):
        net = nn.Sequential(Drawn(4, 3))
    net[0].value = value
    return net


def half_blank_net() -> nn.Module:
    net = blank_net(2.0)
    net.append(nn.Linear(3, 3))
    nn.init.constant_(net[1].weight, 0.5)
    nn.init.zeros_(net[1].bias)
    net[0].bias = nn.Parameter(torch.full((3,), 7.0))
    return net


def workload(build: Callable[[], nn.Module] = Net, **splits: Any) -> Workload:
    data = draw(20, 4, seed=1), torch.arange(20) % 3
    return Workload(**({"build_model": build, "train": data, "test": data} | splits))


def relabelled(order: list[int]) -> tuple[Tensor, Tensor]:
    return draw(20, 4, seed=1), torch.tensor(order)[torch.arange(20) % 3]


EACH_RANK: dict[str, tuple[Callable[[int], Workload], str]] = {
    "sound": (lambda rank: workload(), ""),
    "a seed of its own": (
        lambda rank: workload(lambda: seeded_net(rank)),
        "workers start from different weights: 'layers.0.weight' on rank 1 is not that on rank 0",
    ),
    "a generator of its own": (
        lambda rank: workload(lambda: numpy_net(rank)),
        "workers start from different weights: 'layers.2.weight' on rank 1",
    ),
    "a blank network": (
        lambda rank: workload(lambda: blank_net(float(rank))),
        "workers start from different weights: '0.weight' on rank 1",
    ),
    "another layer": (
        lambda rank: workload(lambda: Net(activation=nn.Tanh() if rank else None)),
        "workers build different networks: the network on rank 1",
    ),
    "another constant": (
        lambda rank: workload(lambda: Net(scale=1.0 + rank)),
        "workers build different networks: the network on rank 1",
    ),
    "a network that is blank in part": (lambda rank: workload(half_blank_net), ""),
    "labels in another order": (
        lambda rank: workload(test=relabelled([2, 1, 0] if rank else [0, 1, 2])),
        "workers hold different data: the targets of workload.test on rank 1",
    ),
    "fewer examples": (
        lambda rank: workload(train=(draw(20 - rank, 4, seed=1), torch.arange(20 - rank) % 3)),
        "the number of examples of workload.train on rank 1 is not that on rank 0 (19, not 20)",
    ),
    "other examples": (
        lambda rank: workload(validation=(draw(9, 4, seed=rank), torch.zeros(9, dtype=torch.long))),
        "workers hold different data: item 0 of workload.validation on rank 1",
    ),
    "an item that one lacks": (
        lambda rank: workload(train=Items(broken=(19,) if rank else ())),
        "item 19 of workload.train on rank 1 is not that on rank 0 (workload.train",
    ),
}


def refusals(ranks: Ranks) -> dict[str, str]:
    """Starts as each case says; the next case shows that no rank was left behind."""
    found = {}
    for name, (make, _) in EACH_RANK.items():
        for strategy in STRATEGIES:
            try:
                build_start(make(ranks.rank), 0, ranks, strategy)
                found[f"{name}, {strategy}"] = ""
            except WorkloadError as error:
                found[f"{name}, {strategy}"] = str(error)
    return found


def test_ranks_that_differ_are_refused_on_all_before_anything_is_trained(tmp_path: Path) -> None:
    first, second = reports_of_world(2, tmp_path, refusals)
    assert first == second
    for name, (_, part) in EACH_RANK.items():
        for strategy in STRATEGIES:
            told = first[f"{name}, {strategy}"]
            assert part in told, told
            assert bool(told) == bool(part)
            assert "\n" not in told


def test_what_a_network_that_is_blank_in_part_holds_is_not_drawn_anew() -> None:
    known = {"0.weight": 2.0, "0.bias": 7.0, "1.weight": 0.5, "1.bias": 0.0}
    for model in (
        build_start(workload(half_blank_net), 0, Ranks(), "replicated").model,
        network_of_seed(workload(half_blank_net), 0)[0],
    ):
        assert {name: p.unique().item() for name, p in model.named_parameters()} == known


@pytest.mark.parametrize("name", [name for name, (_, part) in EACH_RANK.items() if part])
def test_what_has_changed_since_round_0_is_refused_unless_it_is_only_what_weights_replace(
    name: str,
) -> None:
    make, part = EACH_RANK[name]
    stored = build_start(make(0), 0, Ranks(), "replicated").fingerprints

    def go_on(known: dict[str, str]) -> None:
        build_start(make(1), 0, Ranks(), "replicated", known, "round_000")

    go_on({})
    if "start from" in part:
        go_on(stored)
        return
    with pytest.raises(WorkloadError, match=r"^round_000: was made with (other data|another)"):
        go_on(stored)


def test_fingerprints_see_values_and_not_rounding() -> None:
    values = draw(300, seed=3)
    stored = {"item": fingerprint(values, 3, "a", [True, None])}
    for alike in (values * (1 + 1e-6), values + 1e-7):
        check_on_record({"item": fingerprint(alike, 3, "a", [True, None])}, stored, "x")
    for other in (
        (values.flip(0), 3, "a", [True, None]),
        (values.double(), 3, "a", [True, None]),
        (values.view(3, 100), 3, "a", [True, None]),
        (values, 4, "a", [True, None]),
        (values, 3, "b", [True, None]),
        (values, 3, "a", [True]),
        (values, 3, "a"),
    ):
        with pytest.raises(WorkloadError, match="which differ in item"):
            check_on_record({"item": fingerprint(*other)}, stored, "x")
    infinite = torch.tensor([math.inf, -math.inf, math.nan, 3e38])
    assert fingerprint(infinite) == fingerprint(infinite.clone())
    assert fingerprint(np.arange(3)) == fingerprint(torch.arange(3))
    assert fingerprint(torch.zeros(0), {"a": object()}) != fingerprint({"a": 1})


def test_items_that_draw_are_the_same_at_each_reading() -> None:
    class Noisy(Items):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            noise = torch.rand(4) + np.random.rand() + random.random()
            return noise, index % 3

    noisy = workload(train=Noisy())
    assert fingerprints_of_data(noisy) == fingerprints_of_data(noisy)


def test_large_tensors_are_told_apart_by_a_sample_and_a_sum() -> None:
    large = torch.zeros(2**21)
    seen = digest_tensor(large)
    changed = large.clone()
    changed[12345] = 1.0
    assert digest_tensor(changed) != seen
    assert digest_tensor(large.clone()) == seen


def test_a_network_that_was_trained_is_not_taken_for_a_new_one() -> None:
    net = Net()
    once = workload(lambda: nn.Sequential(net))
    network_of_seed(once, 0)
    first = build_start(once, 0, Ranks(), "replicated").model
    assert network_of_seed(once, 0)[0][0] is net
    with torch.no_grad():
        first[0].layers[0].weight.add_(1)
    with pytest.raises(WorkloadError, match=r"returned '0\.layers\.0' again, which this process"):
        network_of_seed(once, 0)
    network_of_seed(replace(once, build_model=Net), 0)
