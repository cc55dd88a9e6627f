"""Dependence of a job's result on its calibration sample and on its seed.

*Samples*: one dense network is scored on samples of growing size, and the masks are compared
without fine-tuning. *Seeds*: the job runs once per seed, stored like any other trial, and the last
masks and scores are compared. Both run in this process, unless a sweep runs the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.distributed.ranks import Ranks, fixed_kernels, own_device
from gbp_ray.errors import ConfigError
from gbp_ray.pruning.analysis import Overlap, SizeStability, compare_samples, measure_overlap
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.results.store import Store
from gbp_ray.runtime.api import open_result, prune, sweep
from gbp_ray.runtime.pinning import pin_files
from gbp_ray.training.progress import OnProgress, Progress, ignore_progress
from gbp_ray.workloads.code import add_job_folders
from gbp_ray.workloads.contract import num_examples
from gbp_ray.workloads.loading import load_workload
from gbp_ray.workloads.metrics import specs_of

__all__ = ["SIZES", "STABLE", "SeedStability", "Stability", "measure_stability"]

STABLE = 0.9
"""Overlap from which on the masks of two samples count as equal."""

SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Default numbers of calibration examples."""


@dataclass(frozen=True)
class SeedStability:
    """The trial of each seed (id, scores, sparsity), and the overlap of their last masks."""

    trials: tuple[dict[str, Any], ...]
    overlap: Overlap


