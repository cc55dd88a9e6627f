"""Measures what multiples of a width save: networks with half of the multiply-adds, by `round_to`.

Dense and compacted networks run in turn, eager and in ONNX Runtime, which pads and blocks channels
by the width of the processor's vectors. Prints how many times as long the dense network takes.

    python tests/benchmarks/widths.py [--network resnet20] [--macs 0.5] [--round-to 1 4 8]
        [--criterion magnitude] [--scope layer] [--seconds 4]

"resnet20" is that of CIFAR-10, other names are torchvision's, on images of 224x224.
"""

from __future__ import annotations

import argparse
import copy
import platform
from datetime import date

import torch
import torchvision
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import gbp_ray
from gbp_ray.export.onnx import make_onnx, open_session, runtime_version
from gbp_ray.export.traced import make_program
from gbp_ray.results.measurements import ratios_of
from gbp_ray.training.latency import EAGER, measure_latency
from gbp_ray.workloads.call import Call
from gbp_ray.workloads.networks import build_cifar_resnet

DENSE = "dense"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--criterion", default="magnitude")
    parser.add_argument("--scope", default="layer")
    parser.add_argument("--seconds", type=float, default=4.0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    is_small = chosen.network == "resnet20"
    make = build_cifar_resnet if is_small else torchvision.models.get_model
    networks = {DENSE: make(20 if is_small else chosen.network).eval()}
    side = 32 if is_small else 224
    images, labels = torch.randn(32, 3, side, side), torch.randint(0, 10, (32,))
    left = {DENSE: 1.0}
    for width in chosen.round_to:
        small, name = copy.deepcopy(networks[DENSE]), f"round_to = {width}"
        options = {"criterion": chosen.criterion, "scope": chosen.scope, "round_to": width}
        masks = gbp_ray.prune_model(
            small,
            (images, labels),
            granularity="channel",
            target={"macs": chosen.macs},
            calibration_examples=32,
            **options,
        )
        done = gbp_ray.compact(small, masks, (images, labels))
        networks[name], left[name] = small.eval(), done.macs / done.macs_before
    call = Call((images,), {}, len(images))
    sessions = {}
    for name, network in networks.items():
        traced = make_program(copy.deepcopy(network), network, call).traced
        assert traced is not None
        sessions[name] = open_session(make_onnx(traced, network, call).data)
    found = [
        *measure_latency(networks, call, seconds=chosen.seconds),
        *measure_latency(sessions, call, engine="onnxruntime", seconds=chosen.seconds),
    ]
    ratios = {name: ratios_of(found, name) for name in networks if name != DENSE}
    table = Table("widths", "multiply-adds left", box=SIMPLE_HEAD)
    columns = list(next(iter(ratios.values())))
    for engine, size in columns:
        table.add_column(f"{engine}, batch {size}", justify="right")
    for name, of_network in ratios.items():
        table.add_row(name, f"{left[name]:.3f}", *(f"{of_network[c]:.2f}" for c in columns))
    console = Console(width=110)
    console.print(table)
    times = (
        f"{record.engine}, batch {record.batch_size}: {record.median_ms:.2f} ms"
        for record in found
        if record.network == DENSE
    )
    console.print(f"dense: {'; '.join(times)}")
    console.print(
        f"{EAGER}: torch {torch.__version__}; ONNX Runtime {runtime_version()}, one thread; "
        f"{torch.backends.cpu.get_cpu_capability()}, {platform.machine()}, {date.today()}"
    )


if __name__ == "__main__":
    main()
