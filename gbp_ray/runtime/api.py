"""The functions behind the command line and a notebook.

import gbp_ray
result = gbp_ray.prune("job.toml", {"prune.sparsity": 0.95})
print(result.accuracy, result.sparsity, result.uri)
model, masks = result.load_model(), result.load_masks()

Modules that load torch or Ray, which takes seconds, are imported where something has to run: a job
that has finished is answered from storage at once, unless it names code of the user's, which is
imported to see if it has changed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gbp_ray.config.job import JobConfig, check_importable, load_job, read_overrides, trial_id
from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.config.schema import find_idle_options
from gbp_ray.config.sweep import SweepConfig
from gbp_ray.config.workload import TransferConfig
from gbp_ray.errors import StoreError, TrialError
from gbp_ray.results.query import Results, open_results, summarize
from gbp_ray.results.records import JobRecord, RoundRecord, TrialRecord
from gbp_ray.results.store import Store, locate_jobs, locate_trials
from gbp_ray.runtime.on_ray.optuna import OptunaPlan, make_search
from gbp_ray.runtime.outcomes import Outcome, find_judge, warn_of_idle_metric
from gbp_ray.runtime.pinning import pin_files, pin_trials
from gbp_ray.runtime.progress import ProgressBoard, SweepBoard
from gbp_ray.runtime.search import (
    Answer,
    Bisection,
    SearchPlan,
    Sparsities,
    TrialHistory,
    TrialList,
    TrialQueue,
    check_extras,
    describe_answer,
    first_of_each_group,
)
from gbp_ray.runtime.submission import prepare_submission
from gbp_ray.workloads.code import (
    add_job_folders,
    admit_code,
    code_of,
    warn_of_changed_code,
    warn_of_shadowed_modules,
)

if TYPE_CHECKING:
    from torch import nn

    from gbp_ray.pruning.masks import MaskSet
    from gbp_ray.runtime.estimate import PrunePlan, SweepPlan
    from gbp_ray.workloads.contract import Workload

__all__ = [
    "PruneResult",
    "SweepResult",
    "open_result",
    "plan_prune",
    "plan_sweep",
    "prune",
    "submit",
    "sweep",
]


@dataclass(frozen=True)
class PruneResult:
    """A finished trial.

    Attributes:
        record: All measurements, those of the dense network first.
        uri: The folder of its rounds, or `s3://...`.
        trusted: Code that the user's own job names.
    """

    record: TrialRecord
    uri: str
    trusted: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def score(self) -> float:
        """The workload's first metric on the test split, of the pruned network."""
        return self.record.test_score

    @property
    def accuracy(self) -> float:
        """The same in [0, 1] where it is the accuracy; else a GbpError."""
        return self.record.test_accuracy

    @property
    def sparsity(self) -> float:
        """Zero weights / prunable weights of the pruned network."""
        return self.record.chosen.sparsity

    def round_uri(self, round_number: int | None = None) -> str:
        """Returns the address of a round, by default of the chosen one."""
        store, record = self._find_round(round_number)
        return store.round_uri(self.record.trial_id, record.round)

    def load_masks(self, round_number: int | None = None) -> MaskSet:
        """Reads the masks of a round; by default of the chosen one."""
        from gbp_ray.pruning.masks import MaskSet

        name = "masks.safetensors"
        return MaskSet.from_bytes(self._read(round_number, name), name)

    def load_model(
        self, round_number: int | None = None, *, trust_code: Sequence[str] = ()
    ) -> nn.Module:
        """Builds a round's network, by default the chosen one's; see `admit_code` on trust.

        It has the dense network's shapes: whole units that were removed are zeros in it, which
        `gbp_ray.compact` takes out.
        """
        from gbp_ray.training.network import rebuild_network
        from gbp_ray.workloads.loading import load_workload

        job = self.record.job
        admit_code(job, self.uri, [*self.trusted, *trust_code])
        # The round has all weights; the file that training began with may be gone.
        start = {"transfer": TransferConfig()}
        workload = load_workload(job.workload.model_copy(update=start), job.seed)
        name, known = "weights.safetensors", self.record.dense.fingerprints
        return rebuild_network(workload, job.seed, self._read(round_number, name), name, known)

    def _read(self, round_number: int | None, name: str) -> bytes:
        store, record = self._find_round(round_number)
        return store.read_file(self.record.trial_id, record, name)

    def _find_round(self, round_number: int | None) -> tuple[Store, RoundRecord]:
        store, rounds = locate_jobs(self.uri)[0][0], self.record.rounds
        if round_number is None:
            return store, self.record.chosen
        if not -len(rounds) <= round_number < len(rounds):
            raise StoreError(
                f"'{self.uri}': has no round {round_number} (allowed: 0 to {len(rounds) - 1}, "
                "or -1 for the last)"
            )
        return store, rounds[round_number]


