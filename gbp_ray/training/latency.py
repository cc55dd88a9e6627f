"""Measure how long a pass of networks takes, and what memory it holds at once.

Networks are timed in turn, a pass each, in an order that is reversed every time (A B, B A, ...):
whatever else the machine does, and whatever one pass leaves in its caches, meets all of them alike.
A pass is timed by the clock on the wall, without gradients; before its first timed pass each
network runs twice. On a GPU the clock is read when the device has finished.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gbp_ray.errors import ConfigError
from gbp_ray.results.measurements import LatencyRecord, MachineRecord
from gbp_ray.training.footprint import count_live_bytes
from gbp_ray.workloads.call import Call

__all__ = [
    "BATCH_SIZES",
    "EAGER",
    "check_threads",
    "describe_device",
    "forward_bytes",
    "measure_latency",
    "read_machine",
    "time_in_turn",
    "torch_threads",
]

BATCH_SIZES = (1, 32)
EAGER = "eager"

_FEWEST, _MOST = 7, 301
_PERCENTILES = (10, 50, 90)

Clock = Callable[[], float]


def measure_latency(
    models: Mapping[str, nn.Module | Callable[..., Any]],
    call: Call,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    engine: str = EAGER,
    device: str = "",
    threads: int = 1,
    seconds: float = 1.0,
    clock: Clock = time.perf_counter,
) -> tuple[LatencyRecord, ...]:
    """Times one pass of each network, at each batch size.

    Args:
        models: By name; modules in eval mode, or functions that are called as such, as sessions of
            another engine are.
        call: Examples on the networks' device; taken again from the first where there are fewer
            than a batch holds.
        engine: What runs them, for the records.
        device: Likewise; by default that of the first module's parameters.
        threads: Torch's, for the time of this call; another engine has been given its own.
        seconds: Time to spend on a batch size; from 7 to 301 passes are made of each network.
        clock: Seconds, from any start.
    """
    place = next(_devices_of(models), torch.device("cpu"))
    found = []
    with torch_threads(threads):
        for size in batch_sizes:
            some = call.resized(size)
            runs = {name: partial(some.pass_through, model) for name, model in models.items()}
            times_s = time_in_turn(runs, seconds=seconds, clock=clock, device=place)
            for name, spent in times_s.items():
                low, median, high = (float(p) for p in np.percentile(spent, _PERCENTILES))
                found.append(
                    LatencyRecord(
                        network=name,
                        engine=engine,
                        device=device or describe_device(place),
                        threads=threads,
                        batch_size=size,
                        median_ms=1e3 * median,
                        low_ms=1e3 * low,
                        high_ms=1e3 * high,
                        repetitions=len(spent),
                    )
                )
    return tuple(found)


def time_in_turn(
    runs: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    clock: Clock = time.perf_counter,
    device: torch.device | None = None,
    fewest: int = _FEWEST,
) -> dict[str, list[float]]:
    """Times functions in turn; returns the seconds of each pass by name.

    Args:
        seconds: Time to spend on all; at most 301 passes are made of each.
        device: A GPU to wait for, if any.
        fewest: Passes of each, whatever time they take; two more come before.
    """
    is_cuda = device is not None and device.type == "cuda"

    def spend(run: Callable[[], object]) -> float:
        if is_cuda:
            torch.cuda.synchronize(device)
        start = clock()
        run()
        if is_cuda:
            torch.cuda.synchronize(device)
        return clock() - start

    for run in runs.values():
        run()
    of_all = sum(spend(run) for run in runs.values())
    number = max(fewest, min(_MOST, int(seconds / max(of_all, 1e-9))))
    times_s: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(number):
        for name in order:
            times_s[name].append(spend(runs[name]))
        order.reverse()
    return times_s


def forward_bytes(
    model: nn.Module, call: Call, batch_sizes: Sequence[int] = BATCH_SIZES
) -> dict[int, int]:
    """Counts by batch size the most bytes of tensors that a pass holds at once.

    Weights and inputs are not among them; see `training.footprint` for what is counted.
    """
    sizes = {size: call.resized(size) for size in batch_sizes}
    return {
        size: max(count_live_bytes(partial(some.pass_through, model)))
        for size, some in sizes.items()
    }


def check_threads(threads: int, option: str) -> None:
    """Checks a number of threads against the cores of this machine.

    Raises:
        ConfigError: It is less than one, or more than there are cores.
    """
    most = _num_cores()
    if not 1 <= threads <= most:
        raise ConfigError(
            f"{option} = {threads}: must be from 1 to {most}, the cores that this process may use"
        )


def read_machine() -> MachineRecord:
    """Describes this machine."""
    return MachineRecord(
        processor=_processor(), num_cores=_num_cores(), system=platform.system() or "unknown"
    )


def describe_device(device: torch.device) -> str:
    """Names a device by kind and model, such as "cpu (AMD EPYC)"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type} ({name})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown"


def _num_cores() -> int:
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _devices_of(models: Mapping[str, object]) -> Iterator[torch.device]:
    for model in models.values():
        if isinstance(model, nn.Module):
            yield from (parameter.device for parameter in model.parameters())


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Sets the threads of torch inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
