"""Processor seconds of commands that need neither torch nor Ray, each a process of its own.

    python tests/benchmarks/start.py [--repeats 5]

A job of two small trials is run first, in this process; then the commands are timed in turn,
beside an interpreter that imports nothing and one that imports torch. Printed are medians with
their ranges, of user and system time together.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import gbp_ray

SMALL = {
    "pretrain.epochs": 1,
    "finetune.epochs": 0,
    "prune.rounds": 1,
    "cluster.num_workers": 0,
}


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        done = gbp_ray.prune(overrides={**SMALL, "storage": folder}, is_quiet=True)
        gbp = [sys.executable, "-m", "gbp_ray"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "gbp-ray --help": [*gbp, "--help"],
            "gbp-ray criteria": [*gbp, "criteria"],
            "gbp-ray fields": [*gbp, "fields"],
            "gbp-ray prune --set prune.sparsty=0.5": [*gbp, "prune", "--set", "prune.sparsty=0.5"],
            "gbp-ray results URI": [*gbp, "results", str(Path(done.uri).parents[1])],
            "gbp-ray show URI": [*gbp, "show", str(Path(done.uri).parents[1])],
            "gbp-ray prune, finished before": [
                *(*gbp, "prune", "--set", f"storage={folder}"),
                *(part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")),
            ],
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, command in commands.items():
                seconds[name].append(seconds_of(command, environment))
    table = Table("command", box=SIMPLE_HEAD)
    table.add_column("processor seconds", justify="right")
    table.add_column("range", justify="right")
    for name, found in seconds.items():
        table.add_row(
            name, f"{statistics.median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"{repeats} runs; {date.today()}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
