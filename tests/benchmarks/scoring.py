"""Cost of a scoring pass of each criterion, as a ratio to a plain forward and backward.

    python tests/benchmarks/scoring.py [--depth 20] [--examples 256] [--batch 64] [--repeats 5]

A CIFAR ResNet (He et al. 2015) with random weights on random images: cost does not depend on their
values. The plain pass goes over the same batches in eval mode and keeps the gradients of the
prunable weights; it is timed anew beside every criterion, in turn, and the table shows the median
of the pairwise ratios with their range. One thread, so that the figure is work done, not luck.
"""

import argparse
import platform
import statistics
import time
from datetime import date

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from gbp_ray.config import CRITERIA, PruneConfig
from gbp_ray.pruning.masks import prunable_parameters
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.pruning.saliency import CRITERIA as RULES
from gbp_ray.pruning.saliency import score
from gbp_ray.workload import Workload
from gbp_ray.zoo.resnet import build_cifar_resnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, help="layers: 20, 32, 56 (default 20)")
    parser.add_argument("--examples", type=int, default=256, help="calibration images")
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs per criterion")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_cifar_resnet(options.depth).to(device)
    units = prunable_parameters(model)
    images = torch.randn(options.examples, 3, 32, 32)
    labels = torch.randint(0, 10, (options.examples,))
    workload = Workload(lambda: model, (images, labels), (images, labels))
    num_weights = sum(unit.parameter.numel() for unit in units)

    def plain() -> None:
        model.eval()
        weights = [unit.parameter for unit in units]
        for start in range(0, options.examples, options.batch):
            inputs = images[start : start + options.batch].to(device)
            targets = labels[start : start + options.batch].to(device)
            torch.autograd.grad(functional.cross_entropy(model(inputs), targets), weights)

    table = Table(box=SIMPLE_HEAD)
    for heading in ("criterion", "cost / plain", "range", "seconds", "says of itself"):
        table.add_column(heading, justify="right" if heading != "criterion" else "left")
    for name in CRITERIA:
        if name == "movement":
            # Gathered while fine-tuning: there is no pass of its own to time.
            continue
        config = PruneConfig(
            criterion=name,
            sparsity=0.5,
            calibration_examples=options.examples,
            calibration_batch_size=options.batch,
        )
        ratios, seconds = [], []
        score(model, units, workload, config, Ranks(device=device))
        for _ in range(options.repeats):
            base = _timed(plain, device)
            cost = _timed(
                lambda config=config: score(model, units, workload, config, Ranks(device=device)),
                device,
            )
            ratios.append(cost / base)
            seconds.append(cost)
        table.add_row(
            name,
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{statistics.median(seconds):.2f}",
            RULES[name].cost,
        )
    console = Console(width=110)
    console.print(
        f"ResNet-{options.depth}, {num_weights:,} prunable weights, {options.examples} images in "
        f"batches of {options.batch}, {options.repeats} pairs; {date.today()}, torch "
        f"{torch.__version__}, {device.type}, {platform.machine()}, 1 thread",
        highlight=False,
    )
    console.print(table)


def _timed(action, device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
