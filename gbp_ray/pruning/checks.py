"""Checks before training: refuses jobs that do not suit their network or data.

`config` has refused what is wrong by itself. Here the network is built, and a small batch of each
split passes through it.
"""

from __future__ import annotations

import gc
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.modules.batchnorm import _BatchNorm

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.config.metrics import MetricSpec
from gbp_ray.config.training import Recipe
from gbp_ray.distributed.agreement import (
    check_data,
    check_on_record,
    fingerprints_of_network,
)
from gbp_ray.distributed.ranks import fixed_kernels, isolated
from gbp_ray.distributed.sharding import (
    PARTED,
    copy_network,
    leaves,
    listen_to_groups,
    shard_network,
)
from gbp_ray.errors import ConfigError, PruneError, WorkloadError, in_one_line, name_some
from gbp_ray.pruning.criteria import criterion
from gbp_ray.pruning.masks import read_initial_masks
from gbp_ray.pruning.reconstruction import check_reconstruction
from gbp_ray.pruning.scoring import check_criterion
from gbp_ray.pruning.selection import check_units
from gbp_ray.pruning.units import UNUSED, Prunable, Survey, survey
from gbp_ray.pruning.whole_units import (
    WholeUnits,
    check_features,
    check_removable,
    find_units,
    survey_units,
)
from gbp_ray.results.records import RoundRecord
from gbp_ray.training.adversarial import check_answers, check_attack
from gbp_ray.training.distillation import check_distillation
from gbp_ray.training.loss import check_loss, find_varying_counts
from gbp_ray.training.network import network_of_seed, unused_layers
from gbp_ray.training.optimizer import check_freeze, trainable_parameters
from gbp_ray.training.side_effects import Watch, check_readings, check_training_passes
from gbp_ray.workloads.batch import forward, size_of
from gbp_ray.workloads.checks import Checked, check_workload
from gbp_ray.workloads.contract import Workload, in_mode, num_examples
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.loading import load_workload
from gbp_ray.workloads.losses import batch_loss
from gbp_ray.workloads.metrics import specs_of
from gbp_ray.workloads.weights import tensor_state

__all__ = [
    "check_frozen_movement",
    "check_job",
    "check_metric",
    "load_checked",
    "warn_of_unusual_weights",
]

_NUM_ROUTES = 4


def load_checked(job: JobConfig, dense: RoundRecord | None = None) -> tuple[Workload, bool]:
    """Loads a workload, on as many threads as its trial has, and checks it; see `check_job`.

    Returns:
        The workload, and whether a trial in this process may use it, too.
    """
    with fixed_kernels(job.cluster.threads_per_worker):
        workload = load_workload(job.workload, job.seed)
    is_untouched = check_job(job, workload, dense)
    # What a factory draws on a GPU follows the seed only once a trial has started the GPU.
    return workload, is_untouched and not job.cluster.use_gpu


def check_job(job: JobConfig, workload: Workload, dense: RoundRecord | None = None) -> bool:
    """Refuses what a job could only fail at later; builds the model, trains and writes nothing.

    Args:
        dense: Round 0, of a trial that goes on.

    Returns:
        Whether the checks have left no trace in the workload.

    Raises:
        ConfigError: The criterion, an exclude glob, a layer bound, n:m, the final sparsity or the
            size of a batch's parts does not suit the model.
        WorkloadError: The network cannot be built, a batch of the data cannot be used, or round 0
            was made with another network or other data.
        PruneError: The criterion fails on a small batch.
    """
    before = _state_of(workload)
    modules, is_untouched = _check(job, workload, dense)
    if modules:
        gc.collect()  # a network may hold itself
    # Modules that still live may be part of the next network, too.
    return is_untouched and not modules and _state_of(workload) == before is not None


def _state_of(workload: Workload) -> list[Any] | None:
    """Lists what a workload's data and callables hold; None where something cannot be looked into.

    A generator of random numbers or an iterator may hide what it has given already, so all that is
    no number, text or tensor, and does not keep everything in its `__dict__`, counts as such.
    """
    with suppress(Exception):  # attributes may be anything
        return _list_state([getattr(workload, field.name) for field in fields(workload)])
    return None


def _list_state(left: list[Any]) -> list[Any] | None:
    found: list[Any] = []
    seen = set()
    while left:
        value = left.pop()
        if isinstance(value, _VALUES):
            found.append(repr(value))
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append((id(value), value._version))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            bytes_N = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            found.append((id(value), zlib.crc32(bytes_N.data)))
        elif isinstance(value, (list, tuple, dict)):
            left += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, partial):
            left += [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType):
            left += [value.__self__, value.__func__]
        elif isinstance(value, BuiltinFunctionType):
            left.append(value.__self__)
        elif isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            left += [value.__defaults__, value.__kwdefaults__, *cells]
        elif type(value).__basicsize__ <= _Plain.__basicsize__:
            left.append(vars(value))
        else:
            return None
    return found


_VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, type, np.generic, PurePath, ModuleType),
    *(torch.dtype, torch.device),
)


class _Plain:
    """Of the size of an object that holds a `__dict__` and nothing else."""


def check_metric(workload: Workload, dense: RoundRecord | None, source: str) -> None:
    """Refuses to go on with a trial whose rounds were judged by another metric.

    Raises:
        WorkloadError: They were.
    """
    metric = specs_of(workload)[0]
    if dense is not None and dense.metric != metric:
        raise WorkloadError(
            f"{source}: its rounds were judged by {_name(dense.metric)}, but now "
            f"workload.metrics puts {_name(metric)} first; restore it, or give the job another name"
        )


def _name(metric: MetricSpec) -> str:
    direction = "highest" if metric.higher_is_better else "lowest"
    return f"{metric.name} ({direction} is best{f', in {metric.unit}' if metric.unit else ''})"


def _check(
    job: JobConfig, workload: Workload, dense: RoundRecord | None
) -> tuple[WeakSet[nn.Module], bool]:
    """Checks; returns the modules used, and whether data and parameters are as they were."""
    criterion(job.prune.criterion)
    stored, source = (dense.fingerprints if dense else {}), f"trial {trial_id(job)}"
    model, is_blank = network_of_seed(workload, job.seed)
    unused = unused_layers(workload, model, is_blank=is_blank)
    # A trial goes on with the layers that it began with.
    unused -= {layer.name for layer in dense.cost.layers} if dense else set()
    structure = find_units(workload, model, job.prune) if job.prune.unit_kinds else None
    if structure is None:
        found = survey(model, job.prune.exclude, job.prune.include, unused)
    else:
        found = survey_units(structure, model)
    units = found.units
    # Of whole units, too, movement scores matrices only.
    check_frozen_movement(job, model, [unit for unit in units if unit.parameter.ndim > 1])
    shapes = {unit.name: tuple(unit.parameter.shape) for unit in units}
    for layer in dense.cost.layers if dense else ():
        if shapes.get(layer.name) != layer.shape:
            raise WorkloadError(
                f"{source}: was made with another network, in which '{layer.name}' has shape "
                f"{layer.shape}, not {shapes.get(layer.name, 'none')}; restore it, or give the job "
                "another name"
            )
    check_metric(workload, dense, source)
    check_on_record(fingerprints_of_network(model, is_blank=is_blank), stored, source)
    initial = read_initial_masks(job, units, unused)
    if structure is None:
        check_units(units, job.prune)
    elif initial is not None:
        try:
            kept_U = structure.units_in(initial)
        except PruneError as error:
            raise ConfigError(
                f"prune.initial_masks = '{job.prune.initial_masks}': {error}; give those of a "
                "trial that removed whole units, or none"
            ) from None
        WholeUnits(structure, job.prune, kept_U)
    if job.cluster.strategy == "fsdp":
        _check_shards(job, model, units)
    watch, size = Watch(model), min(8, job.prune.calibration_batch_size)
    with isolated(model, 0):
        checked = check_workload(workload, model, size)
        check_data(workload, stored, source)
        watch.check_evaluated()
    is_read_alike = check_readings(workload)
    recipes: dict[str, Recipe] = {"pretrain": job.pretrain, "finetune": job.finetune}
    recipes = {section: recipe for section, recipe in recipes.items() if recipe.epochs > 0}
    attacked = [name for name, recipe in recipes.items() if recipe.adversarial.kind != "none"]
    for section, recipe in recipes.items():
        check_freeze(model, recipe.freeze, section)
        if section in attacked[:1]:  # what one attack can do, all can
            check_attack(workload, model, recipe.adversarial, f"{section}.adversarial")
        check_loss(recipe, section, workload, checked.first_batch)
    if not attacked:
        check_attack(workload, model, job.attack, "attack")
    check_answers(job.attack, checked)
    if "finetune" in recipes:
        check_distillation(job.finetune.distillation, checked)
    if job.finetune.patience and workload.validation is None:
        raise ConfigError(
            f"finetune.patience = {job.finetune.patience}: has no examples to judge by; set "
            "workload.validation, such as 0.1"
        )
    _check_norms(job, recipes, checked)
    _warn_of_varying_counts(job, recipes, workload)
    unreached = check_training_passes(job, recipes, checked, watch)
    if structure is None:
        check_criterion(model, units, workload, job.prune, seed=job.seed)
    elif not is_blank:
        check_removable(workload, model, structure, job.prune, job.seed)
        taught = job.finetune.distillation
        if "finetune" in recipes and taught.is_on and taught.features and job.prune.compact:
            check_features(workload, model, structure, job.prune, taught.features)
    if job.prune.reconstruct != "none" and not is_blank:
        check_reconstruction(model, workload, job.prune)
    if job.cluster.strategy == "fsdp" and not dist.is_initialized():
        _check_shardable(checked)
    warn_of_unusual_weights(checked, found, unreached)
    _warn_of_unstored_state(model)
    return WeakSet(model.modules()), is_read_alike and not watch.parameters()


