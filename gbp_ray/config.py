"""The job: one TOML file, checked whole before anything starts.

This module decides what a job may say and what a trial is called. It is read by every floor above
and knows neither torch nor Ray. All faults of a job are reported at once, in one line, with dotted
paths and the nearest valid name.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from gbp_ray.address import S3Address
from gbp_ray.cluster_config import ClusterConfig
from gbp_ray.errors import ConfigError
from gbp_ray.sections import Section, dotted, explain_faults, nearest_name
from gbp_ray.space import SweepConfig, TargetConfig, first_values, span

__all__ = [
    "CRITERIA",
    "SCHEMA_VERSION",
    "ClusterConfig",
    "DistillationConfig",
    "FinetuneConfig",
    "JobConfig",
    "PretrainConfig",
    "PruneConfig",
    "Recipe",
    "SweepConfig",
    "TargetConfig",
    "WorkloadConfig",
    "describe_fields",
    "expand",
    "find_idle_options",
    "load_job",
    "nearest_name",
    "takes_whole_numbers",
    "trial_id",
]

SCHEMA_VERSION = 1
"""Part of every trial id: raised when the meaning of a field changes, never for a new field."""

CRITERIA = (
    "magnitude",
    "random",
    "taylor",
    "snip",
    "taylor_squared",
    "fisher",
    "obd",
    "grasp",
    "synflow",
    "movement",
)
"""Names of the built-in criteria; `gbp-ray criteria` tells what each is."""

_PLUG_IN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PATTERN_N_M = re.compile(r"(\d+):(\d+)")
_TRAINING_KEYS_OUTSIDE_IDENTITY = {"name", "storage", "cluster", "sweep"}

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class WorkloadConfig(Section):
    """What is pruned: a model with its data."""

    factory: str
    """Where the workload comes from, as "module:attr"; the attr is called with the options."""
    options: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    eval_batch_size: int = Field(256, ge=1)
    """Examples per batch when accuracy is measured, on each worker."""

    @field_validator("factory")
    @classmethod
    def _is_plug_in(cls, value: str) -> str:
        if not _PLUG_IN.fullmatch(value):
            raise ValueError('must read "module:attr", like "gbp_ray.zoo:digits_convnet"')
        return value

    @field_validator("options")
    @classmethod
    def _are_plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        # Options travel to workers and into records as JSON, so they are what JSON makes of them.
        plain = {}
        for name, option in value.items():
            try:
                plain[name] = json.loads(json.dumps(option, allow_nan=False))
            except (TypeError, ValueError, RecursionError):
                raise ValueError(
                    f"{name!r} must be text, a finite number, true or false, a list or a table; "
                    "put quotes around a date"
                ) from None
        return plain


class Recipe(Section):
    """How weights are trained; pretrain and finetune each have one."""

    epochs: float = Field(0.0, ge=0.0, le=1e6)
    """Passes over the training data, fractions allowed; finetune: after each round."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Update rule; sgd uses momentum, adamw decouples weight decay."""
    learning_rate: float = Field(0.05, gt=0.0)
    """Peak learning rate, reached after the warm-up."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Momentum of sgd; the others ignore it."""
    weight_decay: float = Field(5e-4, ge=0.0)
    """L2 penalty (sgd, adam) or decoupled decay (adamw); never applied to pruned weights."""
    lr_schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    lr_milestones: tuple[Fraction, ...] = (0.5, 0.75)
    """For lr_schedule = "step": the shares of the training at which the rate drops."""
    lr_gamma: float = Field(0.1, gt=0.0, le=1.0)
    """For lr_schedule = "step": the factor of each drop."""
    warmup_epochs: float = Field(0.0, ge=0.0)
    """Epochs of linear warm-up from zero to learning_rate."""
    batch_size: int = Field(128, ge=1)
    """Examples per optimizer step over all workers together; changing workers keeps it."""
    microbatches: int = Field(4, ge=1)
    """Equal parts each batch is cut into and dealt to the workers; at most this many share a step.
    BatchNorm sees one part at a time, so the result depends on this and never on num_workers."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        if self.microbatches > self.batch_size:
            raise ValueError(
                f"microbatches = {self.microbatches} exceeds batch_size = {self.batch_size}; "
                "lower microbatches"
            )
        return self


class PretrainConfig(Recipe):
    """Training of the dense network before the first round; epochs = 0 takes it as built."""


class DistillationConfig(Section):
    """Fine-tuning that learns from the dense network's outputs beside the labels."""

    weight: Fraction = 0.0
    """Share of the distillation loss, the rest being the workload's own; 0 turns it off."""
    temperature: float = Field(4.0, gt=0.0)
    """What both networks' outputs are divided by before the softmax; higher is softer."""


