"""The job: one TOML file, checked whole before anything starts.

All faults of a job are reported at once, in one line, with dotted paths and the nearest valid name.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from gbp_ray.config.address import S3Address
from gbp_ray.config.attack import AttackConfig, find_weaker_attack
from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.config.prune import PruneConfig
from gbp_ray.config.schema import (
    Section,
    dotted,
    explain_faults,
    find_field,
    refuse,
    section_of,
)
from gbp_ray.config.sweep import SweepConfig, TargetConfig, first_values, span
from gbp_ray.config.training import FinetuneConfig, PretrainConfig, Recipe
from gbp_ray.config.workload import WorkloadConfig
from gbp_ray.errors import ConfigError

__all__ = [
    "SCHEMA_VERSION",
    "JobConfig",
    "check_importable",
    "describe_fields",
    "expand",
    "list_code",
    "load_job",
    "read_overrides",
    "takes_whole_numbers",
    "trial_id",
]

SCHEMA_VERSION = 1
"""Part of every trial id: raised when the meaning of a field changes, never for a new field."""

_TRAINING_KEYS_OUTSIDE_IDENTITY = {"name", "storage", "cluster", "sweep"}


class JobConfig(Section):
    """One whole job."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the job inside storage: letters, digits, '.', '_' and '-'."""
    storage: str = "gbp-results"
    """Folder or s3://bucket/prefix that receives results; another server than AWS by
    AWS_ENDPOINT_URL, or as s3://bucket/prefix?endpoint_override=host:port&scheme=http."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of initial weights, order of examples, augmentation and random scores."""
    workload: WorkloadConfig
    pretrain: PretrainConfig = PretrainConfig()
    prune: PruneConfig
    finetune: FinetuneConfig = FinetuneConfig()
    attack: AttackConfig = AttackConfig()
    cluster: ClusterConfig = ClusterConfig()
    sweep: SweepConfig = SweepConfig()

    def __repr__(self) -> str:
        prune = self.prune
        return (
            f"<JobConfig {self.name}: {self.workload.factory}, {prune.criterion} to "
            f"{prune.goal.replace(' = ', ' ')} in {prune.rounds} rounds, seed {self.seed}>"
        )

    @property
    def needs_dense_weights(self) -> bool:
        """Returns True if resuming needs the weights of the dense network."""
        is_read = self.prune.rewind == "weights" or self.prune.reconstruct != "none"
        return is_read or self.finetune.distillation.is_on

    @property
    def num_finetunings(self) -> int:
        """Counts the fine-tunings; movement needs one before the first prune, too."""
        return self.num_finetunings_before(self.prune.rounds + 1)

    def num_finetunings_before(self, number: int) -> int:
        """Counts the fine-tunings of the rounds before one."""
        if self.finetune.after == "last":
            return int(number > self.prune.rounds)
        return max(0, number - 1 + self.prune.spec.needs_history)

    def is_finetuned(self, number: int) -> bool:
        """Returns whether a round ends with fine-tuning."""
        following = self.num_finetunings_before(number + 1)
        return self.finetune.epochs > 0 and following > self.num_finetunings_before(number)

    @field_validator("storage")
    @classmethod
    def _is_place(cls, value: str) -> str:
        if not value.strip() or value.strip() == "file://":
            raise ValueError('is empty; give a folder ("." is the working folder) or s3://bucket')
        if value.startswith("s3://"):
            return str(S3Address.parse(value))
        if "://" in value and not value.startswith("file://"):
            raise ValueError("must be a folder or s3://bucket/prefix")
        if "\0" in value:
            raise ValueError("must be a folder; no folder's name holds a NUL")
        return value.removeprefix("file://")

    @model_validator(mode="after")
    def _sections_agree(self) -> JobConfig:
        faults: list[str | bool] = []
        recipes: dict[str, Recipe] = {"pretrain": self.pretrain, "finetune": self.finetune}
        for section, recipe in recipes.items():
            if recipe.epochs > 0:
                faults += [
                    recipe.microbatches < self.cluster.max_workers
                    and f"{section}.microbatches = {recipe.microbatches} cannot occupy "
                    f"cluster.num_workers = {json.dumps(self.cluster.num_workers)}; lower the "
                    f"workers, which keeps the result, or raise {section}.microbatches, which "
                    "changes it",
                    find_weaker_attack(self.attack, recipe.adversarial, section),
                ]
        prune, recipe = self.prune, self.finetune
        criterion = f"prune.criterion = {prune.criterion}"
        refuse(
            *faults,
            prune.target.kind is not None
            and self.sweep.target.is_on
            and "sweep.target: finds prune.sparsity, which goes with no prune.target; unset one of "
            "them",
            prune.spec.needs_history
            and recipe.patience > 0
            and f"finetune.patience = {recipe.patience} takes steps back that {criterion} has "
            "counted; set it to 0",
            prune.spec.needs_history
            and recipe.epochs == 0
            and f"{criterion} gathers its scores while fine-tuning; set finetune.epochs above 0",
            prune.spec.needs_history
            and recipe.after == "last"
            and f'{criterion} gathers its scores while fine-tuning; set finetune.after to "each"',
            prune.spec.feeds_ones
            and self.workload.encoding.kind == "one_hot"
            and f"{criterion} sends ones through the network, which light one level of "
            "workload.encoding.kind = one_hot alone; use thermometer, or another criterion",
        )
        return self


