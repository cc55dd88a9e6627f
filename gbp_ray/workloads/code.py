"""Code that a job names as "module:attr": found, imported, allowed to run, known by its file.

Nothing here loads torch by itself, so that what storage knows is answered without it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from gbp_ray import workloads
from gbp_ray.config.job import JobConfig, list_code, load_job
from gbp_ray.config.schema import nearest_name
from gbp_ray.errors import ConfigError, GbpError, in_one_line

__all__ = [
    "LIVE",
    "add_import_paths",
    "add_job_folders",
    "admit_code",
    "code_of",
    "digest_source",
    "import_attribute",
    "own_sources",
    "staying",
    "warn_of_changed_code",
    "warn_of_shadowed_modules",
]


LIVE: dict[str, Any] = {}
"""Objects of this process by the name that jobs know them by, "live:NAME"; see `runtime.live`."""


def import_attribute(path: str, key: str) -> Any:
    """Resolves "module:attr" named by the config field `key`; raises ConfigError if it cannot."""
    if path in LIVE:
        return LIVE[path]
    if path.startswith("live:"):
        raise ConfigError(
            f"{key} = '{path}': was an object of the process that ran the job, and no module holds "
            "it; give it to gbp_ray.prune(workload=...) again, or make a job of a function that "
            'can be imported as "module:function"'
        )
    module_name, _, attribute = path.partition(":")
    # Loads torch, as the module that is imported would.
    from gbp_ray.workloads.data import seeded

    try:
        # Once in a process, whatever the job's seed.
        with seeded(0), staying(f"{key} = '{path}'"):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        looked_in = "the working folder and the job file's folder"
        raise ConfigError(
            f"{key} = '{path}': no module named '{error.name}'; modules are looked up among "
            f"installed packages, {looked_in} (export and explain: --folder DIR)"
        ) from None
    except (Exception, SystemExit) as error:
        # A script that parses its own arguments ends the process when it is imported.
        raise ConfigError(
            f"{key} = '{path}': importing '{module_name}' raised {in_one_line(error)}"
        ) from error
    if not hasattr(module, attribute):
        names = [name for name in dir(module) if not name.startswith("_")]
        raise ConfigError(
            f"{key} = '{path}': module '{module_name}' has no '{attribute}'"
            f"{nearest_name(attribute, names)}"
        )
    return getattr(module, attribute)


_HIDING = {("ignore", None, kind, None, 0) for kind in (Warning, UserWarning)}


@contextmanager
def staying(what: str) -> Iterator[None]:
    """Undoes what the user's code `what` must not change for this package.

    Another working folder would move relative paths. A rule of that code against all warnings would
    hide this package's, too; it stays in force for those of others.
    """
    before, rules = Path.cwd(), list(warnings.filters)
    try:
        yield
    finally:
        new = takewhile(lambda rule: rule not in rules[:1], warnings.filters)
        if not _HIDING.isdisjoint(new):
            warnings.filterwarnings("default", category=UserWarning, module=r"gbp_ray\.")
        if (now := Path.cwd()) != before:
            os.chdir(before)
            warnings.warn(
                f"{what}: changes the working folder to '{now}', which would move relative paths "
                "such as that of storage; it was changed back, so let the code give whole paths",
                stacklevel=3,
            )


def add_import_paths(folders: Iterable[str]) -> None:
    """Makes a user's own modules importable, as `python script.py` would."""
    for folder in folders:
        if folder not in sys.path:
            sys.path.append(folder)


def add_job_folders(job: JobConfig | str | Path | None) -> list[str]:
    """Make modules in the working folder and beside the job file importable; list these folders."""
    folders = [str(Path.cwd())]
    if isinstance(job, (str, Path)):
        folders.append(str(Path(job).resolve().parent))
    add_import_paths(folders)
    return folders


def warn_of_shadowed_modules(job: JobConfig, folder: str, stacklevel: int) -> None:
    """Warns of a module in a folder that the import of a job's code passed over."""
    for key, plug_in in code_of(job).items():
        if plug_in in LIVE:
            continue
        name = plug_in.partition(":")[0].partition(".")[0]
        loaded = getattr(sys.modules.get(name), "__file__", None)
        for candidate in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")):
            if candidate.is_file() and (loaded is None or not candidate.samefile(loaded)):
                warnings.warn(
                    f"{key} = {plug_in}: module '{name}' is {loaded or 'built in'}, not "
                    f"'{candidate}'; rename yours, or start a new process if another job brought "
                    "it in",
                    stacklevel=stacklevel,
                )
                break


def code_of(job: JobConfig) -> dict[str, str]:
    """Lists the code that a job names as "module:attr" and that is not built in, by field."""
    built_in = {f"gbp_ray.zoo:{name}" for name in workloads.__all__}
    return {key: name for key, name in list_code(job).items() if name not in built_in}


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


_KNOWN = ("gbp_ray.", "live:")
"""Code whose file says nothing: this package's, and what is known by a digest."""


def own_sources(job: JobConfig) -> dict[str, str]:
    """Hashes the files that the user's own functions of a job are written in, by name."""
    names = list_code(job).values()
    return {name: digest_source(name) for name in names if not name.startswith(_KNOWN)}


def warn_of_changed_code(sources: Mapping[str, str], trial_id: str, job: JobConfig) -> None:
    """Warn where a user's function is another one by now than when a trial was run.

    Args:
        sources: What `own_sources` gave when the trial was run.
        trial_id: For the warning.
        job: Names the functions; those that only `sources` names are not imported.
    """
    for name in {job.workload.factory, job.prune.criterion} & sources.keys():
        try:
            is_same = digest_source(name) == sources[name]
        except GbpError:
            continue  # what cannot be imported any more cannot mislead
        if not is_same:
            warnings.warn(
                f"'{name}' has changed since trial {trial_id} was run, and what it gave then "
                "still stands; give the job another name, or delete the trial, to run it anew",
                stacklevel=3,
            )


def digest_source(plug_in: str) -> str:
    """Hashes the file that a user's function is written in: edited, it is another function."""
    found = import_attribute(plug_in, "workload.factory")
    module = sys.modules.get(getattr(found, "__module__", "") or plug_in.partition(":")[0])
    path = getattr(module, "__file__", None)
    if path is None:
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""
