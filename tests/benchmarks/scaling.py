"""How a decision and a scoring pass scale over gloo workers on one machine.

    python tests/benchmarks/scaling.py [--workers 1 2 4] [--size 1e8] [--tables strong weak scoring]

Three tables. Strong scaling of a decision: `--size` scores in all, each worker holding its share.
Weak scaling of a decision: `--share` scores for each worker. Weak scaling of scoring: ResNet-20,
`--examples` for each worker, taylor. A whole decision is a round's: it ends with the masks of all
weights on every worker and their digests compared, of a dense network or of one half pruned before.
Workers have one thread each and start together after a barrier; a time is that of the slowest.
Medians with ranges, and the ratio to one worker of the same run. More workers than cores share
these, so that the best to expect of weak scaling is the number of workers over that of cores. Where
other work takes cores away, the seconds of processor (again of the worker that has most, those of
gloo's threads included) still tell what a worker has to do, but not how long it waits.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import torch.distributed as dist
from gloo_world import run_world
from large_decision import LargeDecision
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.networks import build_cifar_resnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4], help="1 comes first")
    parser.add_argument("--size", type=float, default=1e8, help="scores of all workers together")
    parser.add_argument("--share", type=float, default=1e7, help="scores of each worker")
    parser.add_argument("--examples", type=int, default=256, help="images of each worker")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs")
    parser.add_argument(
        "--tables", nargs="*", default=["strong", "weak", "scoring"], metavar="NAME"
    )
    options = parser.parse_args()
    size, share = int(options.size), int(options.share)
    console = Console(width=110)
    console.print(
        f"{date.today()}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.machine()}",
        highlight=False,
    )
    tables: dict[str, tuple[str, Callable[..., Any], Callable[[int], int]]] = {
        "strong": (f"decision, {size:,} scores in all", decide, lambda workers: size),
        "weak": (f"decision, {share:,} scores each", decide, lambda workers: share * workers),
        "scoring": (
            f"scoring, {options.examples} images each",
            scores_of,
            lambda workers: options.examples * workers,
        ),
    }
    for title, program, work in (tables[name] for name in options.tables):
        results = {
            workers: run_world(workers, program, work(workers), options.repeats)
            for workers in options.workers
        }
        console.print(make_table(title, results))


Times = list[tuple[float, float]]
"""(elapsed, of processor) of each run, in seconds."""


def make_table(title: str, results: dict[int, list[dict[str, Times]]]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("what", "workers", "seconds", "range", "against one", "of processor", "a. one"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for what in next(iter(results.values()))[0]:
        base_s = base_cpu_s = 0.0
        for workers, of_ranks in results.items():
            runs = list(zip(*(r[what] for r in of_ranks), strict=True))
            slowest = [max(elapsed for elapsed, _ in run) for run in runs]
            median_s = statistics.median(slowest)
            cpu_s = statistics.median(max(used for _, used in run) for run in runs)
            base_s, base_cpu_s = base_s or median_s, base_cpu_s or cpu_s
            table.add_row(
                what,
                str(workers),
                f"{median_s:.3f}",
                f"{min(slowest):.3f} to {max(slowest):.3f}",
                f"{median_s / base_s:.2f}",
                f"{cpu_s:.3f}",
                f"{cpu_s / base_cpu_s:.2f}",
            )
    return table


def decide(ranks: Ranks, size: int, repeats: int) -> dict[str, Times]:
    decision = LargeDecision(ranks, size)
    half = decision.decide(sparsity=0.5)
    actions: dict[str, Callable[[], object]] = {
        "threshold": decision.find_threshold,
        "whole decision": decision.decide,
        "half pruned before": lambda: decision.decide(half),
    }
    return {what: timed(action, ranks, repeats) for what, action in actions.items()}


def scores_of(ranks: Ranks, examples: int, repeats: int) -> dict[str, Times]:
    torch.manual_seed(0)
    model = build_cifar_resnet(20)
    units = prunable_parameters(model)
    data = torch.randn(examples, 3, 32, 32), torch.randint(0, 10, (examples,))
    workload = Workload(lambda: model, data, data)
    config = PruneConfig(criterion="taylor", sparsity=0.9, calibration_examples=examples)
    return {"taylor": timed(lambda: score(model, units, workload, config, ranks), ranks, repeats)}


def timed(action: Callable[[], object], ranks: Ranks, repeats: int) -> Times:
    times = []
    for number in range(repeats + 1):
        if ranks.world_size > 1:
            dist.barrier()
        started, started_cpu = time.perf_counter(), time.process_time()
        action()
        if number:  # the first run warms up
            times.append((time.perf_counter() - started, time.process_time() - started_cpu))
    return times


if __name__ == "__main__":
    main()
