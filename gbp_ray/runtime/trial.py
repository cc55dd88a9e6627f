"""One trial from its lease to its record, in the process that drives it.

A trial of a sweep yields each round, so that a scheduler can judge it, and holds its lease
throughout. Every other trial ends here, too.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate

from torch import nn

from gbp_ray import __version__
from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.distributed.ranks import Ranks, fixed_kernels, own_device
from gbp_ray.distributed.sharding import is_sharded
from gbp_ray.errors import StoreError
from gbp_ray.pruning.checkpoint import SHARDS, Checkpoint
from gbp_ray.pruning.checks import check_metric, load_checked
from gbp_ray.pruning.rounds import RoundState, run_rounds
from gbp_ray.pruning.scoring import ScoreCache
from gbp_ray.results.records import RoundRecord, TrialRecord, choose_round
from gbp_ray.results.store import Store
from gbp_ray.runtime.cache import SharedScores, adopt_dense, dense_origin, share_dense
from gbp_ray.training.evaluation import measure_final_test
from gbp_ray.training.network import build_start
from gbp_ray.training.optimizer import num_steps
from gbp_ray.training.progress import OnProgress, Progress, ignore_progress, with_changes
from gbp_ray.workloads.code import own_sources
from gbp_ray.workloads.contract import Workload, judged_split, num_examples
from gbp_ray.workloads.loading import load_workload

__all__ = ["Step", "finish_trial", "iterate_trial", "run_solo", "run_whole", "work_trial"]

RunRounds = Callable[[Workload | None], Iterator[RoundRecord]]
"""Runs and commits the missing rounds of a trial, with the checked workload if it may be reused."""


@dataclass(frozen=True)
class Step:
    """A round of a trial; `is_old` if it was committed before."""

    record: RoundRecord
    is_old: bool


def run_solo(
    job: JobConfig,
    on_progress: OnProgress = ignore_progress,
    is_patient: bool = True,
) -> Iterator[Step]:
    """Runs a trial in this process; yields all of its rounds, then commits it.

    Raises:
        BusyError: Another driver holds it, and `is_patient` is False.
        GbpError: The job or the storage is at fault.
    """
    store = Store(job.storage, job.name)

    def run_rounds(workload: Workload | None) -> Iterator[RoundRecord]:
        return iterate_trial(
            job,
            Ranks(device=own_device(job)),
            workload=workload,
            on_progress=on_progress,
            score_cache=SharedScores(store),
        )

    return run_whole(job, store, run_rounds, is_patient=is_patient)


def run_whole(
    job: JobConfig, store: Store, run_rounds: RunRounds, *, is_patient: bool = True
) -> Iterator[Step]:
    """Runs a trial as `run_solo` does, with any function for its rounds."""
    name = trial_id(job)
    started = time.monotonic()
    with store.await_lease(f"trials/{name}") if is_patient else store.hold(name) as lease:
        # Its last holder may have finished the trial.
        finished = store.read_trial(name)
        rounds = store.read_rounds(name) if finished is None else finished.rounds
        for record in rounds:
            yield Step(record, is_old=True)
        if finished is not None:
            return
        # The workload is not held here: rounds may run in other processes.
        missing = run_rounds(take_checked(job, rounds[0] if rounds else None))
        for record in _run_with_dense(job, store, missing):
            lease.check()
            yield Step(record, is_old=False)
        lease.check()
        finish_trial(job, store, time.monotonic() - started)


def take_checked(job: JobConfig, dense: RoundRecord | None) -> Workload | None:
    """Loads and checks a job's workload; returns it if a trial may go on with it, else None."""
    workload, is_untouched = load_checked(job, dense)
    return workload if is_untouched else None


def _run_with_dense(
    job: JobConfig, store: Store, rounds: Iterator[RoundRecord]
) -> Iterator[RoundRecord]:
    """Runs rounds that have not started, and shares the dense network with other trials."""
    if dense_origin(job) is not None and store.read_round(trial_id(job), 0) is None:
        record = adopt_dense(store, job)
        if record is None:
            with share_dense(store, job) as share:
                # Another trial may have trained it while this one waited.
                record = adopt_dense(store, job)
                if record is None:
                    record = next(rounds)
                    share(record)
        yield record
    yield from rounds


