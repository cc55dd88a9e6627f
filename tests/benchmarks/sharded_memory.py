"""Peak memory of each rank of a sharded network, against the plan and against the scores' own size.

    python tests/benchmarks/sharded_memory.py [--workers 8] [--blocks 32] [--width 512] [--warm 32]
        [--reconstruct least_squares]

A residual network of linear blocks, built on the meta device so that no rank ever holds it whole,
is pruned in two rounds under FSDP2, by as many gloo processes as there are workers. Measured is how
far the anonymous memory of a process rose above what it was before the network was built, by
looking every millisecond. What lies in files (the exported weights) is not counted.

Before that, a network of width `--warm` goes through the same rounds. It loads the kernels and all
that libraries set up once, but not what they keep for each shape they meet; a warm width that is
the width itself does that as well, and shows how much it is.
"""

import argparse
import contextlib
import gc
import os
import platform
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.config.job import JobConfig
from gbp_ray.config.prune import PruneConfig
from gbp_ray.config.training import FinetuneConfig
from gbp_ray.config.workload import WorkloadConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning import rounds
from gbp_ray.runtime.estimate import make_plan
from gbp_ray.workloads.contract import Workload

INPUTS, CLASSES = 64, 10


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, inputs):
        return inputs + 0.1 * self.second(torch.relu(self.first(inputs)))


class BlockNet(nn.Module):
    """Blocks between a stem and a head."""

    def __init__(self, blocks, width):
        super().__init__()
        self.stem = nn.Linear(INPUTS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, inputs):
        hidden = self.stem(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=8, help="gloo processes")
    parser.add_argument("--blocks", type=int, default=32, help="groups that FSDP2 gathers")
    parser.add_argument("--width", type=int, default=512, help="a block has 4 width^2 weights")
    parser.add_argument("--warm", type=int, default=32, help="width of the network before")
    parser.add_argument("--reconstruct", default="none", help="how kept weights are refitted")
    options = parser.parse_args()
    job, workload = make_job(options)
    plan = make_plan(job, workload)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options, folder)
        multiprocessing.spawn(run_rank, arguments, options.workers)
        reports = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(options.workers)]
    table = Table(box=SIMPLE_HEAD)
    for heading in ("phase", "predicted MB", "measured MB (all ranks)", "predicted / greatest"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    peak = 0
    for phase in plan.phases:
        found = [report[phase.name] for report in reports]
        peak = max(peak, *found)
        table.add_row(
            phase.name,
            f"{phase.num_bytes / 1e6:.1f}",
            f"{min(found) / 1e6:.1f} to {max(found) / 1e6:.1f}",
            f"{phase.num_bytes / max(found):.2f}",
        )
    whole = 4 * plan.num_prunable
    console = Console(width=110)
    console.print(
        f"{plan.num_prunable:,} prunable weights on {options.workers} ranks, criterion "
        f"{job.prune.criterion}, warm width {options.warm}; {date.today()}, "
        f"torch {torch.__version__}, {platform.machine()}",
        highlight=False,
    )
    console.print(table)
    console.print(
        f"greatest peak {peak / 1e6:.1f} MB, predicted {plan.peak_bytes / 1e6:.1f} MB "
        f"(ratio {plan.peak_bytes / peak:.2f}); a full score vector alone has {whole / 1e6:.1f} MB",
        highlight=False,
    )


def make_job(options: argparse.Namespace) -> tuple[JobConfig, Workload]:
    def build():
        with torch.device("meta"):
            return BlockNet(options.blocks, options.width)

    torch.manual_seed(0)
    examples = torch.randn(64, INPUTS), torch.randint(0, CLASSES, (64,))
    workload = Workload(build, examples, examples)
    job = JobConfig(
        name="memory",
        workload=WorkloadConfig(factory="nowhere:nothing", eval_batch_size=8),
        prune=PruneConfig(
            criterion="taylor",
            sparsity=0.9,
            rounds=2,
            calibration_examples=64,
            calibration_batch_size=8,
            reconstruct=options.reconstruct,
        ),
        finetune=FinetuneConfig(epochs=2, batch_size=64, microbatches=8, learning_rate=1e-3),
        cluster=ClusterConfig(num_workers=options.workers, strategy="fsdp"),
    )
    return job, workload


def run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=options.workers
    )
    job, workload = make_job(options)
    small, small_workload = make_job(argparse.Namespace(**vars(options) | {"width": options.warm}))
    for state in rounds.run_rounds(small, small_workload, Ranks.current()):
        state.to_files()
    del state
    gc.collect()
    watch = Watch()
    watch.wrap("score", lambda *args: "score")
    watch.wrap("select_masks", lambda *args: "decide")
    watch.wrap("reconstruct", lambda *args: "reconstruct")
    watch.wrap("evaluate", lambda *args: "evaluate")
    watch.wrap("train_epochs", lambda *args: args[5].phase)
    watch.wrap("build_start", lambda *args: "build")
    for state in rounds.run_rounds(job, workload, Ranks.current()):
        with watch.phase("write"):
            state.to_files()
        del state  # as a worker does, lest it hold the round's masks through the next one
    watch.is_over = True
    torch.save(watch.peaks, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Watch:
    """Notes the greatest memory of each phase, from a thread of its own."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.is_over = False
        self._phase = ""
        self._base = anonymous_bytes()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        pause = threading.Event()
        while not self.is_over:
            rise = anonymous_bytes() - self._base
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), rise)
            pause.wait(0.001)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        yield
        self._phase = before

    def wrap(self, name: str, phase: Callable[..., str]) -> None:
        original = getattr(rounds, name)

        def wrapped(*args, **kwargs):
            with self.phase(phase(*args)):
                return original(*args, **kwargs)

        setattr(rounds, name, wrapped)


def anonymous_bytes() -> int:
    with open("/proc/self/statm", "rb", buffering=0) as statm:  # noqa: PTH123 - thousands a second
        _, resident, of_files, *_ = statm.read().split()
    return (int(resident) - int(of_files)) * resource.getpagesize()


if __name__ == "__main__":
    # The allocator gives back at once what is freed, so that what is held is what is seen.
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    main()