def load_job(
    source: JobConfig | str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | list[str] | None = None,
) -> JobConfig:
    """Reads a job file, applies overrides and checks the whole.

    Args:
        source: Path of a TOML file, its tables as read, a job to start from, or None for the
            embedded digits job.
        overrides: Dotted keys to values, or strings "dotted.key=value" whose value is read as
            TOML and, where it is not TOML, as plain text.

    Raises:
        ConfigError: The file is missing or not TOML, or the job breaks the schema; one line that
            lists every fault.
    """
    try:
        if isinstance(source, JobConfig):
            tree = source.model_dump(mode="json", exclude_unset=True)
        elif isinstance(source, Mapping):
            tree = copy.deepcopy(dict(source))
        else:
            tree = _read_toml(source)
        for key, value in read_overrides(overrides).items():
            _set_dotted(tree, key, value)
        _fill_in(tree)
        return JobConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(explain_faults(error, JobConfig))) from None
    except RecursionError:
        raise ConfigError("the job is nested too deeply; use fewer lists in lists") from None


def expand(job: JobConfig) -> list[JobConfig]:
    """Lists the trials of a sweep, each a whole job of its own; equal ones once.

    With a target each represents a search and has its highest sparsity.

    Raises:
        ConfigError: Some are refused by the schema; one line that lists every fault once.
    """
    target = job.sweep.target
    ends: list[dict[str, Any]] = [{}]
    if target.is_on:
        lowest = max(target.lowest, target.tolerance)
        ends = [{"prune.sparsity": lowest}, {"prune.sparsity": target.highest}]
    tree = job.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
    trials: dict[str, JobConfig] = {}
    faults: dict[str, None] = {}
    num_refused = 0
    try:
        points = span(job.sweep, job.seed, takes_whole_numbers)
    except ValueError as error:
        raise ConfigError(f"sweep.space: {error}") from None
    for point in points:
        for end in ends:
            one = dict(tree)
            for key, value in {**point, **end}.items():
                _set_dotted(one, key, value, is_shared=True)
            try:
                trial = JobConfig.model_validate(one)
            except ValidationError as error:
                faults |= dict.fromkeys(explain_faults(error, JobConfig))
                num_refused += 1
                break
        else:
            trials[trial_id(trial)] = trial
    if faults:
        raise ConfigError(
            f"sweep.space: {num_refused} of {len(points)} trials are refused: {'; '.join(faults)}"
        )
    return list(trials.values())


def trial_id(job: JobConfig) -> str:
    """Returns the name of a trial, such as "taylor-s0.90-r5-3f9c1a2b" or "taylor-macs0.50-r5-...".

    The hash covers all fields that change the result and differ from their defaults, so a new field
    with a default keeps old names.
    """
    identity = job.model_dump(
        mode="json", exclude_defaults=True, exclude=_TRAINING_KEYS_OUTSIDE_IDENTITY
    )
    # Masks and weights count by their digests, wherever they lie.
    if job.prune.initial_masks_digest:
        identity["prune"].pop("initial_masks", None)
    if job.workload.transfer.checkpoint_digest:
        identity["workload"]["transfer"].pop("checkpoint", None)
    if job.finetune.distillation.teacher_digest:
        identity["finetune"]["distillation"].pop("teacher", None)
    goal, value = "s", job.prune.sparsity
    if job.prune.target.is_of_cost:
        identity["prune"].pop("sparsity", None)
        goal, value = str(job.prune.target.kind), job.prune.target.value
    else:
        target = identity["prune"].pop("target", {})
        if target.get("uniform"):
            identity["prune"]["target"] = {"uniform": True}  # The rest says what sparsity says.
    identity["schema_version"] = SCHEMA_VERSION
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    criterion = job.prune.criterion.rpartition(":")[2]
    amount = f"{value:.2f}" if value <= 1 else f"{value:.0f}"
    if float(amount) != value:
        amount = f"{value:g}"
    return f"{criterion}-{goal}{amount}-r{job.prune.rounds}-{digest}"


def list_code(job: JobConfig) -> dict[str, str]:
    """Lists the functions that a job names as "module:attr", by field."""
    named = {"workload.factory": job.workload.factory, "prune.criterion": job.prune.criterion}
    return {key: name for key, name in named.items() if ":" in name}


