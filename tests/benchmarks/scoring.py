"""Cost of a scoring pass of each criterion, as a ratio to a plain forward and backward.

    python tests/benchmarks/scoring.py [--network resnet56] [--examples 256] [--batch 64]
    python tests/benchmarks/scoring.py --network vit_b_16 --examples 4 --batch 4 --criteria taylor

A CIFAR ResNet (He et al. 2015) or a classifier of torchvision by its name there, with random
weights on random images: cost does not depend on their values. The plain pass goes over the same
batches in eval mode and keeps the gradients of the prunable weights; it is timed anew beside every
criterion, in turn, and the table shows the median of the pairwise ratios with their range. On a
CPU there is one thread, and its own seconds are counted, so that other work on the machine hardly
enters.

Memory is the peak of what a pass allocates beyond the model, as a ratio to that of the plain pass:
on a GPU the allocator's, on a CPU the bytes of live tensors after each operation.
"""

import argparse
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.training.footprint import count_live_bytes
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.images import import_vision
from gbp_ray.workloads.networks import build_cifar_resnet

# movement is gathered while fine-tuning: there is no pass of its own to time.
TIMED = [name for name in CRITERIA if name != "movement"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", default="resnet20", help="resnet20, 32, 56, ... or one of torchvision's"
    )
    parser.add_argument("--criteria", nargs="*", default=TIMED, choices=TIMED, metavar="NAME")
    parser.add_argument("--examples", type=int, default=256, help="calibration images")
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs per criterion")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    if torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16):
            compare(console, options, torch.device("cuda"), dtype)
        return
    compare(console, options, torch.device("cpu"), torch.float32)
    console.print("bfloat16 and float32 on a GPU: skipped, this machine has no CUDA device")


def compare(
    console: Console, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, image_size, num_classes = build_network(options.network)
    model.to(device, dtype).eval()
    units = prunable_parameters(model)
    weights = [unit.parameter for unit in units]
    images = torch.randn(options.examples, 3, image_size, image_size, dtype=dtype)
    labels = torch.randint(0, num_classes, (options.examples,))
    workload = Workload(lambda: model, (images, labels), (images, labels))
    ranks = Ranks(device=device)

    def plain() -> None:
        for start in range(0, options.examples, options.batch):
            inputs = images[start : start + options.batch].to(device)
            targets = labels[start : start + options.batch].to(device)
            torch.autograd.grad(functional.cross_entropy(model(inputs), targets), weights)

    table = Table(box=SIMPLE_HEAD)
    for heading in ("criterion", "cost / plain", "range", "seconds", "memory / plain", "says"):
        table.add_column(heading, justify="left" if heading in ("criterion", "says") else "right")
    plain()
    plain_bytes = allocated_by(plain, device)
    for name in options.criteria:
        config = PruneConfig(
            criterion=name,
            sparsity=0.5,
            calibration_examples=options.examples,
            calibration_batch_size=options.batch,
        )

        def scored(config: PruneConfig = config) -> None:
            score(model, units, workload, config, ranks)

        ratios, seconds = [], []
        for _ in range(options.repeats):
            base_s = timed(plain, device)
            cost_s = timed(scored, device)
            ratios.append(cost_s / base_s)
            seconds.append(cost_s)
        num_bytes = allocated_by(scored, device)  # not the first pass, which makes what is kept
        table.add_row(
            name,
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{statistics.median(seconds):.2f}",
            f"{num_bytes / plain_bytes:.2f}",
            CRITERIA[name].cost,
        )
    where = f"{platform.machine()}, 1 thread"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    console.print(
        f"{options.network}, {sum(w.numel() for w in weights):,} prunable weights in "
        f"{str(dtype).removeprefix('torch.')}, {options.examples} images in batches of "
        f"{options.batch}, {options.repeats} pairs; the plain pass allocates "
        f"{plain_bytes / 1e6:,.1f} MB; {date.today()}, torch {torch.__version__}, {where}",
        highlight=False,
    )
    console.print(table)


def build_network(name: str) -> tuple[nn.Module, int, int]:
    """Returns a network, the edge of its images, and its number of classes."""
    if match := re.fullmatch(r"resnet(20|32|44|56|110)", name):
        return build_cifar_resnet(int(match[1])), 32, 10
    return import_vision("models").get_model(name), 224, 1000


def timed(action: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def allocated_by(action: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    return max(count_live_bytes(action))


if __name__ == "__main__":
    main()
