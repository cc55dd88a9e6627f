"""A job made ready to go to a cluster: what it is called there, and what goes with it.

What goes is one archive: the user's folder, this very package (so that the cluster runs the version
that submitted, and needs no other), the resolved job, and the program that starts it. The driver is
`prune` or `sweep` on the head, as on a laptop.

The name of a submission comes from the job, so that submitting twice is found out:
`<name>-<trial id>`, or `<name>-sweep-<hash>`.

No secret goes. What the Jobs API takes beside the archive (environment variables, metadata, the
command) is stored by the head and shown to whoever may list jobs, so a variable whose name or value
looks like a secret is refused. Nodes get their credentials from where they are: an instance
profile, a Kubernetes Secret, or the environment that Ray was started in.

All of this is decided without asking the cluster anything.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.resources
import ipaddress
import json
import os
import re
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import tomli_w

from gbp_ray import __version__
from gbp_ray.config.address import S3Address
from gbp_ray.config.job import JobConfig, expand, load_job, trial_id
from gbp_ray.errors import ConfigError
from gbp_ray.runtime.archive import (
    SECRET,
    Package,
    choose_files,
    describe_left_out,
    find_files,
    find_secret,
    holds_credentials,
    is_secret_variable,
    pack_files,
)

__all__ = [
    "PYTHONS",
    "Submission",
    "prepare_submission",
]

PYTHONS = ("3.11", "3.12")
"""What this package runs on."""

_MODULES = (
    *("ray", "torch", "torchvision", "numpy", "pyarrow", "boto3", "pydantic", "safetensors"),
    *("typer", "rich", "PIL", "matplotlib", "jinja2", "tomli_w", "pathspec", "gbp_ray"),
)

_JOB, _START, _FACTS = ".gbp-ray-job.toml", ".gbp-ray-start.py", ".gbp-ray-facts.json"

_STORAGE_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_MAX_ATTEMPTS",
)

_STOP_WAIT_S = 30
"""Ray kills a driver that takes longer to stop; it gives back its lease and its workers first."""

_VARIABLE = re.compile(r"[A-Za-z_]\w*")
Kind = Literal["prune", "sweep"]


@dataclass(frozen=True)
class Submission:
    """What goes to the cluster.

    Attributes:
        job: The job as it will run there.
        kind: Which verb runs it.
        base_id: Its name on the cluster, before the number that tells a job's runs apart.
        uri: Where its results will be.
        package: The archive.
        num_user_files: How many of its files are the user's.
        left_out: Files of the folder that do not go, and why.
        env_vars: What the driver and the workers find in their environment.
        entrypoint: The command that the head runs.
    """

    job: JobConfig
    kind: Kind
    base_id: str
    uri: str
    package: Package
    num_user_files: int
    left_out: dict[str, str]
    env_vars: dict[str, str]
    entrypoint: str

    @property
    def metadata(self) -> dict[str, str]:
        """What the head keeps, and `gbp-ray jobs` shows."""
        return {
            "gbp_ray.version": __version__,
            "gbp_ray.kind": self.kind,
            "gbp_ray.job": self.base_id,
            "gbp_ray.uri": self.uri,
        }

    def describe(self) -> dict[str, Any]:
        """Puts it into plain values."""
        return {
            "job": self.base_id,
            "kind": self.kind,
            "uri": self.uri,
            "num_files": self.num_user_files,
            "num_bytes": len(self.package.data),
            "env": sorted(self.env_vars),
            "left_out": self.left_out,
        }


def prepare_submission(
    job: JobConfig | str | Path | None = None,
    overrides: Mapping[str, Any] | list[str] | None = None,
    *,
    address: str | None = None,
    is_sweep: bool = False,
    folder: str | Path | None = None,
    env_names: Iterable[str] = (),
    include: Iterable[str] = (),
    is_installed: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Submission:
    """Makes a job ready to go.

    Args:
        job: A checked job, the path of a TOML file, or None for the embedded digits job.
        overrides: Dotted keys to values, applied before the check.
        address: The head's, to find out what only this machine could reach.
        is_sweep: Runs it as a sweep, also without a space.
        folder: What goes; the job file's own by default, nothing without a file.
        env_names: Environment variables that go along, besides those of the storage.
        include: Files and folders of the folder that go although they would be left out.
        is_installed: Leaves this package out; the nodes have it.
        environment: Where the variables are found; this process's by default.

    Raises:
        ConfigError: The job is wrong or cannot run elsewhere, or what goes with it must not.
    """
    environment = os.environ if environment is None else environment
    path = Path(job) if isinstance(job, (str, Path)) else None
    resolved = load_job(job, overrides)
    kind: Kind = "sweep" if is_sweep or _spans_trials(resolved) else "prune"
    if kind == "sweep" and resolved.sweep.search == "grid":
        # Refuses here what its trials could only be refused for there.
        expand(resolved)
    _check_storage(resolved)
    env_vars = _pick_variables(env_names, environment)
    _check_reach(resolved, env_vars, address)
    if folder is None:
        folder = None if path is None else path.resolve().parent
    elif not Path(folder).is_dir():
        raise ConfigError(f"--folder = '{folder}': is not a folder; give the one with your code")
    place = None if folder is None else Path(folder).resolve()
    files, left = ({}, {}) if place is None else choose_files(place, include)
    if secrets := {name: why for name, why in left.items() if why == SECRET}:
        warnings.warn(describe_left_out(secrets), stacklevel=2)
    _check_code(resolved, files, place, left)
    remote = resolved.model_copy(
        update={"cluster": resolved.cluster.model_copy(update={"address": "auto"})}
    )
    facts = {
        "version": __version__,
        "pythons": PYTHONS,
        "modules": _MODULES,
        "job": _JOB,
        "arguments": [kind, _JOB],
    }
    extra = {
        _JOB: _check_for_secrets(_as_toml(remote)),
        _START: _read_start(),
        _FACTS: json.dumps(facts, indent=1).encode(),
    }
    if not is_installed:
        extra |= _own_files()
    package = pack_files(files, extra)
    return Submission(
        job=remote,
        kind=kind,
        base_id=_base_id(resolved, kind),
        uri=_uri(resolved),
        package=package,
        num_user_files=len(files.keys() & package.sizes.keys()),
        left_out=left,
        env_vars={**env_vars, "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)},
        entrypoint=f"exec python {_START}",
    )


def _spans_trials(job: JobConfig) -> bool:
    sweep = job.sweep
    return bool(sweep.space) or sweep.target.max_drop is not None or sweep.search != "grid"


def _base_id(job: JobConfig, kind: Kind) -> str:
    if kind == "prune":
        return f"{job.name}-{trial_id(job)}"
    tree = job.model_dump(
        mode="json", exclude_defaults=True, exclude={"name", "storage", "cluster"}
    )
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return f"{job.name}-sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _uri(job: JobConfig) -> str:
    if job.storage.startswith("s3://"):
        return str(S3Address.parse(job.storage).child(job.name))
    return str(PurePosixPath(job.storage) / job.name)


def _as_toml(job: JobConfig) -> bytes:
    tree = job.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    # A copy does not count what it was given as set.
    tree.setdefault("cluster", {})["address"] = job.cluster.address
    try:
        text = tomli_w.dumps(tree)
        is_whole = JobConfig.model_validate(tomllib.loads(text)) == job
    except (TypeError, ValueError):
        is_whole = False
    if not is_whole:
        # Options that came from Python may hold what no job file can say.
        raise ConfigError(
            "workload.options: cannot be written as TOML, perhaps for a null; leave it out"
        )
    return text.encode()


def _read_start() -> bytes:
    return importlib.resources.files("gbp_ray").joinpath("runtime", "bootstrap.py").read_bytes()


def _own_files() -> dict[str, bytes]:
    """Reads this package's own files, by the names that they get."""
    root = Path(__file__).resolve().parents[1]
    return {f"gbp_ray/{name}": path.read_bytes() for name, path in find_files(root).items()}