def prune(
    job: JobConfig | str | Path | None = None,
    overrides: Mapping[str, Any] | list[str] | None = None,
    *,
    workload: Workload | Callable[..., Workload] | None = None,
    is_quiet: bool = False,
    is_debug: bool = False,
) -> PruneResult:
    """Prunes a network by a job; a finished job returns at once, an interrupted one resumes.

    Args:
        job: A checked job, the path of a TOML file, or None for the embedded digits job.
        overrides: Dotted keys to values, applied before the check.
        workload: A `Workload` of this process, or a function that returns one, in place of the
            job's; without a job, `overrides` give all of it. Runs here (`cluster.num_workers = 0`)
            unless the function can be imported and the job asks for workers.
        is_quiet: Shows no progress.
        is_debug: Shows what Ray and workers print.

    Raises:
        GbpError: One line that names the field, what is allowed and what to do.
    """
    if workload is not None:
        from gbp_ray.runtime.live import load_live_job

        job, overrides = load_live_job(workload, overrides, job), None
    job, import_paths = _load(job, overrides)
    store, name = Store(job.storage, job.name), trial_id(job)
    finished = store.read_trial(name)
    if finished is not None:
        if store.read_round(name, finished.chosen.round) is None:
            raise StoreError(
                f"'{store.round_uri(name, finished.chosen.round)}': is gone, but its trial has "
                "finished; restore it, or delete trial.json beside it and run the job again"
            )
        warn_of_changed_code(finished.sources, finished.trial_id, job)
        with ProgressBoard(is_quiet) as board:
            board.note(f"{name}  finished earlier: nothing was run")
        return PruneResult(finished, store.trial_uri(name), tuple(code_of(job).values()))
    from gbp_ray.runtime.single import run_single

    store.preflight()
    with ProgressBoard(is_quiet) as board:
        record = run_single(job, store, import_paths, board, is_debug=is_debug)
    return PruneResult(record, store.trial_uri(name), tuple(code_of(job).values()))


def plan_prune(
    job: JobConfig | str | Path | None = None,
    overrides: Mapping[str, Any] | list[str] | None = None,
) -> PrunePlan:
    """Plans a `prune` without workers; takes `job` and `overrides`, and raises the same errors.

    Builds the network, checks the job and passes a few examples through. Writes nothing, so
    write access to the storage is not checked.
    """
    from gbp_ray.runtime.single import plan_single

    job, import_paths = _load(job, overrides)
    return plan_single(job, Store(job.storage, job.name), import_paths)


@dataclass(frozen=True)
class SweepResult:
    """A sweep that has ended.

    Attributes:
        uri: The address of the job's results.
        outcomes: Of all trials: finished, stopped by the scheduler, or failed.
        answers: With a target, the largest sparsity for each combination.
        seconds: Duration of this run.
    """

    uri: str
    outcomes: tuple[Outcome, ...] = field(repr=False)
    answers: tuple[Answer, ...] = field(repr=False)
    seconds: float

    @property
    def finished(self) -> Results:
        """The rounds of the finished trials, as from `open_results`."""
        return open_results(self.uri).of_trials(o.trial_id for o in self.by_state("finished"))

    @property
    def num_new(self) -> int:
        """Number of trials that this run worked on."""
        return sum(outcome.is_new for outcome in self.outcomes)

    def describe(self) -> dict[str, Any]:
        """Returns plain values: counts, means over seeds, answers, failures."""
        fields: list[str] = []
        lines: list[dict[str, Any]] = []
        if self.by_state("finished"):
            results = self.finished.chosen()
            fields = results.find_varying()
            lines = summarize(results.to_rows(), fields)
        states = {state: self.by_state(state) for state in ("finished", "stopped", "failed")}
        return {
            "uri": self.uri,
            **{f"num_{state}": len(outcomes) for state, outcomes in states.items()},
            "num_new": self.num_new,
            "seconds": round(self.seconds, 1),
            "worker_seconds": round(sum(o.seconds for o in self.outcomes if o.is_new), 1),
            "fields": fields,
            "summary": lines,
            "answers": [describe_answer(answer, self.answers) for answer in self.answers],
            "finished": [outcome.trial_id for outcome in states["finished"]],
            **{
                state: list(map(_describe_outcome, outcomes))
                for state, outcomes in states.items()
                if state != "finished"
            },
        }

    def by_state(self, state: str) -> list[Outcome]:
        """Lists the outcomes that are finished, stopped or failed."""
        return [outcome for outcome in self.outcomes if outcome.state == state]


