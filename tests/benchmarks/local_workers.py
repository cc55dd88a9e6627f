"""Processor seconds of the digits job: two workers on Ray, two of the command itself, and none.

User and system time of every process of the command's session, Ray's daemons among them, as /proc
shows it five times a second until none is left. A process that ends between two looks loses what
it used since the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_LOOK_S = 0.2
_KINDS = {
    "none": ["cluster.num_workers=0"],
    "local": ["cluster.num_workers=2", "cluster.launcher=local"],
    "ray": ["cluster.num_workers=2", "cluster.launcher=ray"],
}


def main() -> None:
    """Runs each kind in turn; prints medians, ranges and ratios to none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS))
    parser.add_argument("--set", action="append", default=[], help="of the job, as for gbp-ray")
    options = parser.parse_args()
    used: dict[str, list[tuple[float, float]]] = {kind: [] for kind in options.kinds}
    results = set()
    for _ in range(options.repeats):
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as folder:
                settings = [f"storage={folder}", *_KINDS[kind], *options.set]
                cpu_s, wall_s, digest = _run(settings)
            used[kind].append((cpu_s, wall_s))
            results.add(digest)
            print(f"{kind}: {cpu_s:.1f} processor seconds in {wall_s:.0f} s", flush=True)
    assert len(results) == 1, "the results differ"
    print(f"{date.today()}, {os.cpu_count()} cores; the results are the same to the bit")
    base_s = statistics.median(cpu_s for cpu_s, _ in used[options.kinds[0]])
    for kind, runs in used.items():
        cpu_s = sorted(cpu_s for cpu_s, _ in runs)
        wall_s = sorted(wall_s for _, wall_s in runs)
        print(
            f"| {kind} | {statistics.median(cpu_s):.1f} s ({cpu_s[0]:.1f} to {cpu_s[-1]:.1f}) | "
            f"{statistics.median(cpu_s) / base_s:.2f} | {wall_s[0]:.0f} to {wall_s[-1]:.0f} s |"
        )


def _run(settings: list[str]) -> tuple[float, float, str]:
    """Returns processor seconds, seconds and the digest of the last round's masks and weights."""
    command = [sys.executable, "-m", "gbp_ray", "prune", "--json", "-q"]
    started_s = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [*command, *(f"--set={setting}" for setting in settings)],
            stdout=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        ticks: dict[tuple[str, str], int] = {}
        while process.poll() is None or _look(process.pid, ticks):
            _look(process.pid, ticks)
            time.sleep(_LOOK_S)
        wall_s = time.monotonic() - started_s
        assert process.returncode == 0, settings
        out.seek(0)
        last = json.load(out)["rounds"][-1]
    digest = last["mask_digest"] + last["files"]["weights.safetensors"]["sha256"]
    return sum(ticks.values()) * _TICK_S, wall_s, digest


def _look(session: int, ticks: dict[tuple[str, str], int]) -> bool:
    """Notes what each process of a session has used; False if there is none."""
    is_alive = False
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            is_alive = is_alive or fields[0] != "Z"
            # Its own user and system time, without that of its children.
            ticks[folder.name, fields[19]] = int(fields[11]) + int(fields[12])
    return is_alive


if __name__ == "__main__":
    main()