def read_overrides(overrides: Mapping[str, Any] | list[str] | None) -> dict[str, Any]:
    """Returns overrides, as `load_job` takes them, by dotted key.

    Raises:
        ConfigError: One is no "dotted.key=value".
    """
    if isinstance(overrides, list):
        return dict(_split_override(item) for item in overrides)
    return dict(overrides or {})


def check_importable(job: JobConfig, *, is_elsewhere: bool = False) -> None:
    """Refuses code that only this process knows where other processes are to run it.

    Args:
        is_elsewhere: All of the job runs in other processes, even without workers.

    Raises:
        ConfigError: Naming the field, and what to do.
    """
    if job.cluster.max_workers == 0 and not is_elsewhere:
        return
    for key, name in list_code(job).items():
        if name.startswith(("live:", "__main__:")):
            remedy = "" if is_elsewhere else ", or set cluster.num_workers to 0"
            raise ConfigError(
                f"{key} = '{name}': is known in this process only, and workers are others, with a "
                "__main__ of their own; put the function into a module and name it as "
                f'"module:function"{remedy}'
            )


def describe_fields() -> list[tuple[str, str, str]]:
    """Lists every field as (dotted key, default, description), in the order of the file."""
    rows: list[tuple[str, str, str]] = []

    def walk(section: type[Section], prefix: str) -> None:
        for name, field in section.model_fields.items():
            if inner := section_of(field):
                rows.append((f"[{prefix}{name}]", "", (inner.__doc__ or "").strip()))
                walk(inner, f"{prefix}{name}.")
            else:
                default = "required" if field.is_required() else json.dumps(field.default)
                default = "unset" if field.default is None else default
                text = " ".join((field.description or "").split())
                rows.append((f"{prefix}{name}", default, text))

    walk(JobConfig, "")
    return rows


def takes_whole_numbers(key: str) -> bool | None:
    """Checks whether a dotted field is a whole number; None where the schema does not say."""
    field = find_field(key.split("."), JobConfig)
    return None if field is None else field.annotation in (int, int | None)


_TARGETS = {"max_drop", "max_relative_drop"}


def _fill_in(tree: dict[str, Any]) -> None:
    """Fills in the required fields that a job leaves to its sweep."""
    sweep = tree.get("sweep")
    if not isinstance(sweep, dict):
        return
    missing = first_values(sweep.get("space"))
    if isinstance(target := sweep.get("target"), dict) and target.keys() & _TARGETS:
        missing["prune.sparsity"] = target.get("highest", TargetConfig().highest)
    for key, value in missing.items():
        field = find_field(key.split("."), JobConfig)
        is_target = key.startswith("prune.target.") and not _says_how_sparse(tree)
        if field is None or not (field.is_required() or is_target):
            continue
        node: Any = tree
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is None:
            _set_dotted(tree, key, value)


def _says_how_sparse(tree: dict[str, Any]) -> bool:
    prune = tree.get("prune")
    if not isinstance(prune, dict):
        return False
    target = prune.get("target")
    is_goal = bool(target.keys() - {"uniform"}) if isinstance(target, dict) else "target" in prune
    return "sparsity" in prune or is_goal


def _read_toml(source: str | Path | None) -> dict[str, Any]:
    if source is None:
        # By its path: importing the folder as a module would import torch.
        return tomllib.loads(
            resources.files("gbp_ray").joinpath("workloads", "digits.toml").read_text("utf-8")
        )
    path = Path(source)
    try:
        data = path.read_bytes()
        # Some editors write a byte order mark or other line ends.
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(
            f"job file {str(path)!r} does not exist; give the path of a TOML file"
        ) from None
    except OSError as error:
        raise ConfigError(f"job file {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        what = f"byte 0x{data[error.start]:02x} is no UTF-8 (at line {number})"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            what = "it is UTF-16 (at line 1)"
        raise ConfigError(f"job file {str(path)!r} is not TOML: {what}; save it as UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"job file {str(path)!r} is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"job file {str(path)!r} is nested too deeply") from None


def _split_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: must read dotted.key=value, like prune.sparsity=0.95")
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return key, raw
    # Text of several lines may parse as more keys than this one.
    return key, parsed["value"] if len(parsed) == 1 else raw


def _set_dotted(tree: dict[str, Any], key: str, value: Any, *, is_shared: bool = False) -> None:
    """Sets a value by its dotted key.

    Args:
        is_shared: Tables in the tree belong to other trees, too, and are copied first.
    """
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if is_shared and isinstance(child, dict):
            child = node[parent] = dict(child)
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted(key.split('.'))}: {parent!r} is a value, not a section")
        node = child
    node[last] = value
