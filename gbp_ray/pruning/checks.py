"""What a job is refused for before anything is trained: where it does not suit its network or data.

The schema has refused what is wrong by itself (`config`); here the network is built, and a small
batch of each split goes through it.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn.modules.batchnorm import _BatchNorm

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.config.training import Recipe
from gbp_ray.distributed.agreement import check_data, check_on_record, fingerprints_of_network
from gbp_ray.distributed.ranks import isolated
from gbp_ray.distributed.sharding import PARTED, leaves, listen_to_groups, shard_network
from gbp_ray.errors import ConfigError, WorkloadError, in_one_line, name_some
from gbp_ray.pruning.criteria import criterion
from gbp_ray.pruning.masks import read_initial_masks
from gbp_ray.pruning.scoring import check_criterion
from gbp_ray.pruning.selection import check_reachable, check_selectable
from gbp_ray.pruning.units import Prunable, prunable_parameters
from gbp_ray.results.records import RoundRecord
from gbp_ray.training.adversarial import check_attack
from gbp_ray.training.distillation import check_distillation
from gbp_ray.training.loss import check_loss
from gbp_ray.training.network import network_of_seed
from gbp_ray.training.optimizer import check_freeze, trainable_parameters
from gbp_ray.training.side_effects import (
    Watch,
    check_evaluated,
    check_readings,
    check_training_passes,
)
from gbp_ray.workloads.checks import check_workload
from gbp_ray.workloads.contract import Workload, in_mode, num_examples
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.weights import tensor_state

__all__ = [
    "check_job",
    "refuse_frozen_movement",
    "warn_of_unusual_weights",
]

_NUM_ROUTES = 4


def check_job(job: JobConfig, workload: Workload, dense: RoundRecord | None = None) -> None:
    """Refuses what a job could only fail at later; builds the model, trains and writes nothing.

    Args:
        dense: Round 0, of a trial that goes on.

    Raises:
        ConfigError: The criterion, an exclude glob, a layer bound, n:m, the final sparsity or the
            size of a batch's parts does not suit the model.
        WorkloadError: The network cannot be built, a batch of the data cannot be used, or round 0
            was made with another network or other data.
        PruneError: The criterion fails on a small batch.
    """
    criterion(job.prune.criterion)
    stored, source = (dense.fingerprints if dense else {}), f"trial {trial_id(job)}"
    model, is_blank = network_of_seed(workload, job.seed)
    units = prunable_parameters(model, job.prune.exclude)
    refuse_frozen_movement(job, model, units)
    shapes = {unit.name: tuple(unit.parameter.shape) for unit in units}
    for layer in dense.cost.layers if dense else ():
        if shapes.get(layer.name) != layer.shape:
            raise WorkloadError(
                f"{source}: was made with another network, in which '{layer.name}' has shape "
                f"{layer.shape}, not {shapes.get(layer.name, 'none')}; restore it, or give the job "
                "another name"
            )
    check_on_record(fingerprints_of_network(model, is_blank=is_blank), stored, source)
    check_selectable(
        shapes,
        job.prune,
        {unit.name: unit.input_dim for unit in units},
        {unit.name: unit.num_groups for unit in units},
    )
    check_reachable(shapes, job.prune)
    read_initial_masks(job, units)
    _refuse_split_patterns(job, units)
    _refuse_empty_shards(job, model)
    watch = Watch(model)
    check_workload(workload, model, min(8, job.prune.calibration_batch_size))
    check_data(workload, stored, source)
    check_evaluated(watch)
    check_readings(workload)
    for section in ("pretrain", "finetune"):
        recipe: Recipe = getattr(job, section)
        if recipe.epochs > 0:
            check_freeze(model, recipe.freeze, section)
            check_attack(workload, model, recipe.adversarial, f"{section}.adversarial")
            check_loss(recipe, section, workload)
    check_attack(workload, model, job.attack, "attack")
    if job.finetune.epochs > 0:
        check_distillation(job, workload, model)
    if job.finetune.patience and workload.validation is None:
        raise ConfigError(
            f"finetune.patience = {job.finetune.patience}: has no examples to judge by; set "
            "workload.validation, such as 0.1"
        )
    _refuse_joint_norms(model)
    _refuse_lone_examples(job, workload, model)
    check_training_passes(job, workload, model, watch)
    check_criterion(model, units, workload, job.prune, seed=job.seed)
    if job.cluster.strategy == "fsdp" and not dist.is_initialized():
        _refuse_unshardable(workload, model)
    size = min(8, num_examples(workload.train), job.prune.calibration_batch_size)
    warn_of_unusual_weights(model, units, workload, size)


def _refuse_unshardable(workload: Workload, model: nn.Module) -> None:
    """Refuses what FSDP2 cannot spread, or cannot pass through: tries it as the only rank of one.

    Such are scalars, parameters whose memory has gaps, unequal types in a group, and modules that
    are used otherwise than by calling them.
    """
    example, targets = take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))
    twin = copy.deepcopy(model).eval()
    dist.init_process_group("fake", store=HashStore(), rank=0, world_size=1)
    try:
        shard_network(twin, torch.device("cpu"), 1)
        with isolated(twin, 0):
            loss = workload.loss(twin(example), targets)
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
    """Lists groups of a sharded network that passes leave out for some examples, or by chance."""
    passed: list[str] = []
    listen_to_groups(sharded, passed.append)
    total = num_examples(workload.train)
    parted: set[str] = set()
    for is_training in (True, False)[total == 1 :]:
        routes: list[set[str]] = []
        for number in range(_NUM_ROUTES):
            indices = torch.tensor([number, number + 1][:total]) % total
            inputs, _ = take_batch(workload, workload.train, indices, augment_seed=number)
            with in_mode(sharded, is_training=is_training), isolated(sharded, number):
                sharded(inputs)
            routes.append(set(passed))
            passed.clear()
        parted |= routes[0].union(*routes) - routes[0].intersection(*routes)
    return [f"'{name}'" for name in sorted(parted)]


def _refuse_split_patterns(job: JobConfig, units: list[Prunable]) -> None:
    split = [unit.name for unit in units if unit.input_dim == 0]
    if job.cluster.strategy == "fsdp" and job.prune.pattern is not None and split:
        raise ConfigError(
            f"cluster.strategy = fsdp: cuts '{split[0]}' between its inputs, along which the "
            f"groups of prune.granularity = '{job.prune.granularity}' run; name it in "
            "prune.exclude or set cluster.strategy to replicated"
        )


def _refuse_empty_shards(job: JobConfig, model: nn.Module) -> None:
    empty = [name for name, parameter in model.named_parameters() if not parameter.numel()]
    if job.cluster.strategy == "fsdp" and empty:
        raise ConfigError(
            f"cluster.strategy = fsdp: '{empty[0]}' has no elements, and FSDP2 cannot spread that; "
            "leave its layer out or set cluster.strategy to replicated"
        )


def refuse_frozen_movement(job: JobConfig, model: nn.Module, units: list[Prunable]) -> None:
    """Refuses movement of weights that fine-tuning does not move.

    Raises:
        ConfigError: Naming the first.
    """
    trainable = trainable_parameters(model, job.finetune.freeze)
    frozen = [unit for unit in units if unit.name not in trainable]
    if job.prune.spec.needs_history and frozen:
        why = "finetune.freeze" if frozen[0].parameter.requires_grad else "requires_grad = False"
        raise ConfigError(
            f"prune.criterion = movement: '{frozen[0].name}' is frozen ({why}) and never moves; "
            "name it in prune.exclude"
        )


def _refuse_joint_norms(model: nn.Module) -> None:
    """Refuses norms that wait in a pass for other workers, which may have no part of the batch."""
    joint = [name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if joint:
        raise ConfigError(
            f"workload.factory: '{joint[0]}' is a SyncBatchNorm, whose statistics would depend on "
            "the number of workers; use BatchNorm, which sees one part of a batch at a time"
        )


def _refuse_lone_examples(job: JobConfig, workload: Workload, model: nn.Module) -> None:
    """Refuses batches of one example where BatchNorm, which needs two values, would see them."""
    has_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    if has_norm and job.prune.batchnorm_examples == 1:
        raise ConfigError(
            "prune.batchnorm_examples = 1: one example has no variance; give at least 2, better "
            "hundreds, or 0 to keep the statistics"
        )
    for section in ("pretrain", "finetune"):
        recipe: Recipe = getattr(job, section)
        size = min(recipe.batch_size, num_examples(workload.train))
        if recipe.epochs > 0 and size // min(recipe.microbatches, size) == 1:
            _refuse_lone_part(section, recipe, size, workload, model)


def _refuse_lone_part(
    section: str, recipe: Recipe, size: int, workload: Workload, model: nn.Module
) -> None:
    first = torch.zeros(1, dtype=torch.long)
    example, _ = take_batch(workload, workload.train, first, augment_seed=0)
    was_training = model.training
    model.train()
    try:
        # A trial, since a norm over images has many values even in one example.
        with torch.no_grad(), isolated(model, 0):
            model(example)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        remedy = f"set {section}.microbatches to {size // 2} or less" if size > 1 else "raise it"
        raise ConfigError(
            f"{section}.batch_size = {recipe.batch_size} with {section}.microbatches = "
            f"{recipe.microbatches}: cuts {size} example{'s' if size > 1 else ''} into parts of "
            f"one, and this model's BatchNorm needs two in training; {remedy}"
        ) from error
    finally:
        model.train(was_training)


def warn_of_unusual_weights(
    model: nn.Module, units: list[Prunable], workload: Workload, batch_size: int
) -> None:
    """Warns of weights that get no gradient, of embeddings, and of state that is not stored.

    Args:
        batch_size: Of the training examples that are tried.
    """
    total = sum(unit.parameter.numel() for unit in units)
    known: list[Prunable] = []
    for is_training, when in ((True, "in training"), (False, "in eval mode, where it is scored")):
        found = _find_idle(model, units, workload, batch_size, is_training=is_training)
        if idle := [unit for unit in found if unit not in known]:
            known += idle
            number = sum(unit.parameter.numel() for unit in idle)
            warnings.warn(
                f"prune: {_name_some(idle)} get{'s' if len(idle) == 1 else ''} no gradient from "
                f"{batch_size} examples {when}; {number:,} of {total:,} prunable weights, whose "
                "removal counts as sparsity; name in prune.exclude what no pass uses",
                stacklevel=2,
            )
    tables = {m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    if embedded := [unit for unit in units if unit.parameter in tables]:
        warnings.warn(
            f"prune: {_name_some(embedded)}, which a layer shares with an embedding, loses weights "
            "in both; name it in prune.exclude to keep it",
            stacklevel=2,
        )
    kept = tensor_state(model)
    if left_out := [f"'{name}'" for name in model.state_dict() if name not in kept]:
        warnings.warn(
            f"workload.factory: {name_some(left_out)} of the network's state is no "
            "tensor and is not stored with its weights; a network that they are loaded into has "
            "what build_model gives it",
            stacklevel=2,
        )


def _find_idle(
    model: nn.Module,
    units: list[Prunable],
    workload: Workload,
    batch_size: int,
    *,
    is_training: bool,
) -> list[Prunable]:
    """Finds what the loss of a batch does not depend on; frozen weights are passed over."""
    seen = [unit for unit in units if unit.parameter.requires_grad]
    # What fails here fails in training too, and says why there.
    with (
        suppress(Exception),
        in_mode(model, is_training=is_training),
        isolated(model, 0),
        torch.enable_grad(),
    ):
        indices = torch.arange(batch_size)
        inputs, targets = take_batch(workload, workload.train, indices, augment_seed=0)
        loss = workload.loss(model(inputs), targets)
        gradients = torch.autograd.grad(loss, [unit.parameter for unit in seen], allow_unused=True)
        return [unit for unit, found in zip(seen, gradients, strict=True) if found is None]
    return []


def _name_some(units: list[Prunable]) -> str:
    return name_some([f"'{unit.name}' ({unit.parameter.numel():,})" for unit in units])