# -- what is refused before anything goes ----------------------------------------------------------


def _check_storage(job: JobConfig) -> None:
    if not job.storage.startswith("s3://") and not Path(job.storage).is_absolute():
        raise ConfigError(
            f"storage = '{job.storage}': is a folder of this machine; give s3://bucket/prefix, or "
            "the full name of a folder that all nodes share"
        )


def _pick_variables(names: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    picked = {}
    for name in _STORAGE_VARIABLES:
        if value := environment.get(name):
            if holds_credentials(value):
                raise ConfigError(
                    f"{name}: holds credentials, which the cluster would show to whoever lists "
                    f"jobs; {_NO_SECRETS}"
                )
            picked[name] = value
    for name in names:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(
                f"--env '{name.partition('=')[0]}': give the name of a variable alone; its value "
                "is taken from this environment"
            )
        if name not in environment:
            raise ConfigError(f"--env {name}: is not set here; set it, or leave it out")
        if is_secret_variable(name, environment[name]):
            raise ConfigError(
                f"--env {name}: looks like a secret, which the cluster would show to whoever lists "
                f"jobs; {_NO_SECRETS}"
            )
        picked[name] = environment[name]
    return picked


_NO_SECRETS = (
    "give it to the nodes instead: an instance profile, a Kubernetes Secret, or the environment "
    "that 'ray start' runs in"
)


def _check_for_secrets(job: bytes) -> bytes:
    """Refuses a job that holds a secret: it lies on the head for whoever may read there."""
    if (found := find_secret(job)) is not None:
        line, kind = found
        key = job.splitlines()[line - 1].decode(errors="replace").partition("=")[0].strip()
        raise ConfigError(f"'{key}' of the job holds what looks like {kind}; {_NO_SECRETS}")
    return job


def _check_reach(job: JobConfig, env_vars: Mapping[str, str], address: str | None) -> None:
    """Refuses a storage server that only this machine can mean, for a head that is elsewhere."""
    if address is None or _is_loopback(urlsplit(address).hostname):
        return
    if not job.storage.startswith("s3://"):
        return
    key, endpoint = "storage", S3Address.parse(job.storage).endpoint
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if endpoint is None and name in env_vars:
            key, endpoint = name, env_vars[name]
    if endpoint is not None and _is_loopback(urlsplit(endpoint).hostname):
        raise ConfigError(
            f"{key} = {endpoint}: is this machine here, and another one on each node of "
            f"{address}; give the server's address as the nodes reach it"
        )


def _is_loopback(host: str | None) -> bool:
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_code(
    job: JobConfig, files: Mapping[str, Path], folder: Path | None, left: Mapping[str, str]
) -> None:
    """Refuses code of the user that is not there, or is no Python; the head finds out the rest."""
    plug_ins = {"workload.factory": job.workload.factory, "prune.criterion": job.prune.criterion}
    for key, plug_in in plug_ins.items():
        module, colon, _ = plug_in.partition(":")
        if not colon or module.partition(".")[0] == "gbp_ray":
            continue
        stem = module.replace(".", "/")
        names = (f"{stem}.py", f"{stem}/__init__.py")
        for name in names:
            if name in files:
                _check_syntax(key, plug_in, files[name])
                break
            if name in left:
                raise ConfigError(
                    f"{key} = '{plug_in}': '{folder}/{name}' does not go to the cluster, as it is "
                    f"among files {left[name]}; give --include '{name}'"
                )
            if folder is not None and (folder / name).is_file():
                raise ConfigError(
                    f"{key} = '{plug_in}': '{folder / name}' does not go to the cluster: a line in "
                    ".gitignore or .rayignore leaves it out, or its folder is an environment or "
                    "holds results; mend that line, or move the file"
                )
            if (Path.cwd() / name).is_file():
                raise ConfigError(
                    f"{key} = '{plug_in}': '{name}' lies here and not in the folder that goes to "
                    f"the cluster, '{folder}'; give --folder '{Path.cwd()}'"
                )


def _check_syntax(key: str, plug_in: str, path: Path) -> None:
    try:
        ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        where = f"{path}:{getattr(error, 'lineno', None) or 1}"
        raise ConfigError(
            f"{key} = '{plug_in}': {where} is not Python: {getattr(error, 'msg', error)}"
        ) from None
