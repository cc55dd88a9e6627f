"""What many one-shot sparsities of one network cost, against one scoring pass and as many tests.

    python tests/benchmarks/one_shot.py DIR/cifar10 DIR/resnet20.safetensors [--sparsities 20]

ResNet-20 over CIFAR-10 from a checkpoint, pruned at twenty sparsities without fine-tuning, one
trial after another in this process, as a process of a sweep does; one thread. The scoring pass and
the evaluations are taken from the records, so both sides are of the same run. The cost is the whole
of it on the clock: reading the job and the data, building, checking, hashing, deciding, writing,
the evaluation of the dense network and the index. Only what comes once with the process is apart:
importing torch, and decoding the images, which are cached on disk.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gbp_ray.config.job import expand, load_job
from gbp_ray.results.query import open_results
from gbp_ray.results.store import Store
from gbp_ray.runtime.trial import run_solo
from gbp_ray.workloads.loading import load_workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("checkpoint", type=Path, help="dense weights of a ResNet-20")
    parser.add_argument("--criterion", default="taylor_squared")
    parser.add_argument("--sparsities", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=1024, help="images to score on")
    parser.add_argument("--test", type=int, default=2000, help="images to evaluate on")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="gbp-ray-one-shot-"))
    try:
        measure(options, work)
    finally:
        shutil.rmtree(work)


def measure(options: argparse.Namespace, work: Path) -> None:
    job = load_job(
        None,
        {
            "name": "one-shot",
            "storage": str(work),
            "workload": {
                "factory": "gbp_ray.zoo:cifar10_resnet20",
                "eval_batch_size": 500,
                "options": {
                    "data": str(options.data.absolute()),
                    "checkpoint": str(options.checkpoint.absolute()),
                    "test_examples": options.test,
                },
            },
            "pretrain.epochs": 0,
            "prune.criterion": options.criterion,
            "prune.rounds": 1,
            "prune.calibration_examples": options.calibration,
            "prune.batchnorm_examples": 0,
            "finetune.epochs": 0,
            "cluster.num_workers": 1,
            "sweep.space": {
                "prune.sparsity": {"linear": [0.3, 0.95], "num": options.sparsities},
            },
        },
    )
    load_workload(job.workload)
    store = Store(job.storage, job.name)
    started = time.perf_counter()
    for trial in expand(job):
        store.claim(trial)
        for _ in run_solo(trial):
            pass
    elapsed_s = time.perf_counter() - started
    report(options, open_results(store.uri).table.to_pylist(), elapsed_s)


def report(options: argparse.Namespace, rows: list[dict[str, object]], elapsed_s: float) -> None:
    pruned = [row for row in rows if row["round"] == 1]
    assert len(pruned) == options.sparsities
    phases: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("seconds.") and value:
                phases[name] = phases.get(name, 0.0) + float(str(value))
    # The trial that scored has the pass on record; the others have what reading it back took.
    score_s = max(float(str(row["seconds.score"])) for row in pruned)
    evaluate_s = sum(float(str(row["seconds.evaluate"])) for row in pruned)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("seconds", justify="right")
    for name, seconds in [
        ("one scoring pass", score_s),
        (f"{options.sparsities} evaluations", evaluate_s),
        ("these two", score_s + evaluate_s),
        ("all phases on record", sum(phases.values())),
        ("all of it on the clock", elapsed_s),
    ]:
        table.add_row(name, f"{seconds:.2f}")
    console = Console(width=100)
    console.print(
        f"{options.criterion}, {options.calibration:,} images to score, {options.test:,} to test "
        f"({date.today()}, {platform.machine()}, one thread); phases "
        + ", ".join(f"{n.removeprefix('seconds.')} {s:.2f}" for n, s in sorted(phases.items())),
        highlight=False,
    )
    console.print(table)
    console.print(
        f"ratio {elapsed_s / (score_s + evaluate_s):.3f} on the clock, "
        f"{sum(phases.values()) / (score_s + evaluate_s):.3f} of the phases",
        highlight=False,
    )


if __name__ == "__main__":
    main()