def sweep(
    job: JobConfig | str | Path,
    overrides: Mapping[str, Any] | list[str] | None = None,
    *,
    is_quiet: bool = False,
    is_debug: bool = False,
) -> SweepResult:
    """Runs the trials of a job's [sweep], except those that have ended; arguments as for `prune`.

    Raises:
        GbpError: The job is wrong, the storage does not work, Ray does not start, or all trials
            failed. The failure of some trials is an outcome.
    """
    started = time.monotonic()
    job, trials, store, known, import_paths = _load_sweep(job, overrides)
    plan = _plan(job, trials, known)
    queue = TrialQueue(plan, known)
    with SweepBoard(is_quiet) as board:
        first = queue.next()
        known_specs = [outcome.specs for outcome in queue.outcomes.values()]
        if first is not None:
            queue.put_back(first)
            store.preflight()
            if not known_specs:
                # Reports an error of all trials once; each trial is checked again as it starts.
                known_specs = [_read_specs(first)]
        judge = find_judge(job.sweep, known_specs[0] if known_specs else (ACCURACY,))
        values = ((o.trial_id, o.values.get(judge.name)) for o in queue.outcomes.values())
        board.begin(plan.total, values, judge)
        if first is not None:
            warn_of_shadowed_modules(first, import_paths[-1], stacklevel=3)
            store.claim(first)
            # Ray takes seconds to import; a sweep that has ended does not need it.
            from gbp_ray.runtime.on_ray.tune import run_sweep

            board.note(f"{job.name}  starting Ray")
            run_sweep(job, queue, import_paths, board, judge=judge, is_debug=is_debug)
    order = {trial_id(trial): number for number, trial in enumerate(trials)}
    outcomes = sorted(
        queue.outcomes.values(), key=lambda o: (order.get(o.trial_id, -1), o.trial_id)
    )
    _refuse_failure_of_all(outcomes)
    warn_of_idle_metric(outcomes, job.sweep)
    return SweepResult(
        uri=store.uri,
        outcomes=tuple(outcomes),
        answers=tuple(plan.answers()) if isinstance(plan, Bisection) else (),
        seconds=time.monotonic() - started,
    )


def plan_sweep(
    job: JobConfig | str | Path, overrides: Mapping[str, Any] | list[str] | None = None
) -> SweepPlan:
    """Plans a `sweep` without workers; takes `job` and `overrides`, and raises the same errors.

    Passes a few examples through each kind of network, and joins the job's cluster briefly to list
    its machines. Writes nothing.
    """
    from gbp_ray.runtime.estimate import find_trials, make_sweep_plan, see_machines
    from gbp_ray.runtime.single import load_single
    from gbp_ray.workloads.metrics import specs_of

    job, trials, store, known, import_paths = _load_sweep(job, overrides)
    num_suggested = None
    if job.sweep.search == "optuna":
        # Optuna suggests trials only from the results of earlier ones.
        earlier = known.find_in(job)[: job.sweep.num_samples]
        plan: SearchPlan = TrialList(earlier)
        num_suggested = job.sweep.num_samples - len(earlier)
    else:
        plan = _plan(job, trials, known)
    found = find_trials(job, TrialQueue(plan, known), num_suggested)
    if found.left:
        store.check_claim(JobRecord(factory=job.workload.factory))
    machines = see_machines(job)

    def load(trial: JobConfig) -> Workload:
        workload = load_single(trial, import_paths)[0]
        find_judge(job.sweep, specs_of(workload))
        return workload

    return make_sweep_plan(job, found, store, machines, load)


def _load_sweep(
    source: JobConfig | str | Path, overrides: Mapping[str, Any] | list[str] | None
) -> tuple[JobConfig, list[JobConfig], Store, TrialHistory, list[str]]:
    """Loads a job with its trials; returns its store, their history and import paths, too."""
    import_paths = add_job_folders(source)
    job, trials = pin_trials(load_job(source, overrides))
    for trial in (job, *trials):
        check_importable(trial, is_elsewhere=True)
    _warn_of_idle_options(trials, stacklevel=4)
    if job.cluster.launcher == "local":
        warnings.warn("cluster.launcher has no effect on a sweep, which runs on Ray", stacklevel=3)
    check_extras(job)
    store = Store(job.storage, job.name)
    return job, trials, store, TrialHistory(store, job.sweep), import_paths


