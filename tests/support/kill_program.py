"""A trial among real processes, without Ray, in which one may die at a chosen point or moment."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gbp_ray.pruning.rounds
from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.checkpoint import SHARDS
from gbp_ray.pruning.reconstruction import Moments
from gbp_ray.pruning.whole_units import WholeUnits
from gbp_ray.results.folder import FolderObjects
from gbp_ray.results.records import RoundRecord
from gbp_ray.results.store import Store
from gbp_ray.runtime.trial import work_trial
from gbp_ray.workloads import digits_convnet
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.transformers import huggingface

SETTINGS = {
    "workload.factory": "kill_program:digits",
    "workload.options": {},
    "workload.eval_batch_size": 64,
    "pretrain.epochs": 0.2,
    "finetune.epochs": 0.2,
    "prune.rounds": 2,
    "prune.calibration_examples": 256,
    "prune.calibration_batch_size": 32,
    "prune.batchnorm_examples": 64,
    "cluster.num_workers": [1, 4],
}
UNITS = {"prune.granularity": "channel", "prune.target.macs": 0.5}
"""Whole units go, and leave the network after each decision."""
LANGUAGE = {
    "workload.factory": "kill_program:llama",
    "workload.eval_batch_size": 8,
    "pretrain.epochs": 0,
    "finetune.epochs": 0,
    "prune.criterion": "taylor",
    "prune.rounds": 2,
    "prune.scope": "layer",
    "prune.exclude": ["model.embed_tokens.*", "lm_head.*"],
    "prune.reconstruct": "sparsegpt",
    "prune.calibration_examples": 16,
    "prune.calibration_batch_size": 4,
    "cluster.num_workers": [1, 4],
}
"""A Llama is refitted, which `hub_models` has written; its folder is an option of the workload."""
PHASES = ("build", "train", "score", "decide", "cut", "reconstruct", "evaluate", "write", "written")

_SILENCE = timedelta(seconds=120)
"""How long a rank waits for another one.

Not every survivor is told of a death: of four processes that do nothing but all_reduce, one or two
wait on after about one kill in a hundred (torch 2.13), and learn of it from this limit alone. On
Ray its controller ends them.
"""


@dataclass(frozen=True)
class Death:
    """Where a rank kills itself; `written` is after the round's record, before anybody knows."""

    phase: str
    round: int
    rank: int


class _Life:
    """What this process is about to die of."""

    death: Death | None = None
    job: JobConfig | None = None
    rank = 0
    num_calls = 0


def reach(phase: str, call: int = 1) -> None:
    """Dies here, where this is the place to: at the `call`-th time in the chosen round."""
    death, job = _Life.death, _Life.job
    if death is None or job is None or (death.phase, death.rank) != (phase, _Life.rank):
        return
    if len(Store(job.storage, job.name).read_rounds(trial_id(job))) != death.round:
        return
    _Life.num_calls += 1
    if _Life.num_calls == call:
        os.kill(os.getpid(), signal.SIGKILL)


def digits() -> Workload:
    """The digits, whose network, loss and making may kill."""
    reach("build")
    workload = digits_convnet(width=4)
    built: list[nn.Module] = []

    def build() -> nn.Module:
        built.append(workload.build_model())
        return built[-1]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            reach("evaluate", call=2)
        else:
            reach("train" if built[-1].training else "score", call=2)
        return workload.loss(outputs, targets)

    return replace(workload, build_model=build, loss=loss)


def llama(folder: str) -> Workload:
    """A language model of transformers, whose loss may kill while it is scored."""
    place = Path(folder)
    options = {"data": str(place / "text.txt"), "max_length": 12}
    workload = huggingface(model=str(place / "llama"), task="causal_lm", **options)

    def loss(outputs: Any, _: Any) -> Tensor:
        if torch.is_grad_enabled():
            reach("score", call=2)
        return outputs.loss

    return replace(workload, loss=loss)


def make_job(
    storage: Path,
    strategy: str,
    more: dict[str, Any] | None = None,
    settings: dict[str, Any] = SETTINGS,
) -> JobConfig:
    own = {"storage": str(storage), "cluster.strategy": strategy}
    return load_job(None, settings | own | (more or {}))


def start_group(job: JobConfig, world_size: int, death: Death | None = None) -> list[BaseProcess]:
    """Starts `world_size` gloo processes that work on a trial."""
    context = multiprocessing.get_context("forkserver")
    meeting = Path(job.storage) / f"meeting-{uuid.uuid4().hex}"
    meeting.parent.mkdir(parents=True, exist_ok=True)
    processes: list[BaseProcess] = [
        context.Process(target=_work, args=(job, rank, world_size, meeting, death), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def wait_until_met(job: JobConfig, processes: list[BaseProcess], timeout_s: float = 300) -> None:
    """Waits until all are in one group: before that, Ray itself sees who dies."""
    deadline = time.monotonic() + timeout_s
    while not all((Path(job.storage) / f"met-{p.pid}").exists() for p in processes):
        assert time.monotonic() < deadline, "the group never met"
        time.sleep(0.01)


def end_group(processes: list[BaseProcess], timeout_s: float = 300) -> list[int | None]:
    """Waits for all of them; those that wait for a dead one must end by themselves.

    Those that do not say on standard error where they are.
    """
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
            process.join(1.0)
    for process in processes:
        process.kill()
        process.join()
    return codes


def _work(job: JobConfig, rank: int, world_size: int, meeting: Path, death: Death | None) -> None:
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    _Life.death, _Life.job, _Life.rank = death, job, rank
    _die_inside_the_package()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=_SILENCE,
    )
    dist.barrier()
    Path(job.storage, f"met-{os.getpid()}").touch()

    def round_done(record: RoundRecord) -> None:
        # As many rounds are there now as the next one's number says.
        if death is not None and death.round == record.round:
            _Life.death = (
                replace(death, round=death.round + 1) if death.phase == "written" else None
            )
            reach("written")

    work_trial(job, Ranks.current(), round_done=round_done)
    dist.destroy_process_group()


def _die_inside_the_package() -> None:
    """Puts deaths where no code of a user's runs: in the decision, and between two files."""
    select, put = gbp_ray.pruning.rounds.select_masks, FolderObjects.put_new
    remove, check = WholeUnits.remove, Moments.check

    def check_moments(self: Moments, name: str) -> None:
        # All ranks have the sums of a layer, and each knows the weights of those before it.
        reach("reconstruct", call=3)
        check(self, name)

    def remove_units(self: WholeUnits, *args: Any, **options: Any) -> Any:
        removed = remove(self, *args, **options)
        reach("cut")
        return removed

    def select_masks(*args: Any, **options: Any) -> Any:
        if dist.get_world_size() == 1:
            reach("decide")
        exchange = dist.all_reduce
        dist.all_reduce = _after(exchange, lambda: reach("decide", call=2))
        try:
            return select(*args, **options)
        finally:
            dist.all_reduce = exchange

    def put_file(self: FolderObjects, key: str, data: bytes, twin: str = "") -> bool:
        if key.endswith("state.pt") or f"/{SHARDS}" in key:
            reach("write")
        return put(self, key, data, twin)

    gbp_ray.pruning.rounds.select_masks = select_masks  # type: ignore[assignment]
    Moments.check = check_moments  # type: ignore[method-assign]
    WholeUnits.remove = remove_units  # type: ignore[method-assign]
    FolderObjects.put_new = put_file  # type: ignore[method-assign]


def _after(function: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    def both(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        then()
        return result

    return both
