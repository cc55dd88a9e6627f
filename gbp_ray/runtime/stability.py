"""`gbp-ray stability`: how far a job's result depends on its seed and on its calibration sample.

Two parts. *Samples*: one dense network, scored on samples of growing size; masks compared without
any fine-tuning. *Seeds*: the whole job once per seed, kept in its storage like any other trial;
last masks and accuracies compared. Both run in this very process; the seeds may run as a sweep.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.distributed.ranks import Ranks, fixed_kernels, own_device
from gbp_ray.errors import ConfigError
from gbp_ray.pruning.analysis import Overlap, SizeStability, compare_samples, measure_overlap
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.masks import pin_files
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.results.store import Store
from gbp_ray.runtime.api import PruneResult, open_result, prune, sweep
from gbp_ray.workloads.contract import num_examples
from gbp_ray.workloads.loading import add_import_paths, load_workload

__all__ = [
    "SIZES",
    "STABLE",
    "SeedStability",
    "Stability",
    "measure_stability",
]

STABLE = 0.9
"""Masks of two samples that overlap so far are called the same."""

SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of calibration examples to look at unless told."""


@dataclass(frozen=True)
class SeedStability:
    """The same job over seeds.

    Attributes:
        trials: For each seed its trial's id, accuracies and sparsity.
        overlap: Of the last masks.
    """

    trials: tuple[dict[str, Any], ...]
    overlap: Overlap


@dataclass(frozen=True)
class Stability:
    """What was found.

    Attributes:
        samples: By criterion, by size; empty where that part was left out.
        seeds: None where that part was left out.
        available: Examples that samples were drawn from.
    """

    job: JobConfig
    samples: dict[str, list[SizeStability]]
    seeds: SeedStability | None
    available: int = 0

    def __repr__(self) -> str:
        return f"<Stability of {self.job.name}: {', '.join(self.samples) or 'seeds'}>"

    def enough_examples(self, criterion: str) -> int | None:
        """Finds the least size from which on two samples give masks that are `STABLE` the same.

        The whole of the data is no sample: there is no other one to compare it with.
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
        """Tells whether samples of a size are all the data, and therefore the same."""
        return 0 < self.available <= examples

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values, for JSON, tables and the figure."""
        seeds = self.seeds
        return {
            "job": self.job.name,
            "sparsity": self.job.prune.sparsity,
            "stable": STABLE,
            "available_examples": self.available,
            "samples": {
                criterion: {
                    "enough_examples": self.enough_examples(criterion),
                    "sizes": [
                        {**_describe_size(size), "is_whole": self.is_whole(size.examples)}
                        for size in sizes
                    ],
                }
                for criterion, sizes in self.samples.items()
            },
            "seeds": seeds
            and {
                "trials": list(seeds.trials),
                "accuracy": _spread([trial["accuracy"] for trial in seeds.trials]),
                "dense_accuracy": _spread([trial["dense_accuracy"] for trial in seeds.trials]),
                "overlap": _describe_overlap(seeds.overlap),
            },
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
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Stability:
    """Runs a job over samples of calibration examples and over seeds, and compares.

    Args:
        job: A checked job, the path of a TOML file, or None for the embedded digits job.
        overrides: Dotted keys to values, applied before the check.
        num_seeds: Samples and seeds, counted up from the job's own.
        sizes: Numbers of calibration examples.
        criteria: What the samples are scored by; the job's own by default.
        is_evaluated: Measures the accuracy under the mask of each sample, without fine-tuning.
        with_samples: Runs the first part.
        with_seeds: Runs the second one.
        is_sweep: Lets Ray Tune run the seeds, as `gbp-ray sweep` does.
        tell: Called with (what is done, steps done, steps in all).

    Raises:
        GbpError: One line that names the field, what is allowed and what to do.
    """
    if num_seeds < 2:
        raise ConfigError(f"--seeds = {num_seeds}: must be 2 or more; one has nothing beside it")
    if not sizes or min(sizes) < 1:
        raise ConfigError("--examples: must be whole numbers from 1 up, such as 64:8192")
    import_paths = [str(Path.cwd())]
    if isinstance(job, (str, Path)):
        import_paths.append(str(Path(job).resolve().parent))
    add_import_paths(import_paths)
    loaded = load_job(job, overrides)
    seeds = range(loaded.seed, loaded.seed + num_seeds)
    samples: dict[str, list[SizeStability]] = {}
    available = 0
    if with_samples:
        samples, available = _run_samples(loaded, sizes, seeds, criteria, is_evaluated, tell)
    found = _run_seeds(loaded, seeds, is_sweep, tell) if with_seeds else None
    return Stability(loaded, samples, found, available)


def _run_samples(
    job: JobConfig,
    sizes: Sequence[int],
    seeds: range,
    criteria: Sequence[str],
    is_evaluated: bool,
    tell: Callable[[str, int, int], None],
) -> tuple[dict[str, list[SizeStability]], int]:
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
        check_job(one, load_workload(one.workload, one.seed))
    workload = load_workload(job.workload, job.seed)
    available = num_examples(workload.train)
    if min(sizes) > available:
        raise ConfigError(
            f"--examples: starts at {min(sizes)}, but there are {available} training examples"
        )
    ranks = Ranks(device=own_device(job))
    # One network for all, whatever would have scored it.
    first = next(iter(jobs.values()))
    with fixed_kernels(job.cluster.threads_per_worker):
        model = next(
            run_rounds(
                first,
                workload,
                ranks,
                tell=lambda phase, number, done, total, loss: tell(
                    f"dense network: {phase}", done, total
                ),
            )
        ).model
        found = {
            name: compare_samples(
                one,
                workload,
                model,
                sizes,
                seeds,
                ranks,
                is_evaluated=is_evaluated,
                tell=lambda what, done, total, name=name: tell(f"{name}, {what}", done, total),  # type: ignore[misc]
            )
            for name, one in jobs.items()
        }
    return found, available


def _run_seeds(
    job: JobConfig, seeds: range, is_sweep: bool, tell: Callable[[str, int, int], None]
) -> SeedStability:
    results: list[PruneResult] = []
    if is_sweep:
        sweep(job, {"sweep.space": {"seed": list(seeds)}})
        store = Store(job.storage, job.name)
        results = [
            open_result(
                store.trial_uri(trial_id(pin_files(load_job(job, {"seed": seed, "sweep": {}}))))
            )
            for seed in seeds
        ]
    else:
        for number, seed in enumerate(seeds):
            tell(f"seed {seed}", number, len(seeds))
            one = load_job(job, {"seed": seed, "sweep": {}, "cluster.num_workers": 0})
            results.append(prune(one, is_quiet=True))
        tell(f"seed {seeds[-1]}", len(seeds), len(seeds))
    trials = tuple(
        {
            "seed": seed,
            "trial_id": result.record.trial_id,
            "uri": result.uri,
            "accuracy": result.accuracy,
            "dense_accuracy": result.record.dense_reference.accuracy,
            "dense_is_recalibrated": result.record.dense_reference.is_recalibrated,
            "sparsity": result.sparsity,
        }
        for seed, result in zip(seeds, results, strict=True)
    )
    return SeedStability(trials, measure_overlap([result.load_masks() for result in results]))


def _describe_size(size: SizeStability) -> dict[str, Any]:
    return {
        "examples": size.examples,
        "overlap": _describe_overlap(size.between),
        "overlap_to_largest": _spread(size.to_largest),
        "accuracy": _spread(size.accuracies),
    }


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
