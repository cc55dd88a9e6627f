"""config.idle: to be described."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from gbp_ray.config.attack import Perturbation
from gbp_ray.config.job import JobConfig

__all__ = [
    "find_idle_options",
]


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