def _check_shardable(checked: Checked) -> None:
    """Refuses networks that FSDP2 cannot shard or pass: tries it as the only rank of one.

    Such are scalars, parameters whose memory has gaps, unequal types in a group, and modules that
    are used otherwise than by calling them.
    """
    workload, example = checked.workload, checked.take_example()
    twin = copy_network(checked.model).eval()
    dist.init_process_group("fake", store=HashStore(), rank=0, world_size=1)
    try:
        shard_network(twin, torch.device("cpu"), 1)
        with isolated(twin, 0):
            loss = batch_loss(twin, workload, example)
            trained = [leaf for leaf in leaves(twin).values() if leaf.requires_grad]
            if loss.requires_grad:
                # As in training, where FSDP2 adds up no gradients itself.
                torch.autograd.grad(loss, trained, allow_unused=True)
        parted = _find_parted(workload, twin)
    except Exception as error:
        raise ConfigError(
            f"cluster.strategy = fsdp: cannot spread this network over workers "
            f"({in_one_line(error)}); mend it, or set cluster.strategy to replicated"
        ) from error
    finally:
        dist.destroy_process_group()
    if parted:
        raise ConfigError(f"{PARTED} (as to {name_some(parted)})")


@torch.no_grad()
def _find_parted(workload: Workload, sharded: nn.Module) -> list[str]:
    """Lists groups of a sharded network that passes skip for some examples, or by chance."""
    passed: list[str] = []
    listen_to_groups(sharded, passed.append)
    total = num_examples(workload.train)
    parted: set[str] = set()
    for is_training in (True, False)[total == 1 :]:
        routes: list[set[str]] = []
        for number in range(_NUM_ROUTES):
            indices = torch.tensor([number, number + 1][:total]) % total
            batch = take_batch(workload, workload.train, indices, augment_seed=number)
            with in_mode(sharded, is_training=is_training), isolated(sharded, number):
                forward(sharded, workload, batch)
            routes.append(set(passed))
            passed.clear()
        parted |= routes[0].union(*routes) - routes[0].intersection(*routes)
    return [f"'{name}'" for name in sorted(parted)]


def _check_shards(job: JobConfig, model: nn.Module, units: list[Prunable]) -> None:
    """Refuses n:m groups that FSDP2 would cut, and empty parameters."""
    split = [unit.name for unit in units if unit.input_dim == 0]
    if job.prune.pattern is not None and split:
        raise ConfigError(
            f"cluster.strategy = fsdp: cuts '{split[0]}' between its inputs, along which the "
            f"groups of prune.granularity = '{job.prune.granularity}' run; name it in "
            "prune.exclude or set cluster.strategy to replicated"
        )
    if empty := [name for name, parameter in model.named_parameters() if not parameter.numel()]:
        raise ConfigError(
            f"cluster.strategy = fsdp: '{empty[0]}' has no elements, and FSDP2 cannot spread that; "
            "leave its layer out or set cluster.strategy to replicated"
        )


def check_frozen_movement(job: JobConfig, model: nn.Module, units: list[Prunable]) -> None:
    """Raises ConfigError where movement would score weights that fine-tuning does not move."""
    trainable = trainable_parameters(model, job.finetune.freeze)
    frozen = [unit for unit in units if unit.name not in trainable]
    if job.prune.spec.needs_history and frozen:
        why = "finetune.freeze" if frozen[0].parameter.requires_grad else "requires_grad = False"
        raise ConfigError(
            f"prune.criterion = movement: '{frozen[0].name}' is frozen ({why}) and never moves; "
            "name it in prune.exclude"
        )


