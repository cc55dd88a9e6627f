"""Bytes that a rank sends to decide, against gathering the scores.

    python tests/benchmarks/wire.py [--size 1e8] [--workers 2 4]

Each rank holds a stretch of the scores of a network of 60 layers. Bytes are read off the counters
of the loopback interface, headers included, in a network namespace of their own where that is
allowed (as root), else off the machine's, where other traffic counts as well; the table says which.
What all ranks sent is divided by their number. The last column compares with the limit that we set
ourselves: 30 MB at 1e8 weights on 4 workers beyond the reduce-scatter of the statistic.
"""

import argparse
import ctypes
import fcntl
import os
import platform
import socket
import struct
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from gloo_world import run_world
from large_decision import NUM_LAYERS, SPARSITY, LargeDecision
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sums import OrderedSum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1e8, help="weights (default 1e8)")
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4], help="gloo processes")
    options = parser.parse_args()
    is_private = enter_private_network()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    size = int(options.size)
    console = Console(width=110)
    where = "a network namespace of its own" if is_private else "this machine, other traffic too"
    console.print(
        f"{size:,} weights in {NUM_LAYERS} layers, {SPARSITY:.0%} pruned; loopback counters of "
        f"{where}; {date.today()}, torch {torch.__version__}, {platform.machine()}",
        highlight=False,
    )
    for world_size in options.workers:
        (sent, *_) = run_world(world_size, measure, size)
        table = Table(box=SIMPLE_HEAD, title=f"{world_size} workers", title_justify="left")
        for heading in ("what", "MB sent by each rank", "against gathering"):
            table.add_column(heading, justify="left" if heading == "what" else "right")
        for what, num_bytes in sent.items():
            share = num_bytes / sent["gathering the scores on all ranks"]
            table.add_row(what, f"{num_bytes / 1e6:.2f}", f"{share:.4f}")
        console.print(table)


def measure(ranks: Ranks, size: int) -> dict[str, float]:
    """Returns bytes sent by a rank, the mean over all, by what they were sent for."""
    decision = LargeDecision(ranks, size)
    size, stretch, bounds = decision.num_weights, decision.stretch, decision.layout.bounds

    def gather() -> None:
        whole = torch.empty(ranks.world_size * -(-size // ranks.world_size))
        part = torch.zeros(len(whole) // ranks.world_size)
        part[: len(stretch)] = torch.from_numpy(stretch)
        dist.all_gather(list(whole.chunk(ranks.world_size)), part)

    def reduce_scatter() -> None:
        sums = OrderedSum(ranks, size, ranks.world_size, torch.float64, bounds=bounds)
        sums.add(torch.zeros(size))
        sums.owned()

    return {
        "the threshold alone": sent_by(decision.find_threshold, ranks),
        "the whole decision, masks on all ranks": sent_by(decision.decide, ranks),
        "reduce-scatter of the statistic, each turn": sent_by(reduce_scatter, ranks),
        "gathering the scores on all ranks": sent_by(gather, ranks),
    }


def sent_by(action: Callable[[], object], ranks: Ranks) -> float:
    dist.barrier()
    before = loopback_bytes()
    dist.barrier()
    action()
    dist.barrier()
    after = loopback_bytes()
    dist.barrier()
    return (after - before) / ranks.world_size


def loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("/proc/net/dev has no lo")


def enter_private_network() -> bool:
    """Moves this process and those it starts to a network of their own; says whether it may."""
    clone_new_network = 0x40000000
    if ctypes.CDLL(None, use_errno=True).unshare(clone_new_network) != 0:
        return False
    set_flags, is_up = 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, set_flags, struct.pack("16sh22x", b"lo", is_up))
    return True


if __name__ == "__main__":
    main()