def finish_trial(job: JobConfig, store: Store, seconds: float) -> TrialRecord:
    """Commits a trial after its last round.

    Raises:
        StoreError: A round is missing, or the storage cannot be written.
    """
    name = trial_id(job)
    rounds = store.read_rounds(name)
    if len(rounds) != job.prune.rounds + 1:
        raise StoreError(
            f"storage: round {len(rounds)} vanished from '{store.trial_uri(name)}'; is another "
            "process running this job? Run the job again when it has ended"
        )
    test = store.read_test(name)
    if test is None and job.workload.validation:
        raise StoreError(
            f"storage: test.json vanished from '{store.trial_uri(name)}'; run the job again"
        )
    record = TrialRecord(
        trial_id=name,
        job=job,
        rounds=tuple(rounds),
        seconds=round(seconds, 1),
        num_workers=job.cluster.num_workers,
        versions=_versions(),
        sources=own_sources(job),
        test=test,
    )
    store.write_trial(record)
    return record


def _versions() -> dict[str, str]:
    # On a cluster this package may come with the job and not be installed.
    packages = {"gbp-ray": __version__}
    for name in ("torch", "ray", "numpy"):
        with suppress(PackageNotFoundError):  # one rank needs no Ray
            packages[name] = version(name)
    return {"python": platform.python_version(), **packages, "machine": platform.machine()}


def work_trial(
    job: JobConfig,
    ranks: Ranks,
    *,
    workload: Workload | None = None,
    on_progress: OnProgress = ignore_progress,
    round_done: Callable[[RoundRecord], None] = lambda record: None,
) -> None:
    """Runs and commits a trial's missing rounds.

    Args:
        workload: The one that this process has checked; loaded by default.
        round_done: Called on every rank after each committed round.

    Raises:
        GbpError: The same one on all ranks.
    """
    for record in iterate_trial(job, ranks, workload=workload, on_progress=on_progress):
        round_done(record)


def iterate_trial(
    job: JobConfig,
    ranks: Ranks,
    *,
    workload: Workload | None = None,
    on_progress: OnProgress = ignore_progress,
    score_cache: ScoreCache | None = None,
) -> Iterator[RoundRecord]:
    """Runs and commits a trial's missing rounds, and yields the record of each."""
    with fixed_kernels(job.cluster.threads_per_worker):
        name = trial_id(job)
        store = Store(job.storage, job.name)
        if workload is None:
            workload = ranks.run_collectively(lambda: load_workload(job.workload, job.seed))
        # Rank 0 decides, since a round may be committed between the reads of two ranks.
        records = ranks.broadcast_object(ranks.run_collectively(lambda: store.read_rounds(name)))
        if records:
            # Round 0 may be another trial's, made before the workload was changed.
            check_metric(workload, records[0], f"trial {name}")
        # The driver that holds the trial now must hold it at each commit.
        driver = ranks.run_collectively(lambda: store.read_driver(name))
        in_trial = _InTrial(job, workload, on_progress)
        model: nn.Module | None = None
        if len(records) <= job.prune.rounds:
            for state in run_rounds(
                job,
                workload,
                ranks,
                # Passed on and not held here, as it may be as large as the network.
                resume=ranks.run_collectively(lambda: _read_checkpoint(store, name, records, job)),
                on_progress=in_trial,
                score_cache=score_cache,
            ):
                record = _commit(store, name, driver, state, ranks)
                # Stored weights have the dense network's shapes.
                model = state.model if record.cost.units is None else None
                # The next round makes masks and an optimizer of its own.
                del state
                yield record
        if workload.validation is not None:
            _use_test_split(job, workload, store, ranks, in_trial, model)


def _use_test_split(
    job: JobConfig,
    workload: Workload,
    store: Store,
    ranks: Ranks,
    on_progress: OnProgress,
    model: nn.Module | None,
) -> None:
    """Measures the chosen round on the test split, once."""
    name = trial_id(job)
    if ranks.broadcast_object(ranks.run_collectively(lambda: store.read_test(name))) is not None:
        return
    records = ranks.broadcast_object(ranks.run_collectively(lambda: store.read_rounds(name)))
    if model is None:
        known, source = records[0].fingerprints, store.round_uri(name, 0)
        strategy = job.cluster.strategy
        model = build_start(workload, job.seed, ranks, strategy, known, source).model
    found = measure_final_test(
        job,
        workload,
        model,
        ranks,
        choose_round(records).round,
        lambda number: store.read_file(name, records[number], "weights.safetensors"),
        on_progress,
    )
    ranks.run_collectively(lambda: store.write_test(name, found) if ranks.is_first else None)