class FinetuneConfig(Recipe):
    """Training of the kept weights after each round."""

    learning_rate: float = Field(0.01, gt=0.0)
    """Peak learning rate, reached after the warm-up."""
    distillation: DistillationConfig = DistillationConfig()


class PruneConfig(Section):
    """What is removed, and by which rule."""

    criterion: str
    """A built-in criterion (see `gbp-ray criteria`) or your own as "module:attr"."""
    sparsity: float = Field(ge=0.0, lt=1.0)
    """Removed units / prunable units after the last round."""
    rounds: int = Field(1, ge=1, le=999)
    """How often score, select and fine-tune are repeated."""
    schedule: Literal["one_shot", "linear", "cubic", "geometric"] = "geometric"
    """Sparsity after each round; one_shot removes everything in round 1 and fine-tunes on."""
    ramp_rounds: int | None = Field(None, ge=1)
    """Rounds after which the sparsity is reached; those left only fine-tune. Unset takes all."""
    scope: Literal["global", "layer"] = "global"
    """Who competes: all weights together, or each layer on its own at the same sparsity."""
    granularity: str = "weight"
    """What is removed: "weight", or "n:m" such as "2:4", which keeps n of every m inputs."""
    calibration_examples: int = Field(512, ge=1)
    """Training examples the scores are computed on."""
    calibration_batch_size: int = Field(64, ge=1)
    """Examples per scoring batch; part of the definition of taylor_squared."""
    calibration_augment: bool = True
    """Whether scoring sees training examples augmented, as training does, or plain."""
    hutchinson_probes: int = Field(4, ge=1)
    """Random probes per batch for the Hessian diagonal of obd."""
    batchnorm_examples: int = Field(2048, ge=0)
    """Training examples that re-estimate BatchNorm statistics after each prune; 0 keeps them."""
    rewind: Literal["none", "weights", "learning_rate"] = "none"
    """After each prune: "weights" puts kept weights back to their dense values, "learning_rate"
    starts the schedule anew, "none" runs one schedule through all rounds."""
    exclude: tuple[str, ...] = ()
    """Name globs of parameters that are never pruned, such as "conv1.*"."""
    layer_min_sparsity: float | dict[str, float] = 0.0
    """Least sparsity of every layer, or of those matching a glob: { "layer3.*" = 0.5 }."""
    layer_max_sparsity: float | dict[str, float] = 1.0
    """Greatest sparsity of every layer, or of those matching a glob. One weight always stays."""

    @field_validator("criterion")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in CRITERIA and not _PLUG_IN.fullmatch(value):
            raise ValueError(
                f"is not a criterion{nearest_name(value, CRITERIA)} (allowed: "
                f'{", ".join(CRITERIA)}, or your own as "module:attr")'
            )
        return value

    @field_validator("granularity")
    @classmethod
    def _is_granularity(cls, value: str) -> str:
        match = _PATTERN_N_M.fullmatch(value)
        if value != "weight" and not (match and 0 < int(match[1]) < int(match[2])):
            raise ValueError('must be "weight" or "n:m" with 0 < n < m, such as "2:4"')
        return value

    @field_validator("layer_min_sparsity", "layer_max_sparsity")
    @classmethod
    def _are_fractions(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        for bound in value.values() if isinstance(value, dict) else [value]:
            if not 0.0 <= bound <= 1.0:
                raise ValueError(f"{bound} is outside [0, 1]")
        return value

    @model_validator(mode="after")
    def _agree(self) -> PruneConfig:
        faults = []
        if self.pattern is not None:
            n, m = self.pattern
            if not math.isclose(self.sparsity, 1 - n / m, abs_tol=1e-9):
                faults.append(
                    f'granularity = "{self.granularity}" means sparsity = {1 - n / m:g}, not '
                    f"{self.sparsity:g}; set prune.sparsity={1 - n / m:g}"
                )
        if self.ramp_rounds is not None and self.ramp_rounds > self.rounds:
            faults.append(
                f"ramp_rounds = {self.ramp_rounds} exceeds rounds = {self.rounds}; lower it"
            )
        low, high = self.layer_min_sparsity, self.layer_max_sparsity
        if isinstance(low, float) and low > self.sparsity:
            faults.append(
                f"layer_min_sparsity = {low:g} exceeds sparsity = {self.sparsity:g}; lower it"
            )
        if isinstance(high, float) and high < self.sparsity:
            faults.append(
                f"layer_max_sparsity = {high:g} is below sparsity = {self.sparsity:g}; raise it"
            )
        if faults:
            raise ValueError(*faults)
        return self

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) of an n:m granularity, None for single weights."""
        match = _PATTERN_N_M.fullmatch(self.granularity)
        return (int(match[1]), int(match[2])) if match else None


class JobConfig(Section):
    """One whole job."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the job inside storage: letters, digits, '.', '_' and '-'."""
    storage: str = "gbp-results"
    """Folder or s3://bucket/prefix that receives results; another server than AWS by
    AWS_ENDPOINT_URL, or as s3://bucket/prefix?endpoint_override=host:port&scheme=http."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides initial weights, order of examples, augmentation and random scores."""
    workload: WorkloadConfig
    pretrain: PretrainConfig = PretrainConfig()
    prune: PruneConfig
    finetune: FinetuneConfig = FinetuneConfig()
    cluster: ClusterConfig = ClusterConfig()
    sweep: SweepConfig = SweepConfig()

    @field_validator("storage")
    @classmethod
    def _is_place(cls, value: str) -> str:
        if value.startswith("s3://"):
            return str(S3Address.parse(value))
        if "://" in value and not value.startswith("file://"):
            raise ValueError("must be a folder or s3://bucket/prefix")
        if "\0" in value:
            raise ValueError("must be a folder; no folder's name holds a NUL")
        return value.removeprefix("file://")

    @model_validator(mode="after")
    def _sections_agree(self) -> JobConfig:
        faults = []
        for section in ("pretrain", "finetune"):
            recipe: Recipe = getattr(self, section)
            if recipe.epochs > 0 and recipe.microbatches < self.cluster.max_workers:
                asked = json.dumps(self.cluster.num_workers)
                faults.append(
                    f"{section}.microbatches = {recipe.microbatches} cannot occupy "
                    f"cluster.num_workers = {asked}; lower the workers, which "
                    f"keeps the result, or raise {section}.microbatches, which changes it"
                )
        if self.prune.criterion == "movement" and self.finetune.epochs == 0:
            faults.append(
                "prune.criterion = movement gathers its scores while fine-tuning; "
                "set finetune.epochs above 0"
            )
        if faults:
            raise ValueError(*faults)
        return self


