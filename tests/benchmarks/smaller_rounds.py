"""Measures what training costs once half of the multiply-adds have left a network.

Dense and compacted network train the same batches in turn, so that the noise of the machine hits
both. Prints the median and the range of the ratio of processor seconds.

    python tests/benchmarks/smaller_rounds.py [--depth 20] [--macs 0.5] [--round-to 8]
        [--pairs 5] [--steps 8]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

import gbp_ray
from gbp_ray.workloads.networks import build_cifar_resnet


def train(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """Trains on one batch, over and over; returns processor seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()
    started = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = build_cifar_resnet(chosen.depth)
    inputs, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    small = copy.deepcopy(dense)
    masks = gbp_ray.prune_model(
        small,
        (inputs, labels),
        granularity="channel",
        target={"macs": chosen.macs},
        round_to=chosen.round_to,
        criterion="taylor_squared",
        calibration_examples=64,
    )
    done = gbp_ray.compact(small, masks, (inputs, labels))
    ratios = []
    for _ in range(chosen.pairs + 1):
        seconds = [train(model, inputs, labels, chosen.steps) for model in (dense, small)]
        ratios.append(seconds[1] / seconds[0])
    ratios = ratios[1:]  # the first pair warms up
    print(f"multiply-adds left: {done.macs / done.macs_before:.3f}")
    print(
        f"processor seconds of training, compacted / dense: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs of {chosen.steps} steps)"
    )


if __name__ == "__main__":
    main()