def _commit(store: Store, name: str, driver: str, state: RoundState, ranks: Ranks) -> RoundRecord:
    """Writes a round, each rank its own part; a failure of one rank stops all."""
    number = state.record.round

    def begin() -> None:
        store.check_driver(name, driver)
        store.begin_round(name, number)

    files: Iterable[tuple[str, bytes]] = ()
    if is_sharded(state.model):
        files = state.to_files().items()
    elif ranks.is_first:
        files = state.files()
    ranks.run_collectively(lambda: begin() if ranks.is_first else None)
    written = ranks.run_collectively(lambda: store.put_files(name, number, files))
    everything = {k: v for part in ranks.all_gather_objects(written) for k, v in part.items()}

    def end() -> RoundRecord:
        if not ranks.is_first:
            return state.record
        store.check_driver(name, driver)
        return store.end_round(name, state.record, everything)

    return ranks.run_collectively(end)


class _Shards(Mapping[str, bytes]):
    """The shards of a stored round, read at each access."""

    def __init__(self, store: Store, name: str, record: RoundRecord) -> None:
        self._store, self._name, self._record = store, name, record

    def __getitem__(self, file: str) -> bytes:
        return self._store.read_file(self._name, self._record, f"{SHARDS}{file}")

    def __iter__(self) -> Iterator[str]:
        names = self._record.files
        return (name.removeprefix(SHARDS) for name in names if name.startswith(SHARDS))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _read_checkpoint(
    store: Store, name: str, records: list[RoundRecord], job: JobConfig
) -> Checkpoint | None:
    if not records:
        return None
    last = records[-1]
    read = partial(store.read_file, name, last)
    shards = _Shards(store, name, last)
    dense = b""
    # A worker of a sharded network may have no room for a whole one, so it is read if needed.
    if job.needs_dense_weights or not shards:
        dense = store.read_file(name, records[0], "weights.safetensors")
    return Checkpoint(
        round=last.round,
        masks=read("masks.safetensors"),
        weights=b"" if shards else read("weights.safetensors"),
        state=b"" if shards else read("state.pt"),
        shards=shards,
        dense_weights=dense,
        fingerprints=records[0].fingerprints,
    )


_TRAINED = 3
"""Cost of a training or scoring pass over an example, in passes that only measure it."""

_REFITTED = 20
"""Layers that a refit takes one after another, until it has said how many there are."""


class _InTrial:
    """Adds the finished share of the trial to the progress of its rounds.

    A share is one of passes over examples. Each layer of a refit counts as one over the calibration
    examples, which it is about, and what passes over none counts as nothing.
    """

    def __init__(self, job: JobConfig, workload: Workload, on_progress: OnProgress) -> None:
        num_rounds = job.prune.rounds
        self._on_progress = with_changes(on_progress, trial=trial_id(job), num_rounds=num_rounds)
        self._job = job
        size = job.finetune.batch_size * num_steps(job.finetune, workload, job.finetune.epochs)
        before = job.pretrain.batch_size * num_steps(job.pretrain, workload, job.pretrain.epochs)
        scored = job.prune.calibration_examples if job.prune.spec.needs_data else 0
        judged = num_examples(getattr(workload, judged_split(workload)))
        self._sizes = {
            "pretrain": _TRAINED * before,
            "score": _TRAINED * scored,
            "finetune": _TRAINED * size,
            "evaluate": judged + job.workload.train_sample,
        }
        self._expect_refits(_REFITTED if job.prune.reconstruct != "none" else 0)
        self._round, self._phase, self._ended = -1, "", 0
        self._share = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "reconstruct" and progress.total != self._num_refitted:
            self._expect_refits(progress.total)
        if progress.round != self._round:
            self._round, self._phase, self._ended = progress.round, "", 0
        if progress.phase != self._phase:
            self._ended += self._sizes.get(self._phase, 0)
            self._phase = progress.phase
        in_phase = self._sizes.get(self._phase, 0) * progress.done / progress.total
        place = self._starts[self._round] + self._ended + in_phase
        # What an estimate has got wrong never moves the trial back.
        self._share = max(self._share, min(1.0, place / self._starts[-1]))
        self._on_progress(replace(progress, share=self._share))

    def _expect_refits(self, num_layers: int) -> None:
        self._num_refitted = num_layers
        self._sizes["reconstruct"] = num_layers * self._job.prune.calibration_examples
        sizes = map(self._size_of, range(self._job.prune.rounds + 1))
        self._starts = list(accumulate(sizes, initial=0))

    def _size_of(self, number: int) -> int:
        sizes, is_finetuned = self._sizes, self._job.is_finetuned(number)
        training = is_finetuned * sizes["finetune"]
        if number == 0:
            return sizes["pretrain"] + training + sizes["evaluate"]
        pruning = sizes["score"] + sizes["reconstruct"]
        return pruning + training + (1 + is_finetuned) * sizes["evaluate"]
