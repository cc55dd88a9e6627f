"""The start program of a submitted job: checks on the head that the job can run there, and runs it.

It goes with the job and needs only Python, so a head without the dependencies or with another
version of this package reports that in one line, with exit code 2.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

FACTS = ".gbp-ray-facts.json"
"""File beside this one, written by the submitting side."""

SUBMITTED = "GBP_RAY_SUBMITTED"
"""Environment variable that marks the driver of a submitted job: the version that sent it."""


def find_fault(facts: dict[str, Any]) -> str | None:
    """Returns the reason why the job cannot run with this Python, or None."""
    python = ".".join(str(part) for part in sys.version_info[:2])
    whose = f"the head's python ({sys.executable})"
    if python not in facts["pythons"]:
        return (
            f"{whose} is Python {python}, gbp-ray needs {' or '.join(facts['pythons'])}; start the "
            "cluster with one of those"
        )
    missing = [name for name in facts["modules"] if importlib.util.find_spec(name) is None]
    if "ray" in missing:
        return (
            f"{whose} has no Ray; start Ray from an activated environment, so that 'python' is the "
            "one that Ray runs with"
        )
    if "gbp_ray" in missing:
        return (
            f"{whose} has no gbp_ray; install gbp-ray {facts['version']} on every node, or submit "
            "without --installed"
        )
    if missing:
        return f"{whose} lacks {', '.join(missing)}; install on every node what gbp-ray needs"

    from gbp_ray import __version__

    if __version__ != facts["version"]:
        return (
            f"{whose} has gbp-ray {__version__}, and {facts['version']} submitted the job; install "
            "the same one, or submit without --installed"
        )
    return None


def refuse_storage(job: str) -> None:
    """Ends the process if the job cannot use its storage, seconds before the driver finds out."""
    from gbp_ray.config.job import load_job
    from gbp_ray.errors import GbpError
    from gbp_ray.results.records import JobRecord
    from gbp_ray.results.store import Store

    try:
        config = load_job(job)
        store = Store(config.storage, config.name)
        store.check_claim(JobRecord(factory=config.workload.factory))
    except GbpError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None


def main() -> NoReturn:
    """Runs the job in this process; never returns."""
    folder = Path(__file__).resolve().parent
    facts = json.loads((folder / FACTS).read_text())
    fault = find_fault(facts)
    if fault is not None:
        sys.stderr.write(f"error: {fault}\n")
        raise SystemExit(2)
    refuse_storage(facts["job"])
    os.environ[SUBMITTED] = facts["version"]
    sys.argv = ["gbp-ray", *facts["arguments"]]
    runpy.run_module("gbp_ray", run_name="__main__")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
