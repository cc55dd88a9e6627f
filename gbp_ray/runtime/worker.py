"""What each worker of a trial runs, under Ray or alone: resume, drive the rounds, commit each.

Nothing here knows Ray. Rank 0 writes, and of a sharded network every rank its shards; a failure to
write, like any other failure, reaches all ranks together (`Ranks.agree`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from gbp_ray.config import JobConfig, trial_id
from gbp_ray.pruning.building import build_start
from gbp_ray.pruning.checkpoint import SHARDS, Checkpoint
from gbp_ray.pruning.final_test import measure_final_test
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.pruning.rounds import RoundState, ScoreCache, goes_back_to_dense, run_rounds
from gbp_ray.pruning.sharding import is_sharded
from gbp_ray.pruning.training import num_steps
from gbp_ray.records import choose_round
from gbp_ray.runtime.progress import Tick
from gbp_ray.store import RoundRecord, Store
from gbp_ray.workload import Workload, load_workload

__all__ = ["fixed_kernels", "iterate_trial", "work_trial"]


def work_trial(
    job: JobConfig,
    ranks: Ranks,
    *,
    tell: Callable[[Tick], None] = lambda tick: None,
    round_done: Callable[[RoundRecord], None] = lambda record: None,
) -> None:
    """Runs a trial's missing rounds, committing each to the job's store.

    Args:
        tell: Given this rank's progress after each step.
        round_done: Called on every rank after each committed round.

    Raises:
        GbpError: The same one on all ranks.
    """
    for record in iterate_trial(job, ranks, tell=tell):
        round_done(record)


def iterate_trial(
    job: JobConfig,
    ranks: Ranks,
    *,
    tell: Callable[[Tick], None] = lambda tick: None,
    score_cache: ScoreCache | None = None,
) -> Iterator[RoundRecord]:
    """Does the same and stops after each round, until it is asked for the next one.

    Args:
        score_cache: Asked for the scores of the dense network.

    Yields:
        The record of each committed round.
    """
    with fixed_kernels(job.cluster.threads_per_worker):
        name = trial_id(job)
        store = Store(job.storage, job.name)
        workload = ranks.together(lambda: load_workload(job.workload, job.seed))
        # All go by what rank 0 sees: a round may be committed between two looks.
        records = ranks.share_object(ranks.together(lambda: store.read_rounds(name)))
        # Whoever holds the trial now must hold it at each commit.
        driver = ranks.together(lambda: store.read_driver(name))
        teller = _Teller(job, workload, name, tell)
        model: nn.Module | None = None
        if len(records) <= job.prune.rounds:
            for state in run_rounds(
                job,
                workload,
                ranks,
                # Handed on and not held here: it may be as large as the network.
                resume=ranks.together(lambda: _read_checkpoint(store, name, records, job)),
                tell=teller,
                score_cache=score_cache,
            ):
                record, model = _commit(store, name, driver, state, ranks), state.model
                # Not held through the next round, which makes masks and an optimizer of its own.
                del state
                yield record
        if workload.validation is not None:
            _use_test_split(job, workload, store, ranks, teller, model)


def _use_test_split(
    job: JobConfig,
    workload: Workload,
    store: Store,
    ranks: Ranks,
    tell: _Teller,
    model: nn.Module | None,
) -> None:
    """Measures the chosen round on the test split, once; without a network it builds one."""
    name = trial_id(job)
    if ranks.share_object(ranks.together(lambda: store.read_test(name))) is not None:
        return
    records = ranks.share_object(ranks.together(lambda: store.read_rounds(name)))

    def read_weights(number: int) -> bytes:
        return store.read_file(name, records[number], "weights.safetensors")

    chosen = choose_round(records).round
    if model is None:
        known, source = records[0].fingerprints, store.round_uri(name, 0)
        strategy = job.cluster.strategy
        model = build_start(workload, job.seed, ranks, strategy, known, source).model
    found = measure_final_test(
        job,
        workload,
        model,
        ranks,
        chosen,
        read_weights,
        lambda number, done, total: tell("evaluate", number, done, total, None),
    )
    ranks.together(lambda: store.write_test(name, found) if ranks.is_first else None)


def _commit(store: Store, name: str, driver: str, state: RoundState, ranks: Ranks) -> RoundRecord:
    """Writes a round, each rank what it holds of it; a full disk stops all."""
    number = state.record.round

    def begin() -> None:
        store.check_driver(name, driver)
        store.begin_round(name, number)

    if is_sharded(state.model):
        files = state.to_files()
    else:
        files = ranks.together(lambda: state.to_files() if ranks.is_first else {})
    ranks.together(lambda: begin() if ranks.is_first else None)
    written = ranks.together(lambda: store.put_files(name, number, files))
    everything = {k: v for part in ranks.gather_objects(written) for k, v in part.items()}

    def end() -> RoundRecord:
        if not ranks.is_first:
            return state.record
        store.check_driver(name, driver)
        return store.end_round(name, state.record, everything)

    return ranks.together(end)


class _Shards(Mapping[str, bytes]):
    """The shards of a stored round, each read when it is asked for and not kept."""

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

    def read(file: str) -> bytes:
        return store.read_file(name, last, file)

    shards = _Shards(store, name, last)
    dense = b""
    # A worker of a sharded network may have no room for a whole one that it does not need.
    if goes_back_to_dense(job) or not shards:
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


class _Teller:
    """Turns steps of a phase into ticks that also say how much of the trial is done."""

    def __init__(
        self,
        job: JobConfig,
        workload: Workload,
        name: str,
        tell: Callable[[Tick], None],
    ) -> None:
        self._name, self._tell, self._num_rounds = name, tell, job.prune.rounds
        finetune = num_steps(job.finetune, workload, job.finetune.epochs)
        self._pretrain = num_steps(job.pretrain, workload, job.pretrain.epochs)
        # Movement looks back on a stretch of fine-tuning before the first prune.
        self._dense = self._pretrain + (finetune if job.prune.criterion == "movement" else 0)
        # Scoring counts as one step, so that a trial without training moves on, too.
        self._per_round = 1 + finetune
        self._share = 0.0

    def __call__(self, phase: str, number: int, done: int, total: int, loss: float | None) -> None:
        if number == 0:
            before = 0
            inside = {
                "pretrain": float(done),
                "finetune": self._pretrain + done,
                "evaluate": self._dense,
            }[phase]
        else:
            before = self._dense + (number - 1) * self._per_round
            inside = {
                "score": done / total,
                "teach": 1.0,
                "finetune": 1.0 + done,
                "evaluate": 1.0,
            }[phase]
        everything = self._dense + self._num_rounds * self._per_round
        # Evaluation comes before fine-tuning and after it, and never moves the trial back.
        self._share = max(self._share, min(1.0, (before + inside) / everything))
        self._tell(
            Tick(self._name, number, self._num_rounds, phase, done, total, loss, self._share)
        )


@contextmanager
def fixed_kernels(num_threads: int) -> Iterator[None]:
    """Pins what changes the order of additions inside a kernel, and puts it back.

    On a GPU the kernels of cuDNN; some others of torch's, such as the backward passes of fused
    attention and of adaptive pooling to sizes that do not divide, add in any order there.
    """
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    before = cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(num_threads)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = before