def _check_norms(job: JobConfig, recipes: Mapping[str, Recipe], checked: Checked) -> None:
    """Refuses norms that wait for other workers, and parts of one example, without variance."""
    modules = dict(checked.model.named_modules())
    # Another worker may have no part of the batch.
    if joint := [name for name, m in modules.items() if isinstance(m, nn.SyncBatchNorm)]:
        raise ConfigError(
            f"workload.factory: '{joint[0]}' is a SyncBatchNorm, whose statistics would depend on "
            "the number of workers; use BatchNorm, which sees one part of a batch at a time"
        )
    has_norm = any(isinstance(module, _BatchNorm) for module in modules.values())
    if has_norm and job.prune.norm_examples == 1:
        raise ConfigError(
            "prune.batchnorm_examples = 1: one example has no variance; give at least 2, better "
            "hundreds, or 0 to keep the statistics"
        )
    for section, recipe in recipes.items():
        size = min(recipe.batch_size, num_examples(checked.workload.train))
        if size // min(recipe.microbatches, size) == 1:
            _check_lone_example(section, recipe, size, checked)
            return


def _warn_of_varying_counts(
    job: JobConfig, recipes: Mapping[str, Recipe], workload: Workload
) -> None:
    """Warns where examples are weighted by a number of labels that another reading gives."""
    parted = [name for name, recipe in recipes.items() if recipe.microbatches > 1]
    exact = [f"{name}.microbatches = 1" for name in parted]
    if job.prune.spec.needs_data and job.prune.calibration_augment:
        exact.append("prune.calibration_augment = false")
    if exact and find_varying_counts(workload):
        warnings.warn(
            "workload.train: examples have another number of labels each time they are trained on, "
            "so the weights of microbatches and calibration batches are not exact; draw equally "
            f"many labels each time, or set {' and '.join(exact)}",
            stacklevel=2,
        )


def _check_lone_example(section: str, recipe: Recipe, size: int, checked: Checked) -> None:
    """Tries one example in training: a norm over images has many values even there."""
    model = checked.model
    try:
        with torch.no_grad(), in_mode(model, is_training=True), isolated(model, 0):
            forward(model, checked.workload, checked.take_example())
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        remedy = f"set {section}.microbatches to {size // 2} or less" if size > 1 else "raise it"
        raise ConfigError(
            f"{section}.batch_size = {recipe.batch_size} with {section}.microbatches = "
            f"{recipe.microbatches}: cuts {size} example{'s' if size > 1 else ''} into parts of "
            f"one, and this model's BatchNorm needs two in training; {remedy}"
        ) from error


def warn_of_unusual_weights(checked: Checked, found: Survey, unreached: Sequence[str] = ()) -> None:
    """Warns of weights that no pass reaches, and of embeddings that a layer shares.

    Args:
        unreached: Parameters that the loss does not depend on in training.
    """
    model, units = checked.model, found.units
    total = sum(unit.parameter.numel() for unit in units)
    free = {name: n for name, (n, reason) in found.unpruned.items() if reason == UNUSED}
    if free:
        named = name_some([f"'{name}' ({n:,})" for name, n in free.items()])
        warnings.warn(
            f"prune: {named} take"
            f"{'s' if len(free) == 1 else ''} no part in the passes of training examples in eval "
            f"mode, so removing {sum(free.values()):,} weights would change nothing; they stay and "
            "do not count as prunable; name in prune.include what is to be pruned all the same",
            stacklevel=2,
        )
    in_eval = [name for name in checked.unreached if name not in unreached]
    for names, when in ((unreached, "training"), (in_eval, "eval mode, where it is scored")):
        if idle := [unit for unit in units if unit.name in names]:
            number = sum(unit.parameter.numel() for unit in idle)
            num_seen = size_of(checked.first_batch.inputs)
            warnings.warn(
                f"prune: {_name_some(idle)} get{'s' if len(idle) == 1 else ''} no gradient from "
                f"{num_seen} examples in {when}; {number:,} of {total:,} prunable "
                "weights, whose removal counts as sparsity; name in prune.exclude what no "
                "pass uses",
                stacklevel=2,
            )
    kinds = (nn.Embedding, nn.EmbeddingBag)
    tables = {module.weight for module in model.modules() if isinstance(module, kinds)}
    layers = (module for module in model.modules() if not isinstance(module, kinds))
    shared = {weight for layer in layers for weight in layer.parameters(recurse=False)} & tables
    if embedded := [unit for unit in units if unit.parameter in shared]:
        warnings.warn(
            f"prune: {_name_some(embedded)}, which a layer shares with an embedding, loses weights "
            "in both; name it in prune.exclude to keep it",
            stacklevel=2,
        )


def _warn_of_unstored_state(model: nn.Module) -> None:
    kept = tensor_state(model)
    if left_out := [f"'{name}'" for name in model.state_dict() if name not in kept]:
        warnings.warn(
            f"workload.factory: {name_some(left_out)} of the network's state is no "
            "tensor and is not stored with its weights; a network that they are loaded into has "
            "what build_model gives it",
            stacklevel=2,
        )


def _name_some(units: list[Prunable]) -> str:
    return name_some([f"'{unit.name}' ({unit.parameter.numel():,})" for unit in units])
