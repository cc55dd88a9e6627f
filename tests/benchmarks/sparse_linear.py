"""How fast linear layers with scattered zeros are as CSR and BSR tensors, against dense ones.

    python tests/benchmarks/sparse_linear.py [--threads 1] [--seconds 0.5]

Layers of common shapes, weights kept at random, float32 on the processor, batches of 1 and 32 rows.
Dense is `torch.nn.functional.linear`; all take the same weights and are timed in turn, a pass each,
in an order that is reversed every time. "csr" is what `gbp-ray export --to csr` writes
(`gbp_ray.export.load_csr`): 32-bit indices, and a product with a vector where there is one row;
"csr, linear" is `linear` on the tensor that `to_sparse_csr` makes, with 64-bit indices; "bsr" has
blocks of 4x4, nearly all of which hold something where zeros are scattered. Ratios are of medians.
"""

import argparse
import platform
import warnings
from datetime import date
from functools import partial
from statistics import median

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from gbp_ray.export.load_csr import CsrLinear
from gbp_ray.training.latency import read_machine, time_in_turn

SHAPES = ((256, 256), (768, 768), (3072, 768), (768, 3072), (4096, 4096), (11008, 4096))
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
BATCHES = (1, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # sparse tensors are called a beta
    ways = ("csr", "csr, linear", "bsr")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("weights", "sparsity", "rows", "dense, ms", *(f"dense / {w}" for w in ways)):
        table.add_column(heading, justify="right")
    with torch.no_grad():
        for shape in SHAPES:
            for sparsity in SPARSITIES:
                for batch in BATCHES:
                    spent = measure(shape, sparsity, batch, options.seconds)
                    ratios = (f"{spent['dense'] / spent[way]:.2f}" for way in ways)
                    name = f"{shape[0]}x{shape[1]}"
                    cells = f"{sparsity:.0%}", str(batch), f"{1e3 * spent['dense']:.3f}"
                    table.add_row(name, *cells, *ratios)
    machine = f"{read_machine().processor} ({platform.machine()})"
    print(f"{date.today()}, {machine}, torch {torch.__version__}, {options.threads} thread(s)")
    Console(width=100).print(table)


def measure(
    shape: tuple[int, int], sparsity: float, batch: int, seconds: float
) -> dict[str, float]:
    """Times all ways for one layer; returns medians in seconds."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=draw)
    weight[torch.rand(*shape, generator=draw) < sparsity] = 0
    inputs = torch.randn(batch, shape[1], generator=draw)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.copy_(weight)
    runs = {
        "dense": partial(layer, inputs),
        "csr": partial(CsrLinear.of(layer), inputs),
        "csr, linear": partial(functional.linear, inputs, weight.to_sparse_csr()),
        "bsr": partial(functional.linear, inputs, weight.to_sparse_bsr((4, 4))),
    }
    wanted = runs["dense"]()
    for name, run in runs.items():
        torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-3, msg=name)
    return {name: median(times) for name, times in time_in_turn(runs, seconds=seconds).items()}


if __name__ == "__main__":
    main()
