"""The verbs: what the command line and a notebook call.

import gbp_ray
result = gbp_ray.prune("job.toml", {"prune.sparsity": 0.95})
print(result.accuracy, result.sparsity, result.uri)
model, masks = result.load_model(), result.load_masks()
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gbp_ray.config import JobConfig, find_idle_options, load_job, trial_id
from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.plan import Plan, make_plan
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.pruning.rounds import check_job, load_weights
from gbp_ray.records import JobRecord
from gbp_ray.runtime.progress import ProgressBoard
from gbp_ray.runtime.worker import work_trial
from gbp_ray.store import RoundRecord, Store, TrialRecord, locate_jobs, locate_trials
from gbp_ray.workload import (
    Workload,
    add_import_paths,
    build_network,
    find_shadowed_module,
    load_workload,
)

__all__ = ["PrunePlan", "PruneResult", "open_result", "plan_prune", "prune"]


@dataclass(frozen=True)
class PruneResult:
    """A finished trial.

    Attributes:
        record: Everything measured, dense network first.
        uri: Where its rounds lie: the path of a folder, or `s3://...`.
    """

    record: TrialRecord
    uri: str

    @property
    def accuracy(self) -> float:
        """Test accuracy of the pruned network, in [0, 1]."""
        return self.record.final.accuracy

    @property
    def sparsity(self) -> float:
        """Zero weights / prunable weights of the pruned network."""
        return self.record.final.sparsity

    def round_uri(self, round_number: int = -1) -> str:
        """Says where a round is, the last by default."""
        return self._store().round_uri(self.record.trial_id, self._round(round_number).round)

    def load_masks(self, round_number: int = -1) -> MaskSet:
        """Reads the masks of a round; the last by default."""
        name = "masks.safetensors"
        return MaskSet.from_bytes(self._read(round_number, name), name)

    def load_model(self, round_number: int = -1) -> nn.Module:
        """Builds the network of a round, the last by default; 0 is the dense one."""
        add_import_paths([str(Path.cwd())])
        model = build_network(load_workload(self.record.job.workload))
        name = "weights.safetensors"
        load_weights(model, self._read(round_number, name), name)
        return model.eval()

    def _read(self, round_number: int, name: str) -> bytes:
        return self._store().read_file(self.record.trial_id, self._round(round_number), name)

    def _round(self, round_number: int) -> RoundRecord:
        rounds = self.record.rounds
        if not -len(rounds) <= round_number < len(rounds):
            raise StoreError(
                f"'{self.uri}': has no round {round_number} (allowed: 0 to {len(rounds) - 1}, "
                "or -1 for the last)"
            )
        return rounds[round_number]

    def _store(self) -> Store:
        ((store,), _) = locate_jobs(self.uri)
        return store


def prune(
    job: JobConfig | str | Path | None = None,
    overrides: Mapping[str, Any] | list[str] | None = None,
    *,
    is_quiet: bool = False,
    is_debug: bool = False,
) -> PruneResult:
    """Prunes a network as a job says; a finished job answers at once, a broken one goes on.

    Args:
        job: A checked job, the path of a TOML file, or None for the embedded digits job.
        overrides: Dotted keys to values, applied before the check.
        is_quiet: Shows no progress.
        is_debug: Lets Ray's own output through.

    Raises:
        GbpError: One line that names the field, what is allowed and what to do.
    """
    job, import_paths = _load(job, overrides)
    store, name = Store(job.storage, job.name), trial_id(job)
    finished = store.read_trial(name)
    if finished is not None:
        return PruneResult(finished, store.trial_uri(name))
    store.preflight()
    started = time.monotonic()
    with ProgressBoard(is_quiet) as board:
        _load_checked(job, import_paths)
        store.claim(job)
        with store.hold(name) as lease:
            # Whoever held it before may have finished the trial.
            record = store.read_trial(name)
            if record is None:
                _run_rounds(job, store, import_paths, board, is_debug=is_debug)
                lease.check()
                record = _finish(job, store, time.monotonic() - started)
    return PruneResult(record, store.trial_uri(name))


@dataclass(frozen=True)
class PrunePlan:
    """What running a job would do now.

    Attributes:
        trial_id: Of the job.
        uri: Where its rounds lie or will lie.
        num_done: Whole rounds that are there already, the dense network among them.
        num_left: Rounds that would be run, likewise; 0 for a finished trial.
        plan: What the whole job costs; None for a finished trial, which answers at once.
    """

    trial_id: str
    uri: str
    num_done: int
    num_left: int
    plan: Plan | None

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values, for JSON and for tables."""
        return {
            "trial_id": self.trial_id,
            "uri": self.uri,
            "finished": self.num_left == 0,
            "rounds_done": self.num_done,
            "rounds_left": self.num_left,
            "plan": self.plan and self.plan.to_dict(),
        }