def load_job(
    source: JobConfig | str | Path | None = None,
    overrides: Mapping[str, Any] | list[str] | None = None,
) -> JobConfig:
    """Reads a job file, applies overrides and checks the whole.

    Args:
        source: Path of a TOML file, a job to start from, or None for the embedded digits job.
        overrides: Dotted keys to values, or strings "dotted.key=value" whose value is read as
            TOML and, where it is not TOML, as plain text.

    Raises:
        ConfigError: The file is missing or not TOML, or the job breaks the schema; one line that
            lists every fault.
    """
    if isinstance(source, JobConfig):
        tree = source.model_dump(mode="json", exclude_unset=True)
    else:
        tree = _read_toml(source)
    if isinstance(overrides, list):
        overrides = dict(_split_override(item) for item in overrides)
    for key, value in (overrides or {}).items():
        _set_dotted(tree, key, value)
    _fill_in(tree)
    try:
        return JobConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(explain_faults(error, JobConfig))) from None


def expand(job: JobConfig) -> list[JobConfig]:
    """Lists the trials of a sweep, each a whole job of its own; equal ones once.

    With a target each stands for a search, and has the highest sparsity of it.

    Raises:
        ConfigError: Some are refused by the schema; one line that lists every fault once.
    """
    target = job.sweep.target
    sparsities: list[float | None] = [None]
    if target.max_drop is not None:
        sparsities = [max(target.lowest, target.tolerance), target.highest]
    tree = job.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
    trials: dict[str, JobConfig] = {}
    faults: dict[str, None] = {}
    num_refused = 0
    try:
        points = span(job.sweep, job.seed, takes_whole_numbers)
    except ValueError as error:
        raise ConfigError(f"sweep.space: {error}") from None
    for point in points:
        for sparsity in sparsities:
            one = copy.deepcopy(tree)
            extra = {} if sparsity is None else {"prune.sparsity": sparsity}
            for key, value in {**point, **extra}.items():
                _set_dotted(one, key, value)
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
    """Names a trial by what decides its result, like "taylor-s0.90-r5-3f9c1a2b".

    The hash covers the non-default fields alone, so that a new field with a default keeps old
    names; `name`, `storage`, `cluster` and `sweep` are left out: they do not change the result.
    """
    identity = job.model_dump(
        mode="json", exclude_defaults=True, exclude=_TRAINING_KEYS_OUTSIDE_IDENTITY
    )
    identity["schema_version"] = SCHEMA_VERSION
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    criterion = job.prune.criterion.rpartition(":")[2]
    sparsity = f"{job.prune.sparsity:.2f}"
    if float(sparsity) != job.prune.sparsity:
        sparsity = f"{job.prune.sparsity:g}"
    return f"{criterion}-s{sparsity}-r{job.prune.rounds}-{digest}"


