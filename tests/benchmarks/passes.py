"""Cost of training and evaluating, as ratios to plain loops of PyTorch.

    python tests/benchmarks/passes.py [--pairs 5]

The plain loops are what one would write by hand: batches of bytes taken by index, flipped,
normalised, passed, and a step of SGD; batches of 500 for evaluation. Both sides see as many
examples, one thread each, in turn within one process; printed are medians of pairs of processor
seconds with their ranges. Images and weights are random, as cost does not depend on them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.training import FinetuneConfig
from gbp_ray.config.workload import WorkloadConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.training.evaluation import evaluate
from gbp_ray.training.loop import Span, train_epochs
from gbp_ray.training.optimizer import make_optimizer
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.loading import in_channels_last, load_workload
from gbp_ray.workloads.networks import build_cifar_resnet

Arm = Callable[[], object]


def to_floats(inputs: Tensor) -> Tensor:
    return inputs.float().div_(127.5).sub_(1) if inputs.dtype is torch.uint8 else inputs


def flip(inputs: Tensor) -> Tensor:
    is_flipped = torch.rand(len(inputs)) < 0.5
    return torch.where(is_flipped[:, None, None, None], inputs.flip(-1), inputs)


def make_images(count: int) -> Workload:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    split = images, torch.randint(0, 10, (count,))
    return Workload(lambda: build_cifar_resnet(20), split, split, prepare=to_floats, augment=flip)


def train_plainly(workload: Workload, batch_size: int, steps: int, microbatches: int) -> Arm:
    model = workload.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inputs, labels = (torch.as_tensor(column) for column in workload.train)

    def run() -> None:
        model.train()
        order = torch.randperm(len(inputs))
        for step in range(steps):
            optimizer.zero_grad()
            for rows in order[step * batch_size :][:batch_size].tensor_split(microbatches):
                seen = workload.prepare(flip(inputs[rows]))
                loss = functional.cross_entropy(model(seen), labels[rows])
                (loss * len(rows) / batch_size).backward()
            optimizer.step()

    return run


def train_as_jobs_do(workload: Workload, recipe: FinetuneConfig, steps: int) -> Arm:
    model = workload.build_model()
    optimizer = make_optimizer(model, recipe)
    span = Span("finetune", range(steps), range(steps))

    def run() -> None:
        train_epochs(model, workload, recipe, Ranks(), optimizer, span, seed=0)

    return run


def evaluate_plainly(workload: Workload) -> Arm:
    model = workload.build_model().eval()
    inputs, labels = workload.test

    @torch.no_grad()
    def run() -> None:
        for start in range(0, len(inputs), 500):
            rows = slice(start, start + 500)
            outputs = model(workload.prepare(inputs[rows]))
            functional.cross_entropy(outputs, labels[rows])
            (outputs.argmax(dim=1) == labels[rows]).sum()

    return run


def evaluate_as_jobs_do(workload: Workload, size: int, precision: str) -> Arm:
    model: nn.Module = workload.build_model()
    return lambda: evaluate(model, workload, Ranks(), size, precision=precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = make_images(2_000)
    digits = load_workload(WorkloadConfig(factory="gbp_ray.zoo:digits_convnet"), 0)
    recipe = {"epochs": 1, "batch_size": 128, "learning_rate": 1e-3}
    of_digits = recipe | {"batch_size": 64, "microbatches": 4}

    def training(workload: Workload, **more: object) -> Arm:
        return train_as_jobs_do(workload, FinetuneConfig(**recipe | {"microbatches": 2} | more), 6)

    groups: dict[str, tuple[Arm, dict[str, Arm]]] = {
        "ResNet-20, a training step of 128 images in two microbatches": (
            train_plainly(images, 128, 6, 1),
            {
                "as it is": training(images),
                "channels_last": training(in_channels_last(images)),
                "bfloat16": training(images, precision="bfloat16"),
                "bfloat16, channels_last": training(in_channels_last(images), precision="bfloat16"),
            },
        ),
        "digits ConvNet, a training step of 64 images in four microbatches": (
            train_plainly(digits, 64, 20, 4),
            {"as it is": train_as_jobs_do(digits, FinetuneConfig(**of_digits), 20)},
        ),
        "ResNet-20, evaluation of 2,000 images": (
            evaluate_plainly(images),
            {
                "batches of 500": evaluate_as_jobs_do(images, 500, "float32"),
                "batches of 100": evaluate_as_jobs_do(images, 100, "float32"),
                "channels_last, batches of 100": evaluate_as_jobs_do(
                    in_channels_last(images), 100, "float32"
                ),
                "bfloat16, channels_last, batches of 100": evaluate_as_jobs_do(
                    in_channels_last(images), 100, "bfloat16"
                ),
            },
        ),
    }
    console = Console(width=110)
    for title, (plain, arms) in groups.items():
        table = Table("ours", box=SIMPLE_HEAD, title=title, title_justify="left")
        table.add_column("ours / plain", justify="right")
        table.add_column("range", justify="right")
        for arm in (plain, *arms.values()):
            arm()
        ratios: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(options.pairs):
            base_s = timed(plain)
            for name, arm in arms.items():
                ratios[name].append(timed(arm) / base_s)
        for name, found in ratios.items():
            table.add_row(
                name, f"{statistics.median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"
            )
        console.print(table)
    console.print(
        f"{options.pairs} pairs; {date.today()}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, one thread"
    )


def timed(arm: Arm) -> float:
    started = time.process_time()
    arm()
    return time.process_time() - started


if __name__ == "__main__":
    main()
