"""The job: one TOML file, checked whole before anything starts.

This module decides what a job may say and what a trial is called. It is read by every floor above
and knows neither torch nor Ray. All faults of a job are reported at once, in one line, with dotted
paths and the nearest valid name.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from gbp_ray.address import S3Address
from gbp_ray.attack_config import AdversarialConfig, AttackConfig, Perturbation, find_weaker_attack
from gbp_ray.cluster_config import ClusterConfig
from gbp_ray.errors import ConfigError
from gbp_ray.network_config import EncodingConfig, TransferConfig
from gbp_ray.prune_config import CRITERIA, PruneConfig
from gbp_ray.sections import (
    MOST_EXAMPLES,
    PLUG_IN,
    Section,
    dotted,
    explain_faults,
    is_matched,
    match_names,
    nearest_glob,
    nearest_name,
    plain,
)
from gbp_ray.space import SweepConfig, TargetConfig, first_values, span
from gbp_ray.training_config import DistillationConfig, FinetuneConfig, PretrainConfig, Recipe

__all__ = [
    "CRITERIA",
    "SCHEMA_VERSION",
    "AdversarialConfig",
    "AttackConfig",
    "ClusterConfig",
    "DistillationConfig",
    "EncodingConfig",
    "FinetuneConfig",
    "JobConfig",
    "Perturbation",
    "PretrainConfig",
    "PruneConfig",
    "Recipe",
    "SweepConfig",
    "TargetConfig",
    "TransferConfig",
    "WorkloadConfig",
    "describe_fields",
    "expand",
    "find_idle_options",
    "is_matched",
    "load_job",
    "match_names",
    "nearest_glob",
    "nearest_name",
    "takes_whole_numbers",
    "trial_id",
]

SCHEMA_VERSION = 1
"""Part of every trial id: raised when the meaning of a field changes, never for a new field."""

_TRAINING_KEYS_OUTSIDE_IDENTITY = {"name", "storage", "cluster", "sweep"}


class WorkloadConfig(Section):
    """What is pruned: a model with its data."""

    factory: str
    """Where the workload comes from, as "module:attr"; the attr is called with the options."""
    options: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    tie: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...] = ()
    """Groups of layers that share one weight, by name or glob: [["layer1.*.conv2"]]. Their shapes
    must be equal; the weight is that of the first layer."""
    eval_batch_size: int = Field(256, ge=1, le=MOST_EXAMPLES)
    """Examples per batch when accuracy is measured, on each worker."""
    transfer: TransferConfig = TransferConfig()
    encoding: EncodingConfig = EncodingConfig()
    validation: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the training examples that the seed sets aside: never trained or scored on. Rounds
    are then judged by them, and the test split is used once, at the end, for the chosen round."""
    train_sample: int = Field(1000, ge=0, le=MOST_EXAMPLES)
    """Training examples, as they are, on which accuracy is measured after each round, too; what
    lies between it and the held-out accuracy is overfitting. 0 leaves it out."""

    @field_validator("factory")
    @classmethod
    def _is_plug_in(cls, value: str) -> str:
        if not PLUG_IN.fullmatch(value):
            raise ValueError('must read "module:attr", like "gbp_ray.zoo:digits_convnet"')
        return value

    @field_validator("options")
    @classmethod
    def _are_plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        plain_values = {}
        for name, option in value.items():
            try:
                plain_values[plain(name)] = plain(option)
            except (TypeError, ValueError, RecursionError):
                raise ValueError(
                    f"{name!r} must be text, a finite number, true or false, a list or a table; "
                    "put quotes around a date"
                ) from None
        return plain_values


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
    attack: AttackConfig = AttackConfig()
    cluster: ClusterConfig = ClusterConfig()
    sweep: SweepConfig = SweepConfig()

    def __repr__(self) -> str:
        prune = self.prune
        return (
            f"<JobConfig {self.name}: {self.workload.factory}, {prune.criterion} to sparsity "
            f"{prune.sparsity:g} in {prune.rounds} rounds, seed {self.seed}>"
        )

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
            if recipe.epochs > 0 and (
                fault := find_weaker_attack(self.attack, recipe.adversarial, section)
            ):
                faults.append(fault)
        if self.prune.criterion == "movement" and self.finetune.patience:
            faults.append(
                f"finetune.patience = {self.finetune.patience} takes steps back that "
                "prune.criterion = movement has counted; set it to 0"
            )
        if self.prune.criterion == "movement" and self.finetune.epochs == 0:
            faults.append(
                "prune.criterion = movement gathers its scores while fine-tuning; "
                "set finetune.epochs above 0"
            )
        if self.prune.criterion == "synflow" and self.workload.encoding.kind == "one_hot":
            faults.append(
                "prune.criterion = synflow sends ones through the network, which light one level "
                "of workload.encoding.kind = one_hot alone; use thermometer, or another criterion"
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
    try:
        if isinstance(source, JobConfig):
            tree = source.model_dump(mode="json", exclude_unset=True)
        else:
            tree = _read_toml(source)
        if isinstance(overrides, list):
            overrides = dict(_split_override(item) for item in overrides)
        for key, value in (overrides or {}).items():
            _set_dotted(tree, key, value)
        _fill_in(tree)
        return JobConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(explain_faults(error, JobConfig))) from None
    except RecursionError:
        raise ConfigError("the job is nested too deeply; use fewer lists in lists") from None


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
            one = dict(tree)
            extra = {} if sparsity is None else {"prune.sparsity": sparsity}
            for key, value in {**point, **extra}.items():
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
    """Names a trial by what decides its result, like "taylor-s0.90-r5-3f9c1a2b".

    The hash covers the non-default fields alone, so that a new field with a default keeps old
    names; `name`, `storage`, `cluster` and `sweep` are left out: they do not change the result.
    """
    identity = job.model_dump(
        mode="json", exclude_defaults=True, exclude=_TRAINING_KEYS_OUTSIDE_IDENTITY
    )
    # The masks and weights themselves, wherever they lie.
    if job.prune.initial_masks_digest:
        identity["prune"].pop("initial_masks", None)
    if job.workload.transfer.checkpoint_digest:
        identity["workload"]["transfer"].pop("checkpoint", None)
    if job.finetune.distillation.teacher_digest:
        identity["finetune"]["distillation"].pop("teacher", None)
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
        if recipe.microbatches == recipe.batch_size:
            names = ("mixup", "cutmix")
            note(recipe, prefix, names, f"{prefix}.microbatches = {recipe.microbatches}")
        if recipe.optimizer != "sgd":
            note(recipe, prefix, ("momentum",), f"{prefix}.optimizer = {recipe.optimizer}")
        if recipe.lr_schedule != "step":
            names = ("lr_milestones", "lr_gamma")
            note(recipe, prefix, names, f"{prefix}.lr_schedule = {recipe.lr_schedule}")
        _note_perturbation(note, recipe.adversarial, f"{prefix}.adversarial")
    if job.finetune.epochs > 0:
        distillation, section = job.finetune.distillation, "finetune.distillation"
        if distillation.weight == 1:
            note(job.finetune, "finetune", ("label_smoothing",), f"{section}.weight = 1")
        if distillation.weight == 0:
            note(distillation, section, ("temperature",), f"{section}.weight = 0")
        if not distillation.features:
            note(distillation, section, ("features_weight",), f"{section}.features = []")
        if not distillation.is_on:
            note(distillation, section, ("teacher",), f"{section}.weight = 0")
        if job.finetune.patience == 0:
            note(job.finetune, "finetune", ("validate_every",), "finetune.patience = 0")
    _note_perturbation(note, job.attack, "attack")
    encoding, transfer = job.workload.encoding, job.workload.transfer
    if encoding.kind != "normalise":
        reason = f"workload.encoding.kind = {encoding.kind}"
        note(encoding, "workload.encoding", ("mean", "deviation"), reason)
    if encoding.kind in ("none", "normalise"):
        reason = f"workload.encoding.kind = {encoding.kind}"
        note(encoding, "workload.encoding", ("levels",), reason)
    if not transfer.checkpoint:
        names = ("checkpoint_digest", "new_head")
        note(transfer, "workload.transfer", names, 'workload.transfer.checkpoint = ""')
    if prune.criterion in ("magnitude", "random", "synflow", "movement"):
        names = ("calibration_examples", "calibration_augment")
        note(prune, "prune", names, f"prune.criterion = {prune.criterion}")
    if not prune.initial_masks:
        note(prune, "prune", ("initial_masks_digest",), "prune.initial_masks unset")
    if prune.criterion != "obd":
        note(prune, "prune", ("hutchinson_probes",), f"prune.criterion = {prune.criterion}")
    if prune.rounds == 1:
        note(prune, "prune", ("schedule", "ramp_rounds"), "prune.rounds = 1")
    elif prune.schedule == "one_shot":
        note(prune, "prune", ("ramp_rounds",), "prune.schedule = one_shot")
    if prune.rewind == "learning_rate" and job.finetune.epochs == 0:
        note(prune, "prune", ("rewind",), "finetune.epochs = 0")
    return idle