@dataclass(frozen=True)
class Stability:
    """The result of `measure_stability`; a part that did not run is empty or None.

    `samples` are by criterion and size, drawn from `available` examples; scores are of `metric`.
    """

    job: JobConfig
    samples: dict[str, list[SizeStability]]
    seeds: SeedStability | None
    available: int = 0
    metric: MetricSpec = ACCURACY

    def __repr__(self) -> str:
        return f"<Stability of {self.job.name}: {', '.join(self.samples) or 'seeds'}>"

    def enough_examples(self, criterion: str) -> int | None:
        """Returns the smallest size from which on the masks of two samples are `STABLE`.

        All of the data do not count, since every sample of that size is the same.
        """
        found = None
        for size in reversed(self.samples[criterion]):
            if self.is_whole(size.examples):
                continue
            if size.between.mean < STABLE:
                break
            found = size.examples
        return found

    def is_whole(self, examples: int) -> bool:
        """True if samples of a size are all of the data."""
        return 0 < self.available <= examples

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON, tables and the figure."""
        seeds = self.seeds
        return {
            "job": self.job.name,
            "sparsity": self.job.prune.sparsity,
            # Of whole units, where another cost than their number is the target.
            **({"target": self.job.prune.goal} if self.job.prune.target.is_of_cost else {}),
            "stable": STABLE,
            **({} if self.metric == ACCURACY else {"metric": self.metric.model_dump()}),
            "available_examples": self.available,
            "samples": {
                criterion: {
                    "enough_examples": self.enough_examples(criterion),
                    "sizes": [
                        {
                            **self._describe_size(size),
                            "is_whole": self.is_whole(size.examples),
                        }
                        for size in sizes
                    ],
                }
                for criterion, sizes in self.samples.items()
            },
            "seeds": seeds
            and {
                "trials": list(seeds.trials),
                **{
                    name: _spread([trial[name] for trial in seeds.trials])
                    for name in (self.metric.name, f"dense_{self.metric.name}")
                },
                "overlap": _describe_overlap(seeds.overlap),
            },
        }

    def _describe_size(self, size: SizeStability) -> dict[str, Any]:
        return {
            "examples": size.examples,
            "overlap": _describe_overlap(size.between),
            "overlap_to_largest": _spread(size.to_largest),
            self.metric.name: _spread(size.scores),
        }


def measure_stability(
    job: JobConfig | str | Path | None = None,
    overrides: Mapping[str, Any] | list[str] | None = None,
    *,
    num_seeds: int = 3,
    sizes: Sequence[int] = SIZES,
    criteria: Sequence[str] = (),
    is_evaluated: bool = False,
    with_samples: bool = True,
    with_seeds: bool = True,
    is_sweep: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Stability:
    """Runs a job over calibration samples and over seeds, and compares the masks.

    Args:
        job: As for `prune`, like `overrides`.
        num_seeds: Number of samples of each size, and of seeds from the job's own upwards.
        sizes: Numbers of calibration examples.
        criteria: Score the samples; the job's own by default.
        is_evaluated: Measures the first metric under each sample's mask, without fine-tuning.
        with_samples: Runs the part over samples.
        with_seeds: Runs the part over seeds.
        is_sweep: Runs the seeds as a sweep on Ray.
        on_progress: Called with a `training.progress.Progress` after each step.

    Raises:
        GbpError: One line that names the field, what is allowed and what to do.
    """
    if num_seeds < 2:
        raise ConfigError(f"--seeds = {num_seeds}: must be 2 or more, to be compared")
    if not sizes or min(sizes) < 1:
        raise ConfigError("--examples: must be whole numbers from 1 up, such as 64:8192")
    add_job_folders(job)
    loaded = load_job(job, overrides)
    seeds = range(loaded.seed, loaded.seed + num_seeds)
    samples: dict[str, list[SizeStability]] = {}
    available, metric = 0, ACCURACY
    if with_samples:
        samples, available, metric = _run_samples(
            loaded, sizes, seeds, criteria, is_evaluated, on_progress
        )
    found = None
    if with_seeds:
        found, metric = _run_seeds(loaded, seeds, is_sweep, on_progress)
    return Stability(loaded, samples, found, available, metric)


def _run_samples(
    job: JobConfig,
    sizes: Sequence[int],
    seeds: range,
    criteria: Sequence[str],
    is_evaluated: bool,
    on_progress: OnProgress,
) -> tuple[dict[str, list[SizeStability]], int, MetricSpec]:
    jobs = {
        name: load_job(job, {"prune.criterion": name})
        for name in criteria or (job.prune.criterion,)
    }
    for name, one in jobs.items():
        if one.prune.spec.needs_history:
            raise ConfigError(
                f"prune.criterion = {name}: scores while training and has no calibration sample; "
                "leave it to --no-samples or choose another"
            )
    workload = load_workload(job.workload, job.seed)
    untouched = [check_job(one, workload) for one in jobs.values()]
    if not all(untouched):
        workload = load_workload(job.workload, job.seed)
    available = num_examples(workload.train)
    if min(sizes) > available:
        raise ConfigError(
            f"--examples: starts at {min(sizes)}, but there are {available} training examples"
        )
    ranks = Ranks(device=own_device(job))
    # One network for all criteria.
    first = next(iter(jobs.values()))
    with fixed_kernels(job.cluster.threads_per_worker):
        in_dense = _prefix(on_progress, "dense network: ")
        model = next(run_rounds(first, workload, ranks, on_progress=in_dense)).model
        found = {
            name: compare_samples(
                one,
                workload,
                model,
                sizes,
                seeds,
                ranks,
                is_evaluated=is_evaluated,
                on_progress=_prefix(on_progress, f"{name}, "),
            )
            for name, one in jobs.items()
        }
    return found, available, specs_of(workload)[0]


def _prefix(on_progress: OnProgress, prefix: str) -> OnProgress:
    return lambda progress: on_progress(replace(progress, phase=f"{prefix}{progress.phase}"))


def _run_seeds(
    job: JobConfig, seeds: range, is_sweep: bool, on_progress: OnProgress
) -> tuple[SeedStability, MetricSpec]:
    results = []
    if is_sweep:
        sweep(job, {"sweep.space": {"seed": list(seeds)}})
    for number, seed in enumerate(seeds):
        on_progress(Progress(f"seed {seed}", number, len(seeds)))
        # A loop by default, since a sweep starts Ray.
        one = load_job(job, {"seed": seed, "sweep": {}})
        if is_sweep:
            uri = Store(job.storage, job.name).trial_uri(trial_id(pin_files(one)))
            results.append(open_result(uri))
        else:
            results.append(prune(one, {"cluster.num_workers": 0}, is_quiet=True))
    on_progress(Progress(f"seed {seeds[-1]}", len(seeds), len(seeds)))
    metric = results[0].record.metric
    trials = tuple(
        {
            "seed": seed,
            "trial_id": result.record.trial_id,
            "uri": result.uri,
            metric.name: result.score,
            f"dense_{metric.name}": result.record.dense_reference.score,
            "dense_is_recalibrated": result.record.dense_reference.is_recalibrated,
            "sparsity": result.sparsity,
        }
        for seed, result in zip(seeds, results, strict=True)
    )
    overlap = measure_overlap([result.load_masks() for result in results])
    return SeedStability(trials, overlap), metric


def _describe_overlap(overlap: Overlap) -> dict[str, Any]:
    return {**_spread(overlap.pairs), **{k: v for k, v in asdict(overlap).items() if k != "pairs"}}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "least": None, "greatest": None, "deviation": None, "num": 0}
    return {
        "mean": statistics.fmean(values),
        "least": min(values),
        "greatest": max(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "num": len(values),
    }
