"""Preparation of a job for a cluster, without any request to it.

One archive holds the user's folder, this package (so the cluster runs the version that submitted),
the resolved job and a start program. The driver is `prune` or `sweep` on the head. The submission's
name comes from the job, so submitting twice is noticed: `<name>-<trial id>` or
`<name>-sweep-<hash>`.

Secrets are refused: the head stores environment variables, metadata and the command, and shows them
to everyone who may list jobs. Nodes get credentials from an instance profile, a Kubernetes Secret
or the environment that Ray was started in.
"""

from __future__ import annotations

import ast
import hashlib
import ipaddress
import json
import os
import re
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import tomli_w

from gbp_ray import __version__
from gbp_ray.config.address import S3Address
from gbp_ray.config.job import JobConfig, check_importable, expand, list_code, load_job, trial_id
from gbp_ray.errors import ConfigError
from gbp_ray.runtime.packaging import (
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

__all__ = ["PYTHONS", "Submission", "prepare_submission"]

PYTHONS = ("3.11", "3.12")
"""Supported versions of Python."""

_MODULES = (
    *("ray", "torch", "torchvision", "numpy", "pyarrow", "boto3", "pydantic", "safetensors"),
    *("typer", "rich", "PIL", "matplotlib", "jinja2", "tomli_w", "pathspec", "gbp_ray"),
)

_OWN = Path(__file__).resolve().parents[1]
_JOB, _START, _FACTS = ".gbp-ray-job.toml", ".gbp-ray-start.py", ".gbp-ray-facts.json"

_STORAGE_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_MAX_ATTEMPTS",
)

_STOP_WAIT_S = 30
"""Time for a stopped driver to release its lease and workers before Ray kills it."""

_NO_SECRETS = (
    "give it to the nodes instead: an instance profile, a Kubernetes Secret, or the environment "
    "that 'ray start' runs in"
)
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
Kind = Literal["prune", "sweep"]


@dataclass(frozen=True)
class Submission:
    """A job ready to submit.

    Attributes:
        base_id: Its name on the cluster, without the number of the run.
        uri: The address of its results.
        num_user_files: Number of the user's files in the package.
        left_out: The reason for each file of the folder that does not go.
        env_vars: Environment of the driver and the workers.
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
        """The metadata that the head keeps and `gbp-ray jobs` shows."""
        return {
            "gbp_ray.version": __version__,
            "gbp_ray.kind": self.kind,
            "gbp_ray.job": self.base_id,
            "gbp_ray.uri": self.uri,
        }

    def describe(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
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
    """Prepares a job for submission, with the arguments of `submit`.

    Args:
        environment: Source of environment variables; this process's by default.

    Raises:
        ConfigError: The job is wrong or cannot run elsewhere, or something must not be sent.
    """
    environment = os.environ if environment is None else environment
    path = Path(job) if isinstance(job, (str, Path)) else None
    resolved = load_job(job, overrides)
    check_importable(resolved, is_elsewhere=True)
    spec = resolved.sweep
    spans_trials = bool(spec.space) or spec.target.is_on or spec.search != "grid"
    kind: Kind = "sweep" if is_sweep or spans_trials else "prune"
    if kind == "sweep" and spec.search == "grid":
        # Faults of single trials are found here rather than on the cluster.
        expand(resolved)
    if not resolved.storage.startswith("s3://") and not Path(resolved.storage).is_absolute():
        raise ConfigError(
            f"storage = '{resolved.storage}': is a folder of this machine; give "
            "s3://bucket/prefix, or the full name of a folder that all nodes share"
        )
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
        # Whatever starts its workers here: there it joins the cluster.
        update={
            "cluster": resolved.cluster.model_copy(update={"address": "auto", "launcher": "auto"})
        }
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
        _START: (_OWN / "runtime" / "bootstrap.py").read_bytes(),
        _FACTS: json.dumps(facts, indent=1).encode(),
    }
    if not is_installed:
        own = find_files(_OWN)
        extra |= {f"{_OWN.name}/{name}": path.read_bytes() for name, path in own.items()}
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
    # `model_copy` does not mark the field as set.
    tree.setdefault("cluster", {})["address"] = job.cluster.address
    with suppress(TypeError, ValueError):
        text = tomli_w.dumps(tree)
        if JobConfig.model_validate(tomllib.loads(text)) == job:
            return text.encode()
    # Options given in Python may hold values that TOML has not.
    raise ConfigError(
        "workload.options: cannot be written as TOML, perhaps for a null; leave it out"
    )


def _pick_variables(names: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    picked = {}
    shown = "which the cluster would show to everyone who lists jobs"
    for name in _STORAGE_VARIABLES:
        if value := environment.get(name):
            if holds_credentials(value):
                raise ConfigError(f"{name}: holds credentials, {shown}; {_NO_SECRETS}")
            picked[name] = value
    for name in names:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(
                f"--env '{name.partition('=')[0]}': give only the name of a variable; its value "
                "is taken from this environment"
            )
        if name not in environment:
            raise ConfigError(f"--env {name}: is not set here; set it, or leave it out")
        if is_secret_variable(name, environment[name]):
            raise ConfigError(f"--env {name}: looks like a secret, {shown}; {_NO_SECRETS}")
        picked[name] = environment[name]
    return picked


def _check_for_secrets(job: bytes) -> bytes:
    """Returns a job's text, or raises if it holds a secret, which the head would store."""
    if (found := find_secret(job)) is not None:
        line, kind = found
        key = job.splitlines()[line - 1].decode(errors="replace").partition("=")[0].strip()
        raise ConfigError(f"'{key}' of the job holds what looks like {kind}; {_NO_SECRETS}")
    return job


def _check_reach(job: JobConfig, env_vars: Mapping[str, str], address: str | None) -> None:
    """Refuses a storage server on this machine's loopback address for a head elsewhere."""
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
            f"{key} = {endpoint}: means this machine here, but on each node of {address} that "
            "node; give the address by which the nodes reach the server"
        )


def _is_loopback(host: str | None) -> bool:
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_code(
    job: JobConfig, files: Mapping[str, Path], folder: Path | None, left: Mapping[str, str]
) -> None:
    """Refuses code of the user that is not sent or is no Python; the head checks the rest."""
    for key, plug_in in list_code(job).items():
        module = plug_in.partition(":")[0]
        if module.partition(".")[0] == "gbp_ray":
            continue
        stem = module.replace(".", "/")
        names = (f"{stem}.py", f"{stem}/__init__.py")
        for name in names:
            if name in files:
                _check_syntax(key, plug_in, files[name])
                break
            if name in left:
                raise ConfigError(
                    f"{key} = '{plug_in}': '{folder}/{name}' would not be sent, as it is among the "
                    f"files {left[name]}; give --include '{name}'"
                )
            if folder is not None and (folder / name).is_file():
                raise ConfigError(
                    f"{key} = '{plug_in}': '{folder / name}' would not be sent: a line in "
                    ".gitignore or .rayignore excludes it, or its folder is a virtual environment "
                    "or holds results; change that line, or move the file"
                )
            if (Path.cwd() / name).is_file():
                raise ConfigError(
                    f"{key} = '{plug_in}': '{name}' is here and not in the folder that is sent, "
                    f"'{folder}'; give --folder '{Path.cwd()}'"
                )


def _check_syntax(key: str, plug_in: str, path: Path) -> None:
    try:
        ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        where = f"{path}:{getattr(error, 'lineno', None) or 1}"
        raise ConfigError(
            f"{key} = '{plug_in}': {where} is not Python: {getattr(error, 'msg', error)}"
        ) from None
