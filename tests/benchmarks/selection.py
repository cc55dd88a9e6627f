"""Time and extra memory of finding the k-th lowest score, against NumPy and torch.

    python tests/benchmarks/selection.py [--sizes 1e6 1e7 1e8] [--share 0.9] [--repeats 5]

Scores are products of normal numbers, float32, like |w * g|. Every peer is timed in this process,
in turn with us; the table shows the median of the pairwise ratios with their range. Slow peers are
repeated until --patience seconds are spent. Extra memory is measured in a child process for each
method: how far the resident set rose above what it was with the scores alone, as a share of their
bytes. All peers but `global_unstructured`, which makes a mask, give the value alone, as we do.

With a CUDA device the same is done there for scores that lie on it (--gpu-size). Beside the bare
threshold stand what also makes masks, and our own way of the host, its copy of the scores included.
"""

import argparse
import ctypes
import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils import prune

from gbp_ray.config.prune import PruneConfig
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.selection import select_masks
from gbp_ray.pruning.thresholds import exact_threshold

OURS = "exact_threshold"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=[1e6, 1e7, 1e8], help="scores")
    parser.add_argument("--share", type=float, default=0.9, help="k / number of scores")
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs per peer")
    parser.add_argument("--patience", type=float, default=30, help="seconds for a slow peer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--gpu-size", type=float, default=1e9, help="scores on a CUDA device")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    for size in map(int, options.sizes):
        table = make_table()
        for name in METHODS:
            compare(table, name, size, options, "cpu")
        console.print(
            f"{size:,} float32 scores, k = {options.share:g} of them; {date.today()}, NumPy "
            f"{np.__version__}, torch {torch.__version__} with {options.threads} threads, "
            f"{platform.machine()}",
            highlight=False,
        )
        console.print(table)
    if not torch.cuda.is_available():
        console.print("scores on a GPU: skipped, this machine has no CUDA device")
        return
    table, size = make_table(), int(options.gpu_size)
    for name in GPU_METHODS:
        compare(table, name, size, options, "cuda")
    console.print(f"{size:,} float32 scores on {torch.cuda.get_device_name()}, {date.today()}")
    console.print(table)


def make_table() -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("method", "time / ours", "range", "seconds", "extra memory / scores"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    return table


def compare(table: Table, name: str, size: int, options: argparse.Namespace, device: str) -> None:
    methods = METHODS if device == "cpu" else GPU_METHODS
    scores = draw_scores(size, device)
    k = max(1, int(options.share * size))
    timed(methods[OURS], scores, k)
    ratios, seconds = [], []
    spent_s = 0.0
    while len(ratios) < options.repeats and (spent_s < options.patience or not ratios):
        base_s, expected = timed(methods[OURS], scores, k)
        cost_s, found = timed(methods[name], scores, k)
        assert found == expected, f"{name} found {found}, not {expected}"
        ratios.append(cost_s / base_s)
        seconds.append(cost_s)
        spent_s += cost_s
    del scores
    table.add_row(
        f"{name} (ours)" if name == OURS else name,
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{statistics.median(seconds):.4f}",
        f"{measure_memory(name, size, k, device):.3f}",
    )


def draw_scores(size: int, device: str) -> torch.Tensor:
    if device == "cuda":
        return torch.randn(size, device=device).abs_().mul_(torch.rand(size, device=device))
    scores = np.empty(size, dtype=np.float32)
    random = np.random.default_rng(0)
    for start in range(0, size, 2**20):
        part = scores[start : start + 2**20]
        part[:] = random.standard_normal(part.size, dtype=np.float32)
        part *= random.standard_normal(part.size, dtype=np.float32)
        np.abs(part, out=part)
    return torch.from_numpy(scores)


def timed(method: Callable, scores: torch.Tensor, k: int) -> tuple[float, float]:
    """Returns (seconds, the k-th lowest score)."""
    gc.collect()
    started = time.perf_counter()
    found = method(scores, k)
    if scores.is_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    return elapsed, found() if callable(found) else float(found)


# -- the methods -----------------------------------------------------------------------------------


def by_counting(scores: torch.Tensor, k: int) -> float:
    return exact_threshold(scores, k)[0]


def by_counting_on_host(scores: torch.Tensor, k: int) -> float:
    return exact_threshold(scores.cpu(), k)[0]


def by_whole_decision(scores: torch.Tensor, k: int) -> Callable[[], float]:
    """Makes masks, as a round does; the threshold is read off them later."""
    dense = MaskSet({"weight": torch.ones_like(scores, dtype=torch.bool)})
    config = PruneConfig(criterion="magnitude", sparsity=k / scores.numel())
    masks = select_masks({"weight": scores}, dense, config, k / scores.numel()).masks
    return lambda: float(scores[~masks["weight"]].max())


def by_partition(scores: torch.Tensor, k: int) -> float:
    return np.partition(scores.numpy(), k - 1)[k - 1]


def by_kthvalue(scores: torch.Tensor, k: int) -> torch.Tensor:
    return torch.kthvalue(scores, k).values


def by_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    return torch.topk(scores, k, largest=False).values[-1]


def by_sort(scores: torch.Tensor, k: int) -> torch.Tensor:
    return torch.sort(scores).values[k - 1]


def by_global_unstructured(scores: torch.Tensor, k: int) -> Callable[[], float]:
    """Prunes a module whose weights are the scores; the threshold is read off its mask later."""
    module = nn.Module()
    module.weight = nn.Parameter(scores)
    prune.global_unstructured([(module, "weight")], prune.L1Unstructured, amount=k)
    return lambda: float(scores[module.weight_mask == 0].max())


METHODS = {
    OURS: by_counting,
    "numpy.partition": by_partition,
    "torch.kthvalue": by_kthvalue,
    "torch.topk": by_topk,
    "torch.sort": by_sort,
    "prune.global_unstructured": by_global_unstructured,
}
GPU_METHODS = {
    OURS: by_counting,
    "exact_threshold, on the host": by_counting_on_host,
    "torch.kthvalue": by_kthvalue,
    "torch.topk": by_topk,
    "torch.sort": by_sort,
    "select_masks": by_whole_decision,
    "prune.global_unstructured": by_global_unstructured,
}


# -- memory ----------------------------------------------------------------------------------------


def measure_memory(name: str, size: int, k: int, device: str) -> float:
    """Measures in a new process how much a method needs beside the scores, as a share of them."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(memory_of, (name, size, k, device))


def memory_of(name: str, size: int, k: int, device: str) -> float:
    methods = METHODS if device == "cpu" else GPU_METHODS
    methods[name](draw_scores(1000, device), 500)  # loads code and starts threads
    scores = draw_scores(size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        methods[name](scores, k)
        return (torch.cuda.max_memory_allocated() - before) / scores.nbytes
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be used unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident_bytes("VmRSS")
    methods[name](scores, k)
    return max(0, resident_bytes("VmHWM") - before) / scores.nbytes


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