def find_idle_options(job: JobConfig) -> list[tuple[str, str]]:
    """Finds options that were set and do nothing: (dotted key, what makes it idle).

    A value that equals the default asks for nothing, and a record's job has all of them set.
    """
    idle: list[tuple[str, str]] = []
    prune = job.prune

    def note(section: BaseModel, prefix: str, names: tuple[str, ...], reason: str) -> None:
        fields = type(section).model_fields
        idle.extend(
            (f"{prefix}.{name}", reason)
            for name in names
            if name in section.model_fields_set and getattr(section, name) != fields[name].default
        )

    for prefix, recipe in (("pretrain", job.pretrain), ("finetune", job.finetune)):
        if recipe.epochs == 0:
            others = tuple(name for name in type(recipe).model_fields if name != "epochs")
            note(recipe, prefix, others, f"{prefix}.epochs = 0")
            continue
        if recipe.optimizer != "sgd":
            note(recipe, prefix, ("momentum",), f"{prefix}.optimizer = {recipe.optimizer}")
        if recipe.lr_schedule != "step":
            names = ("lr_milestones", "lr_gamma")
            note(recipe, prefix, names, f"{prefix}.lr_schedule = {recipe.lr_schedule}")
    if job.finetune.epochs > 0 and job.finetune.distillation.weight == 0:
        note(
            job.finetune.distillation,
            "finetune.distillation",
            ("temperature",),
            "finetune.distillation.weight = 0",
        )
    if prune.criterion in ("magnitude", "random", "synflow", "movement"):
        names = ("calibration_examples", "calibration_augment")
        note(prune, "prune", names, f"prune.criterion = {prune.criterion}")
    if prune.criterion != "obd":
        note(prune, "prune", ("hutchinson_probes",), f"prune.criterion = {prune.criterion}")
    if prune.rounds == 1:
        note(prune, "prune", ("schedule", "ramp_rounds"), "prune.rounds = 1")
    elif prune.schedule == "one_shot":
        note(prune, "prune", ("ramp_rounds",), "prune.schedule = one_shot")
    if prune.rewind == "learning_rate" and job.finetune.epochs == 0:
        note(prune, "prune", ("rewind",), "finetune.epochs = 0")
    return idle


def describe_fields() -> list[tuple[str, str, str]]:
    """Lists every field as (dotted key, default, description), in the order of the file."""
    rows: list[tuple[str, str, str]] = []

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                rows.append((f"[{prefix}{name}]", "", (inner.__doc__ or "").strip()))
                walk(inner, f"{prefix}{name}.")
            else:
                default = "required" if field.is_required() else _as_toml(field.default)
                text = " ".join((field.description or "").split())
                rows.append((f"{prefix}{name}", default, text))

    walk(JobConfig, "")
    return rows


def _field_at(key: str) -> FieldInfo | None:
    """Finds the schema of a dotted field; None inside a table, such as the workload's options."""
    section: type[BaseModel] = JobConfig
    *parents, last = key.split(".")
    for part in parents:
        field = section.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        section = inner
    return section.model_fields.get(last)


def takes_whole_numbers(key: str) -> bool | None:
    """Tells whether a dotted field is a whole number; None where the schema does not say."""
    field = _field_at(key)
    return None if field is None else field.annotation in (int, int | None)


def _fill_in(tree: dict[str, Any]) -> None:
    """Gives a job the required fields that it leaves to its sweep, so that they are said once."""
    sweep = tree.get("sweep")
    if not isinstance(sweep, dict):
        return
    missing = first_values(sweep.get("space"))
    if isinstance(target := sweep.get("target"), dict) and "max_drop" in target:
        missing["prune.sparsity"] = target.get("highest", TargetConfig().highest)
    for key, value in missing.items():
        if (field := _field_at(key)) is None or not field.is_required():
            continue
        node: Any = tree
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is None:
            _set_dotted(tree, key, value)


def _as_toml(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        value = list(value)
    return json.dumps(value)


def _read_toml(source: str | Path | None) -> dict[str, Any]:
    if source is None:
        return tomllib.loads(
            resources.files("gbp_ray.zoo").joinpath("digits.toml").read_text("utf-8")
        )
    path = Path(source)
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"job file {str(path)!r} does not exist; give the path of a TOML file"
        ) from None
    except OSError as error:
        raise ConfigError(f"job file {str(path)!r} cannot be read: {error.strerror}") from None
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
    except (tomllib.TOMLDecodeError, RecursionError):
        return key, raw
    # Text of several lines may read as more keys than this one.
    return key, parsed["value"] if len(parsed) == 1 else raw


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted(key.split('.'))}: {parent!r} is a value, not a section")
        node = child
    node[last] = value