def plan_prune(
    job: JobConfig | str | Path | None = None,
    overrides: Mapping[str, Any] | list[str] | None = None,
) -> PrunePlan:
    """Plans what `prune` would do; starts no workers and writes nothing.

    Builds the network, checks the job as `prune` does and sends a few examples through. Whether the
    storage can be written is left open.

    Args:
        job: As for `prune`.
        overrides: Likewise.

    Raises:
        GbpError: As `prune`.
    """
    job, import_paths = _load(job, overrides)
    store, name = Store(job.storage, job.name), trial_id(job)
    uri, num_rounds = store.trial_uri(name), job.prune.rounds + 1
    if store.read_trial(name) is not None:
        return PrunePlan(name, uri, num_rounds, 0, None)
    workload = _load_checked(job, import_paths)
    store.check_claim(JobRecord(factory=job.workload.factory))
    _check_device(job)
    num_done = len(store.read_rounds(name))
    return PrunePlan(name, uri, num_done, num_rounds - num_done, make_plan(job, workload))


def open_result(uri: str | Path) -> PruneResult:
    """Opens a finished trial by its folder, or by its job's folder where that holds one trial.

    Raises:
        StoreError: There is no such result, it has not finished, or there are several.
    """
    trials = locate_trials(uri)
    if len(trials) > 1:
        names = ", ".join(store.trial_uri(name) for store, name in trials)
        raise StoreError(f"'{uri}': holds {len(trials)} trials; name one of {names}")
    (store, name) = trials[0]
    record = store.read_trial(name)
    if record is None:
        done = store.read_rounds(name)[-1].round
        raise StoreError(
            f"'{uri}': the trial has not finished (round {done} is the last whole one); run the "
            "same job again to go on"
        )
    return PruneResult(record, store.trial_uri(name))


def _load(
    source: JobConfig | str | Path | None, overrides: Mapping[str, Any] | list[str] | None
) -> tuple[JobConfig, list[str]]:
    """Reads a job and makes the user's own modules importable; returns it and their folders."""
    import_paths = [str(Path.cwd())]
    if isinstance(source, (str, Path)):
        import_paths.append(str(Path(source).resolve().parent))
    add_import_paths(import_paths)
    job = load_job(source, overrides)
    for key, reason in find_idle_options(job):
        warnings.warn(f"{key} has no effect with {reason}", stacklevel=3)
    return job, import_paths


def _load_checked(job: JobConfig, import_paths: list[str]) -> Workload:
    """Loads what is pruned and refuses what the job could only fail at later."""
    workload = load_workload(job.workload)
    check_job(job, workload)
    for key, plug_in in _plug_ins(job):
        if shadowed := find_shadowed_module(plug_in, import_paths[-1]):
            warnings.warn(
                f"{key} = {plug_in}: module {shadowed}; rename yours, or start a new process if "
                "another job brought it in",
                stacklevel=3,
            )
    return workload


def _check_device(job: JobConfig) -> None:
    """Refuses a GPU that is not there, where the job would run on this machine."""
    if job.cluster.num_workers == 0:
        _own_device(job)
    elif job.cluster.use_gpu and job.cluster.address is None and not torch.cuda.is_available():
        raise ConfigError(
            "cluster.use_gpu = true: this machine has no CUDA device; set it to false or give "
            "cluster.address"
        )


def _run_rounds(
    job: JobConfig, store: Store, import_paths: list[str], board: ProgressBoard, *, is_debug: bool
) -> None:
    name = trial_id(job)
    earlier = store.read_rounds(name)
    if earlier:
        board.note(f"{name}  goes on after round {earlier[-1].round}")
    if job.cluster.num_workers == 0:
        work_trial(
            job,
            Ranks(device=_own_device(job)),
            tell=board.show,
            round_done=lambda record: board.show_round(name, record),
        )
    else:
        # Ray takes seconds to import, and jobs without workers do not need it.
        from gbp_ray.runtime.trial import run_trial

        least, most = job.cluster.min_workers, job.cluster.max_workers
        asked = f"{most}" if least == most else f"{least} to {most}"
        board.note(f"{name}  starting {asked} workers on Ray")
        run_trial(job, import_paths, board, is_debug=is_debug)


def _finish(job: JobConfig, store: Store, seconds: float) -> TrialRecord:
    name = trial_id(job)
    rounds = store.read_rounds(name)
    if len(rounds) != job.prune.rounds + 1:
        raise StoreError(
            f"storage: round {len(rounds)} vanished from '{store.trial_uri(name)}'; is another "
            "process running this job? Run the job again when it has ended"
        )
    record = TrialRecord(
        trial_id=name,
        job=job,
        rounds=tuple(rounds),
        seconds=round(seconds, 1),
        num_workers=job.cluster.num_workers,
        versions=_versions(),
    )
    store.write_trial(record)
    return record


def _plug_ins(job: JobConfig) -> list[tuple[str, str]]:
    named = [("workload.factory", job.workload.factory), ("prune.criterion", job.prune.criterion)]
    return [(key, name) for key, name in named if ":" in name]


def _own_device(job: JobConfig) -> torch.device:
    if not job.cluster.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "cluster.use_gpu = true: this machine has no CUDA device; set it to false"
        )
    return torch.device("cuda")


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("gbp-ray", "torch", "ray", "numpy")}
    return {"python": platform.python_version(), **packages, "machine": platform.machine()}
