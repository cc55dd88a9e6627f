"""Memory and bytes of storing a round, as multiples of the network that is stored.

    python tests/benchmarks/storing.py [--megabytes 400]

A stack of linear layers, without an optimizer and with one that has momentum, is written to a
folder, each in a process of its own. Measured are the resident set's peak, beyond what it held
before the network was built, and the bytes on disk.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from gbp_ray.pruning.checkpoint import save_round
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.results.store import Store

LAYERS = 10
PAGE = 4096
KINDS = {"none": 0.0, "SGD with momentum": 0.9}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def store_round(megabytes: float, momentum: float) -> dict[str, float]:
    """Returns peaks and bytes over those of the weights."""
    torch.set_num_threads(1)
    before = resident_bytes()
    width = math.isqrt(int(megabytes * 1e6) // 4 // LAYERS)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
    optimizer = None
    if momentum:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    size = sum(parameter.nbytes for parameter in model.parameters())
    masks = MaskSet.dense(prunable_parameters(model))
    held, peak, has_ended = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not has_ended.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for _ in Store(folder, "job").put_files(
            "trial", 0, save_round(model, masks, optimizer, None)
        ):
            pass
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    seconds = time.process_time() - started
    has_ended.set()
    watcher.join()
    return {
        "held": (held - before) / size,
        "peak": (peak - before) / size,
        "written": written / size,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=400.0)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(store_round(options.megabytes, options.child)))
        return
    table = Table("optimizer", box=SIMPLE_HEAD)
    for heading in ("held before", "peak", "bytes written", "processor seconds"):
        table.add_column(heading, justify="right")
    for kind, momentum in KINDS.items():
        command = [sys.executable, __file__, "--megabytes", str(options.megabytes)]
        done = subprocess.run(
            [*command, "--child", str(momentum)], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout)
        ratios = (f"{found[key]:.2f}" for key in ("held", "peak", "written"))
        table.add_row(kind, *ratios, f"{found['seconds']:.1f}")
    console = Console(width=110)
    console.print(table)
    console.print(f"multiples of {options.megabytes:g} MB of weights; {date.today()}")


if __name__ == "__main__":
    main()
