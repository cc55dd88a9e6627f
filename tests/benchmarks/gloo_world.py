"""Starts gloo processes for a benchmark and hands back what each returns."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from gbp_ray.distributed.ranks import Ranks


def run_world(world_size: int, program: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs `program(ranks, *arguments)` on each rank, one thread each; results, rank 0 first."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(world_size) as pool:
        jobs = [
            pool.apply_async(_work, (rank, world_size, folder, program, arguments))
            for rank in range(world_size)
        ]
        return [job.get(timeout=1800) for job in jobs]


def _work(
    rank: int, world_size: int, folder: str, program: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    if world_size == 1:
        return program(Ranks(), *arguments)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    try:
        return program(Ranks.current(), *arguments)
    finally:
        dist.destroy_process_group()
