"""A sweep of thousands of trials that only sleep and report: what the driver itself can bear.

    python tests/benchmarks/many_trials.py --trials 10000

The driver, Ray Tune, the store and its index are the real ones; in place of pruning a network a
trial sleeps, and writes the records that it would write, without weights. Printed for each tenth
of the sweep: seconds per trial, the driver's memory and its share of one core, so that anything
that grows with the number of trials shows. Trials of no length leave nothing but the cost of
driving them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "support"
sys.path.insert(0, str(TESTS))

from sample_sweep import make_sweep_round, make_sweep_trial  # noqa: E402

import gbp_ray.runtime.on_ray.tune as sweep_module  # noqa: E402
from gbp_ray.config.job import JobConfig, load_job, trial_id  # noqa: E402
from gbp_ray.results.store import Store  # noqa: E402
from gbp_ray.runtime.api import sweep  # noqa: E402
from gbp_ray.runtime.trial import Step  # noqa: E402
from gbp_ray.training.progress import OnProgress, Progress  # noqa: E402

NUM_SPARSITIES, CRITERIA = 10, ("magnitude", "random", "taylor", "fisher")


def sleep_and_report(
    job: JobConfig, on_progress: OnProgress, is_patient: bool, seconds: float
) -> Iterator[Step]:
    """Does what a trial does but for the pruning: takes its lease, commits rounds, ends."""
    store, name = Store(job.storage, job.name), trial_id(job)
    with store.await_lease(f"trials/{name}"):
        rounds = []
        for number in range(job.prune.rounds + 1):
            time.sleep(seconds / (job.prune.rounds + 1))
            done = Progress("finetune", 1, 1, 0.5, number, name, job.prune.rounds, 0.5)
            on_progress(done)
            rounds.append(store.end_round(name, make_sweep_round(job, number), {}))
            yield Step(rounds[-1], is_old=False)
        store.write_trial(make_sweep_trial(job, tuple(rounds)))


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e3
    raise SystemExit("this kernel tells no VmRSS")


def used_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Watch:
    """Notes, for each tenth of the trials, when it ended and what the driver held."""

    def __init__(self, folder: Path, total: int) -> None:
        self._folder, self._total = folder, total
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.rows: list[tuple[int, float, float, float]] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._note(self._count())

    def _count(self) -> int:
        try:
            return sum(1 for _ in os.scandir(self._folder / "trials"))
        except FileNotFoundError:
            return 0

    def _note(self, count: int) -> None:
        self.rows.append((count, time.monotonic(), resident_mb(), used_s()))

    def _run(self) -> None:
        tenth = max(1, self._total // 10)
        due = 1
        while not self._is_over.wait(0.5):
            if (count := self._count()) >= due:
                self._note(count)
                due = (count // tenth + 1) * tenth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.0, help="that each trial sleeps")
    parser.add_argument("--at-once", type=int, default=2)
    options = parser.parse_args()
    num_seeds = math.ceil(options.trials / NUM_SPARSITIES / len(CRITERIA))
    with tempfile.TemporaryDirectory() as storage:
        settings = {
            "name": "many",
            "storage": storage,
            "prune.rounds": 1,
            "cluster.num_workers": 1,
            "sweep.max_concurrent": options.at_once,
            "sweep.space": {
                "prune.criterion": list(CRITERIA),
                "prune.sparsity": {"linear": [0.5, 0.95], "num": NUM_SPARSITIES},
                "seed": list(range(num_seeds)),
            },
        }
        total = num_seeds * NUM_SPARSITIES * len(CRITERIA)
        trial = partial(sleep_and_report, seconds=options.seconds)
        sweep_module.run_sweep = partial(sweep_module.run_sweep, run=trial)
        sys.path.insert(0, str(TESTS))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        started, used = time.monotonic(), used_s()
        with Watch(Path(storage) / "many", total) as watch:
            result = sweep(load_job(None, settings), is_quiet=True)
        assert len(result.by_state("finished")) == total, "some trials did not finish"
        first = watch.rows[0]
        print(
            f"{total:,} trials, {options.at_once} at a time, {options.seconds:g} s each: "
            f"{time.monotonic() - started:.0f} s in all, {first[1] - started:.0f} s to the first, "
            f"driver {used_s() - used:.0f} s of CPU"
        )
        print("\n| trials | ms per trial | driver's memory, MB | driver's share of a core |")
        print("|---|---|---|---|")
        for before, after in itertools.pairwise(watch.rows):
            seconds = after[1] - before[1]
            number = after[0] - before[0]
            if number:
                print(
                    f"| {after[0]:,} | {seconds / number * 1e3:.0f} | {after[2]:.0f} | "
                    f"{(after[3] - before[3]) / seconds:.0%} |"
                )
        again = time.monotonic()
        assert sweep(load_job(None, settings), is_quiet=True).num_new == 0
        print(f"\nrun again, with nothing left to do: {time.monotonic() - again:.1f} s")


if __name__ == "__main__":
    main()
