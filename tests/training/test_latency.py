"""Times of passes: from the clock that is given, networks in turn; no test depends on speed."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from small_networks import draw
from torch import Tensor, nn

from gbp_ray.errors import ConfigError
from gbp_ray.results.measurements import LatencyRecord
from gbp_ray.training.latency import (
    check_threads,
    forward_bytes,
    measure_latency,
    read_machine,
    time_in_turn,
)
from gbp_ray.workloads.call import Call


class Watch:
    """A clock that only moves when a network runs, and notes who ran on what."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[tuple[str, int, int]] = []

    def __call__(self) -> float:
        return self.now


class Timed(nn.Module):
    """Takes a known time: more for each example, and more at each pass."""

    def __init__(self, name: str, watch: Watch, seconds: float) -> None:
        super().__init__()
        self.layer, self.name, self.watch, self.seconds = nn.Linear(3, 2), name, watch, seconds
        self.passes = 0

    def forward(self, inputs: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.passes += 1
        self.watch.ran.append((self.name, len(inputs), torch.get_num_threads()))
        self.watch.now += self.seconds * len(inputs) * (1 + self.passes / 1000)
        return self.layer(inputs)


def test_times_come_from_the_clock_and_networks_alternate() -> None:
    watch = Watch()
    models = {"dense": Timed("dense", watch, 0.01), "pruned": Timed("pruned", watch, 0.004)}
    call = Call((draw(5, 3),), {}, 5)
    before = torch.get_num_threads()
    found = measure_latency(models, call, (1, 7), clock=watch, seconds=0.28)
    assert torch.get_num_threads() == before
    assert [(item.network, item.batch_size) for item in found] == [
        *(("dense", 1), ("pruned", 1)),
        *(("dense", 7), ("pruned", 7)),
    ]
    # At batch 1 a pair takes 0.014 s, so some 20 pairs fill the time; at batch 7 the fewest do.
    assert [item.repetitions for item in found] == [19, 19, 7, 7]
    assert {threads for _, _, threads in watch.ran} == {1}
    passes = 2
    for size, repetitions in ((1, 19), (7, 7)):
        names = [name for name, number, _ in watch.ran if number == size]
        pairs = [names[place : place + 2] for place in range(0, len(names), 2)]
        # Two warm-up passes of each, then A B, B A, A B, ...
        timed = pairs[2:]
        assert len(timed) == repetitions
        assert timed[::2] == [["dense", "pruned"]] * ((repetitions + 1) // 2)
        assert timed[1::2] == [["pruned", "dense"]] * (repetitions // 2)
        for name, seconds in (("dense", 0.01), ("pruned", 0.004)):
            numbers = np.arange(passes + 1, passes + repetitions + 1)
            spent = 1e3 * seconds * size * (1 + numbers / 1000)
            low, median, high = np.percentile(spent, (10, 50, 90))
            (record,) = [i for i in found if (i.network, i.batch_size) == (name, size)]
            assert (record.low_ms, record.median_ms, record.high_ms) == pytest.approx(
                (low, median, high)
            )
        passes += repetitions + 2


def test_real_times_are_positive_and_named() -> None:
    model = nn.Linear(3, 2).eval()
    call = Call((draw(4, 3),), {}, 4)
    found = measure_latency({"dense": model}, call, (1, 32), seconds=0)
    for item in found:
        assert 0 < item.low_ms <= item.median_ms <= item.high_ms
        assert (item.engine, item.threads, item.repetitions) == ("eager", 1, 7)
        assert item.device == f"cpu ({read_machine().processor})"
        assert LatencyRecord.model_validate_json(item.model_dump_json()) == item
    functions = {"pruned": lambda inputs: inputs}
    (other,) = measure_latency(functions, call, (2,), engine="other", device="chip", seconds=0)
    assert (other.engine, other.device) == ("other", "chip")


def test_the_fewest_and_the_most_passes() -> None:
    watch = Watch()

    def run() -> None:
        watch.now += 1e-6

    assert len(time_in_turn({"one": run}, clock=watch)["one"]) == 301
    assert len(time_in_turn({"one": run}, clock=watch, seconds=0)["one"]) == 7


def test_a_batch_starts_again_from_the_first_example_and_keeps_what_has_no_examples() -> None:
    inputs, table = draw(3, 2), draw(5, 2)
    call = Call((inputs,), {"table": table, "flag": None}, 3).resized(7)
    assert torch.equal(call.positional[0], inputs[[0, 1, 2, 0, 1, 2, 0]])
    assert call.named["table"] is table
    assert call.size == 7


def test_the_memory_of_a_pass_is_its_widest_place() -> None:
    model = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 2)).eval()
    found = forward_bytes(model, Call((draw(4, 3),), {}, 4), (1, 10))
    # Input and output of tanh live at once.
    assert found == {1: 2 * 50 * 4, 10: 10 * 2 * 50 * 4}


@pytest.mark.parametrize("threads", [0, 10_000])
def test_threads_are_those_of_the_machine(threads: int) -> None:
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(ConfigError, match=rf"--threads = {threads}: must be from 1 to {cores},"):
        check_threads(threads, "--threads")
    check_threads(1, "--threads")
