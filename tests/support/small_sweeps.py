"""Sweeps of seconds, their commands, and the processes that a command has started."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gbp_ray.config.job import JobConfig, expand, load_job
from gbp_ray.results.store import Store
from gbp_ray.runtime.trial import run_solo

__all__ = ["find_children", "name_of", "run_alone", "start_sweep", "write_job"]

JOB = """
name = "tiny"

[workload]
factory = "gbp_ray.zoo:digits_convnet"
options = { width = 4 }

[pretrain]
epochs = 1

[prune]
criterion = "taylor"
sparsity = 0.9
rounds = 2
calibration_examples = 128
batchnorm_examples = 64

[finetune]
epochs = 0.5

[cluster]
num_workers = 1

[sweep.space]
"prune.criterion" = ["taylor", "fisher", "random"]
seed = [0, 1, 2, 3]
"""


def write_job(folder: Path, text: str = JOB) -> Path:
    """Writes a job of twelve trials of two rounds, four dense networks in all."""
    path = folder / "job.toml"
    path.write_text(text)
    return path


def start_sweep(
    job_file: Path,
    storage: str,
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Starts the command; its output is one JSON object."""
    words = [sys.executable, "-m", "gbp_ray", "sweep", str(job_file), "--json"]
    pairs = {"storage": storage, **(settings or {})}
    words += [f"--set={name}={_as_toml(value)}" for name, value in pairs.items()]
    return subprocess.Popen(
        words,
        cwd=job_file.parent,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_alone(job_file: Path, storage: str, **settings: Any) -> list[JobConfig]:
    """Runs the same trials one by one in this process, without Ray."""
    jobs = expand(load_job(job_file, {"storage": storage} | settings))
    for job in jobs:
        Store(job.storage, job.name).claim(job)
        for _ in run_solo(job):
            pass
    return jobs


def _as_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(k)} = {_as_toml(v)}' for k, v in value.items())}}}"
    return json.dumps(value)


def find_children(pid: int) -> dict[int, str]:
    """Finds the processes below one, and the name of each program."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            # The name, in brackets, may hold spaces.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])

    def below(parent: int) -> Iterator[int]:
        for child, above in parents.items():
            if above == parent:
                yield child
                yield from below(child)

    return {child: name_of(child) for child in below(pid)}


def name_of(pid: int) -> str:
    """Tells the name of a process' program, or "" where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().rpartition("/")[2]
    except OSError:
        return ""
