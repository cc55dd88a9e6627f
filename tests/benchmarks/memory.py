"""Peak memory of each phase as `--dry-run` predicts it, against what a rank then held.

    python tests/benchmarks/memory.py [--depth 20 56] [--criteria taylor fisher] [--batch 128]

A CIFAR ResNet with random weights on random images goes through two rounds in a process of its own.
Measured is how far the resident set rose above what it was before the network was built, by the
kernel's high-water mark, which starts anew with each phase. The allocator is told to give memory
back at once (MALLOC_MMAP_THRESHOLD_); what libraries keep for good, such as oneDNN's plans, counts
against the plan. With a CUDA device the network lies there, and its allocator's peaks are measured.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gbp_ray.config.job import JobConfig
from gbp_ray.config.prune import PruneConfig
from gbp_ray.config.training import FinetuneConfig, PretrainConfig
from gbp_ray.config.workload import WorkloadConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning import rounds
from gbp_ray.runtime.estimate import make_plan
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.networks import build_cifar_resnet

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, nargs="*", default=[20, 56], help="layers")
    parser.add_argument("--criteria", nargs="*", default=["taylor", "fisher", "grasp"])
    parser.add_argument("--batch", type=int, default=128, help="images per step, in four parts")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        depth, criterion = options.child.split(",")
        print(json.dumps(measure_rounds(int(depth), criterion, options.batch)))
        return
    table = Table(box=SIMPLE_HEAD)
    for heading in ("network", "criterion", "phase", "predicted MB", "measured MB", "ratio"):
        table.add_column(heading, justify="right" if "MB" in heading or "ra" in heading else "left")
    for depth in options.depth:
        for criterion in options.criteria:
            for phase, predicted, measured in in_new_process(depth, criterion, options.batch):
                table.add_row(
                    f"ResNet-{depth}",
                    criterion,
                    phase,
                    f"{predicted / 1e6:.1f}",
                    f"{measured / 1e6:.1f}",
                    f"{predicted / max(1, measured):.2f}",
                )
    console = Console(width=110)
    console.print(
        f"two rounds on one rank, batches of {options.batch} in 4 parts, calibration and "
        f"evaluation in batches of 64 and 256; {date.today()}, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if ON_GPU else platform.machine()}",
        highlight=False,
    )
    console.print(table)


def in_new_process(depth: int, criterion: str, batch: int) -> list[tuple[str, int, int]]:
    command = [sys.executable, __file__, "--batch", str(batch), "--child", f"{depth},{criterion}"]
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure_rounds(depth: int, criterion: str, batch: int) -> list[tuple[str, int, int]]:
    """Returns (phase, predicted bytes, measured bytes)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(1024, 3, 32, 32), torch.randint(0, 10, (1024,))
    workload = Workload(lambda: build_cifar_resnet(depth), (images, labels), (images, labels))
    recipe = {"epochs": 0.4, "batch_size": batch, "learning_rate": 1e-4}
    job = JobConfig(
        name="memory",
        workload=WorkloadConfig(factory="nowhere:nothing"),
        pretrain=PretrainConfig(**recipe),
        prune=PruneConfig(
            criterion=criterion,
            sparsity=0.5,
            rounds=2,
            calibration_examples=192,
            batchnorm_examples=192,
        ),
        finetune=FinetuneConfig(**recipe),
    )
    plan = make_plan(job, workload)
    # Loads the kernels of every phase, and what libraries set up once.
    for _ in rounds.run_rounds(job, workload, Ranks(device=DEVICE)):
        pass
    measured: dict[str, int] = {}
    base = held_bytes()

    @contextlib.contextmanager
    def watched(phase: str) -> Iterator[None]:
        forget_peak()
        yield
        measured[phase] = max(measured.get(phase, 0), peak_bytes() - base)

    def watch(name: str, phase: Callable[..., str]) -> None:
        original = getattr(rounds, name)

        def wrapped(*args, **kwargs):
            with watched(phase(*args)):
                return original(*args, **kwargs)

        setattr(rounds, name, wrapped)

    watch("score", lambda *args: "score")
    watch("select_masks", lambda *args: "decide")
    watch("evaluate", lambda *args: "evaluate")
    watch("recalibrate_as_asked", lambda *args: "batchnorm")
    watch("train_epochs", lambda *args: args[5].phase)
    watch("_Run", lambda *args: "build")
    for state in rounds.run_rounds(job, workload, Ranks(device=DEVICE)):
        with watched("write"):
            state.to_files()
    phases = [dataclasses.astuple(phase)[:2] for phase in plan.phases]
    return [(name, predicted, measured[name]) for name, predicted in phases]


def held_bytes() -> int:
    return torch.cuda.memory_allocated() if ON_GPU else resident_bytes("VmRSS")


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if ON_GPU else resident_bytes("VmHWM")


def forget_peak() -> None:
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