def _plan(job: JobConfig, trials: list[JobConfig], known: TrialHistory) -> SearchPlan:
    if job.sweep.target.is_on:
        return Bisection(trials, Sparsities(job))
    if job.sweep.search == "optuna":
        return OptunaPlan(job, known.find_in(job), make_search, _read_specs)
    is_left = {trial_id(trial): known(trial) is None for trial in trials}
    if not any(is_left.values()):
        return TrialList(trials)
    from gbp_ray.runtime.cache import dense_folder

    groups = {trial_id(trial): dense_folder(trial) for trial in trials}
    # Trials that have ended come first, so that the board starts with their number.
    first = first_of_each_group(trials, groups)
    return TrialList(sorted(first, key=lambda trial: is_left[trial_id(trial)]))


def _read_specs(job: JobConfig) -> tuple[MetricSpec, ...]:
    """Checks a job, and describes the metrics of its workload."""
    from gbp_ray.pruning.checks import load_checked
    from gbp_ray.workloads.metrics import specs_of

    return specs_of(load_checked(job)[0])


def _describe_outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "trial_id": outcome.trial_id,
        "state": outcome.state,
        "round": outcome.round,
        outcome.metric.name: outcome.score,
        "cause": outcome.cause,
    }


def _refuse_failure_of_all(outcomes: list[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed and len(failed) == len(outcomes):
        name, cause = failed[0].trial_id, failed[0].cause
        text = f"sweep: all {len(failed)} trials failed, {name} with: {cause}"
        raise TrialError(text, trial_id=name, cause=cause)


def submit(
    job: JobConfig | str | Path | None = None,
    overrides: Mapping[str, Any] | list[str] | None = None,
    *,
    address: str | None = None,
    is_sweep: bool = False,
    folder: str | Path | None = None,
    env_names: Sequence[str] = (),
    include: Sequence[str] = (),
    is_installed: bool = False,
) -> str:
    """Submits a job to a cluster; returns its submission id when the job's checks have passed.

    Args:
        job: As for `prune`; the cluster must reach its storage.
        address: http://HEAD:8265; by default RAY_API_SERVER_ADDRESS.
        is_sweep: Runs a sweep even without a space.
        folder: The folder to send; the job file's own by default.
        env_names: Environment variables to send; no secrets.
        include: Files and folders to send although the rules leave them out.
        is_installed: Leaves this package out because the nodes have it.

    Raises:
        GbpError: The job is wrong, the cluster refuses it, or it failed there.
    """
    from gbp_ray.runtime.on_ray.head import Head, find_address

    address = find_address(address)
    submission = prepare_submission(
        job,
        overrides,
        address=address,
        is_sweep=is_sweep,
        folder=folder,
        env_names=env_names,
        include=include,
        is_installed=is_installed,
    )
    head = Head(address)
    name = head.send(submission)[0].submission_id
    head.await_checks(name).check()
    return name


def open_result(uri: str | Path) -> PruneResult:
    """Opens a finished trial by its folder, or by its job's if that holds only one trial.

    Raises:
        StoreError: There is no such trial, there are several, or it has not finished.
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
    """Loads a job for a single trial, with its import paths; warns of idle options."""
    import_paths = add_job_folders(source)
    job = pin_files(load_job(source, overrides))
    check_importable(job)
    if job.sweep != SweepConfig():
        warnings.warn("sweep has no effect on a single prune; gbp-ray sweep runs it", stacklevel=3)
        job = job.model_copy(update={"sweep": SweepConfig()})
    _warn_of_idle_options([job], stacklevel=4, given=None if source else read_overrides(overrides))
    return job, import_paths


def _warn_of_idle_options(
    jobs: Sequence[JobConfig], stacklevel: int, given: Container[str] | None = None
) -> None:
    """Warns of options that have no effect in any of these jobs.

    Args:
        given: Keys to warn of, where the rest of the job is not the user's; None for all.
    """
    idle = [dict(find_idle_options(job)) for job in jobs]
    for key, reason in idle[0].items() if idle else ():
        if all(key in other for other in idle) and (given is None or key in given):
            warnings.warn(f"{key} has no effect with {reason}", stacklevel=stacklevel)