def _note_perturbation(
    note: Callable[[BaseModel, str, tuple[str, ...], str], None],
    perturbation: Perturbation,
    section: str,
) -> None:
    """Notes what of a perturbation has no effect."""
    reason = f"{section}.kind = {perturbation.kind}"
    if perturbation.kind == "none":
        others = tuple(name for name in type(perturbation).model_fields if name != "kind")
        note(perturbation, section, others, reason)
    elif perturbation.kind == "fgsm":
        names = ("steps", "step_size", *(n for n in ("restarts",) if hasattr(perturbation, n)))
        note(perturbation, section, names, reason)


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
        # By its path: as a module, the folder would bring torch along.
        return tomllib.loads(
            resources.files("gbp_ray").joinpath("zoo", "digits.toml").read_text("utf-8")
        )
    path = Path(source)
    try:
        data = path.read_bytes()
        # Editors put a byte order mark first, and older ones end lines in other ways.
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
    # Text of several lines may read as more keys than this one.
    return key, parsed["value"] if len(parsed) == 1 else raw


def _set_dotted(tree: dict[str, Any], key: str, value: Any, *, is_shared: bool = False) -> None:
    """Sets a value by its dotted key.

    Args:
        is_shared: Whether tables in the tree belong to others, too: then they are copied first.
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
