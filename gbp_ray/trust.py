"""Code that stored results name: it runs only where it is built in or was allowed by name.

A record is data, and whoever can write a storage can write any "module:attr" into it, with options
to call it with. So a job's own names count where the user gave the job; those of a record count
where the user repeats them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from gbp_ray import zoo
from gbp_ray.config import JobConfig, load_job
from gbp_ray.errors import ConfigError
from gbp_ray.workload import add_import_paths

__all__ = ["admit_code", "code_of"]


def code_of(job: JobConfig) -> dict[str, str]:
    """Lists the code that a job names as "module:attr" and that is not built in, by field."""
    named = {"workload.factory": job.workload.factory, "prune.criterion": job.prune.criterion}
    built_in = {f"gbp_ray.zoo:{name}" for name in zoo.__all__}
    return {key: name for key, name in named.items() if ":" in name and name not in built_in}


def admit_code(
    job: JobConfig, uri: str, trusted: Iterable[str] = (), folders: Sequence[str | Path] = ()
) -> None:
    """Makes the code that a record names importable, where it may run.

    Args:
        job: As the record holds it.
        uri: The record's, for the refusal.
        trusted: What may run: "module:attr", "module" for all of it, or the path of a job file
            (.toml) for what that names; its folder is looked in, too.
        folders: Where to look for modules beside the working folder.

    Raises:
        ConfigError: The record names other code.
    """
    named = code_of(job)
    if not named:
        # A module beside downloaded results must not stand in for one that is not installed.
        return
    allowed, paths = set(), [str(Path.cwd()), *(str(folder) for folder in folders)]
    for name in trusted:
        if name.endswith(".toml"):
            allowed |= set(code_of(load_job(name)).values())
            paths.append(str(Path(name).resolve().parent))
        else:
            allowed.add(name)
    for key, name in named.items():
        if not allowed & {name, name.partition(":")[0]}:
            raise ConfigError(
                f"'{uri}': its record names the code {key} = '{name}', which runs only if you "
                f"allow it: --trust-code {name} (Python: trust_code=['{name}']), or --trust-code "
                "with the job file that names it"
            )
    add_import_paths(paths)
