"""One-shot pruning from a network to stored results, against a minimal script of PyTorch.

    python tests/benchmarks/end_to_end.py [--images 2000] [--pairs 5]

ResNet-20 with random weights, magnitude, 80 %. The script evaluates the dense network, prunes with
`torch.nn.utils.prune`, evaluates again and saves the weights; `gbp_ray.prune` runs a job of one
round without workers, as it is and without the 1,000 training images that it is judged on, too.
All in this process in turn, one thread; printed are ratios of processor seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import gbp_ray
from gbp_ray.workloads.networks import build_cifar_resnet

SPARSITY = 0.8


def make_workload(count: int) -> gbp_ray.Workload:
    torch.manual_seed(0)
    network = build_cifar_resnet(20)

    def build() -> nn.Module:
        model = build_cifar_resnet(20)
        model.load_state_dict(network.state_dict())
        return model

    images = torch.randn(count, 3, 32, 32), torch.randint(0, 10, (count,))
    return gbp_ray.Workload(build, images, images)


@torch.no_grad()
def evaluate(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    model.eval()
    inputs, labels = split
    found = [model(batch).argmax(1) for batch in inputs.split(500)]
    return float((torch.cat(found) == labels).float().mean())


def run_script(workload: gbp_ray.Workload) -> None:
    model = workload.build_model()
    evaluate(model, workload.test)
    layers = [
        (module, "weight")
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=SPARSITY)
    for module, name in layers:
        prune.remove(module, name)
    evaluate(model, workload.test)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder, "pruned.pt"))


def run_job(workload: gbp_ray.Workload, train_sample: int = 1000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fields = {
            "name": "one-shot",
            "storage": folder,
            "workload.eval_batch_size": 500,
            "workload.train_sample": train_sample,
            "pretrain.epochs": 0,
            "prune.criterion": "magnitude",
            "prune.sparsity": SPARSITY,
            "prune.rounds": 1,
            "prune.batchnorm_examples": 0,
            "finetune.epochs": 0,
            "cluster.num_workers": 0,
        }
        gbp_ray.prune(overrides=fields, workload=workload, is_quiet=True)


def timed(run: Callable[[gbp_ray.Workload], None], workload: gbp_ray.Workload) -> float:
    started = time.process_time()
    run(workload)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload = make_workload(options.images)
    jobs = {"as it is": run_job, "workload.train_sample = 0": partial(run_job, train_sample=0)}
    for run in (run_script, *jobs.values()):
        run(workload)
    ratios: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(options.pairs):
        base_s = timed(run_script, workload)
        for name, job in jobs.items():
            ratios[name].append(timed(job, workload) / base_s)
    for name, found in ratios.items():
        middle, low, high = statistics.median(found), min(found), max(found)
        print(f"job / script, {name}: {middle:.2f} ({low:.2f} to {high:.2f})")
    print(
        f"{options.pairs} pairs, {options.images:,} test images; {date.today()}, torch "
        f"{torch.__version__}"
    )


if __name__ == "__main__":
    main()
