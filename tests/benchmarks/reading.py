"""Times of listing, filtering and reporting many finished trials on a folder.

    python tests/benchmarks/reading.py [--trials 10000] [--repeats 3] [--folder DIR]

The trials are written by the store's own writer, without waiting for the disk: four criteria, fifty
sparsities, as many seeds as that takes, two rounds each with masks. Every verb is a command of its
own, interpreter and imports included, as one would type it; the best of the repeats stands beside
the median, because other work on the machine only ever adds. The index is made before, and its
time is stated apart. A folder that is given is kept, and read again where it is filled already.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sample_sweep import CRITERIA, write_sweep

from gbp_ray.results.index import rebuild_index
from gbp_ray.results.query import open_results
from gbp_ray.results.store import Store

SHAPES = {"a.weight": (32, 3, 3, 3), "b.weight": (64, 32), "c.weight": (10, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000, help="finished trials")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command")
    parser.add_argument("--folder", type=Path, help="where they are, and stay")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="gbp-ray-reading-"))
    try:
        measure(options.folder or work / "results", options.trials, options.repeats, work)
    finally:
        shutil.rmtree(work)


def measure(folder: Path, num_trials: int, repeats: int, work: Path) -> None:
    store = Store(folder, "sweep")
    if not store.objects.exists("job.json"):
        print(f"writing {num_trials:,} trials ...", file=sys.stderr)
        sparsities = [round(0.5 + 0.0099 * i, 4) for i in range(50)]
        seeds = range(max(1, num_trials // (len(CRITERIA) * len(sparsities))))
        with mock.patch.object(os, "fsync"):
            write_sweep(store, sparsities=sparsities, seeds=seeds, shapes=SHAPES, rounds=2)
    started = time.perf_counter()
    rebuild_index(store.objects)
    index_s = time.perf_counter() - started
    results = open_results(store.uri)
    num_rounds, num_found = len(results), len(results.final())

    commands = {
        "results, the 100 best": ["results", store.uri],
        "results, all as CSV": ["results", store.uri, "--csv"],
        "results --where, filtered": ["results", store.uri, "--where", "criterion=taylor"],
        "results --best": ["results", store.uri, "--best", "accuracy@sparsity>=0.9"],
        "report": ["report", store.uri, "--to", str(work / "page")],
        "an interpreter that imports the package": [],
    }
    table = Table(box=SIMPLE_HEAD)
    table.add_column("command")
    for heading in ("best, s", "median, s", "processor, s"):
        table.add_column(heading, justify="right")
    for name, words in commands.items():
        module = ["-m", "gbp_ray", *words] if words else ["-c", "import gbp_ray.cli.app"]
        times, spent = [], []
        for _ in range(repeats):
            before = os.times()
            started = time.perf_counter()
            subprocess.run([sys.executable, *module], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - started)
            after = os.times()
            spent.append(
                after.children_user
                - before.children_user
                + after.children_system
                - before.children_system
            )
        cells = (min(times), statistics.median(times), min(spent))
        table.add_row(name, *(f"{value:.2f}" for value in cells))
    console = Console(width=100)
    console.print(
        f"{num_found:,} trials, {num_rounds:,} rounds ({date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}); the index was made from the "
        f"records in {index_s:.1f} s",
        highlight=False,
    )
    console.print(table)


if __name__ == "__main__":
    main()
