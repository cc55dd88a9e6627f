"""How large what a job moves is: the letters of `phases`, for one network, job and workload."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gbp_ray.config.job import JobConfig
from gbp_ray.config.training import Recipe
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import cut_rows, group_parameters
from gbp_ray.distributed.sums import largest_exchange
from gbp_ray.pruning.criteria import criterion
from gbp_ray.pruning.units import Layout, prunable_parameters
from gbp_ray.training.adversarial import num_attacked
from gbp_ray.training.distillation import answer_bytes, is_taught_once
from gbp_ray.training.optimizer import num_steps, trainable_parameters
from gbp_ray.workloads.contract import Workload, judged_split, num_examples
from gbp_ray.workloads.weights import tensor_state

__all__ = [
    "Sizes",
    "bytes_of",
]


class Sizes:
    """The letters of the docstring of `phases`, for one job."""

    def __init__(
        self, job: JobConfig, workload: Workload, model: nn.Module, *, is_blank: bool
    ) -> None:
        self.job, self.workload = job, workload
        units = prunable_parameters(model, job.prune.exclude)
        self.world_size = max(1, job.cluster.max_workers)
        self.num_layers = len(units)
        self.num_prunable = sum(unit.parameter.numel() for unit in units)
        self.largest_layer = max(unit.parameter.numel() for unit in units)
        layout = Layout(units, Ranks(0, self.world_size))
        self.stretch = max(stop - start for start, stop in pairwise(layout.bounds))
        dtype = reduce(torch.promote_types, (unit.parameter.dtype for unit in units))
        self.weight_bytes = dtype.itemsize
        self.model_bytes = sum(map(bytes_of, (*model.parameters(), *model.buffers())))
        self.buffer_bytes = sum(map(bytes_of, model.buffers()))
        self._trained = {
            freeze: _Trained.of(model, freeze, self.world_size)
            for freeze in (job.pretrain.freeze, job.finetune.freeze)
        }
        scored = {unit.name: unit.parameter for unit in units}
        self.bucket_bytes, self.sent_in_scoring = largest_exchange(scored, self.world_size)
        self.layer_rows = sum(
            max(pieces[number].size for pieces in layout.by_rank) * unit.parameter.element_size()
            for number, unit in enumerate(units)
        )
        # A change of each buffer, of each counter one, and the loss.
        changes = sum(b.numel() if b.is_floating_point() else 1 for b in model.buffers())
        self.beside_bytes = 4 * (changes + 1)
        self.num_passes = criterion(job.prune.criterion).spec.num_passes
        self.statistic_elements = sum(
            statistic.numel()
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for statistic in (module.running_mean, module.running_var)
            if statistic is not None
        )
        self.state_bytes = sum(map(bytes_of, tensor_state(model).values()))
        self.pretrain_steps = num_steps(job.pretrain, workload, job.pretrain.epochs)
        self.finetune_steps = num_steps(job.finetune, workload, job.finetune.epochs)
        self.has_teacher = self.finetune_steps > 0 and job.finetune.distillation.is_on
        self.answer_bytes = 0
        if self.has_teacher and is_taught_once(job, workload, model):
            self.answer_bytes = answer_bytes(workload, model)
        available = num_examples(workload.train)
        self.num_judged = num_examples(getattr(workload, judged_split(workload)))
        self.calibration_examples = min(job.prune.calibration_examples, available)
        self.norm_examples = min(job.prune.batchnorm_examples, available)
        self.largest_rows = max(
            pieces[number].size for pieces in layout.by_rank for number in range(len(units))
        )
        self.shards = _Shards.of(model, self.world_size, is_blank=is_blank)

    def trained(self, recipe: Recipe) -> _Trained:
        """Looks up what a recipe trains."""
        return self._trained[recipe.freeze]

    def rows_of(self, num_bytes: int, recipe: Recipe) -> int:
        """Computes what a rank holds of something shaped like the parameters a recipe trains."""
        trained = self.trained(recipe)
        return num_bytes * trained.rows // max(1, trained.num_bytes)

    def optimizer_bytes(self, recipe: Recipe) -> int:
        """Computes what a recipe's optimizer keeps of the whole network."""
        num_bytes = self.trained(recipe).num_bytes
        if recipe.optimizer == "sgd":
            return num_bytes if recipe.momentum > 0 else 0
        return 2 * num_bytes

    @property
    def kept_optimizer_bytes(self) -> int:
        """What the optimizer of the fine-tuning keeps of the whole network."""
        return self.optimizer_bytes(self.job.finetune) if self.finetune_steps else 0

    @property
    def movement_bytes(self) -> int:
        """What movement has gathered, of the whole network."""
        return 8 * self.num_prunable if self.job.prune.spec.needs_history else 0

    @property
    def attacked(self) -> int:
        """Counts the examples of a batch under attack."""
        total = num_attacked(self.workload, self.job.attack)
        return min(self.job.workload.eval_batch_size, total)

    def part_size(self, recipe: Recipe) -> int:
        """Counts the examples of the largest part of a batch."""
        size = min(recipe.batch_size, num_examples(self.workload.train))
        return -(-size // min(recipe.microbatches, size))

    def num_turns(self, num_items: int) -> int:
        """Counts the turns that all ranks need for so many batches or parts."""
        return -(-num_items // self.world_size)

    def sent_share(self, num_bytes: int) -> int:
        """Computes what a rank sends when each has a share of so many bytes for every other."""
        return (self.world_size - 1) * -(-num_bytes // self.world_size)

    def stored_bytes(self, *, has_optimizer: bool) -> int:
        """Computes what one round writes, over all ranks."""
        kept = self.kept_optimizer_bytes if has_optimizer else 0
        # Shards hold the weights beside the file that anyone loads.
        copies = 2 if self.job.cluster.strategy == "fsdp" else 1
        return copies * self.state_bytes + self.num_prunable // 8 + kept + self.movement_bytes


def bytes_of(value: Any) -> int:
    """Counts what a tensor or an array takes of memory; 0 for anything else."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    # A memory map is the page cache's to hold.
    is_held = isinstance(value, np.ndarray) and not isinstance(value, np.memmap)
    return value.nbytes if is_held else 0


@dataclass(frozen=True)
class _Trained:
    """What a training moves, in bytes.

    Attributes:
        num_bytes: T.
        rows: t.
        largest_bytes: The largest parameter.
        sent_bytes: Gradients on their way at a time.
    """

    num_bytes: int
    rows: int
    largest_bytes: int
    sent_bytes: int

    @classmethod
    def of(cls, model: nn.Module, freeze: tuple[str, ...], world_size: int) -> _Trained:
        named = trainable_parameters(model, freeze)
        trained = list(named.values())
        return cls(
            num_bytes=sum(map(bytes_of, trained)),
            rows=sum(cut_rows("", p.shape, world_size)[0].size * p.element_size() for p in trained),
            largest_bytes=max(map(bytes_of, trained), default=0),
            sent_bytes=largest_exchange(named, world_size)[1],
        )


@dataclass(frozen=True)
class _Shards:
    """What a network is where it is sharded, in bytes on one rank.

    Attributes:
        model_bytes: p + B.
        gathered_bytes: R + 3 G.
        largest_layer_bytes: The largest module's own parameters and buffers, whole.
        largest_tensor_bytes: The largest parameter, whole.
        sent_by_gathering: What this rank sends while all weights are gathered once.
        is_blank: Whether the network is built on the meta device.
    """

    model_bytes: int
    gathered_bytes: int
    largest_layer_bytes: int
    largest_tensor_bytes: int
    sent_by_gathering: int
    is_blank: bool

    @classmethod
    def of(cls, model: nn.Module, world_size: int, *, is_blank: bool) -> _Shards:
        def own_bytes(tensors: Iterable[Tensor]) -> int:
            return sum(map(bytes_of, tensors))

        rows = sum(
            cut_rows("", p.shape, world_size)[0].size * p.element_size() for p in model.parameters()
        )
        *inner, outer = (own_bytes(group) for group in group_parameters(model))
        return cls(
            model_bytes=rows + own_bytes(model.buffers()),
            gathered_bytes=outer + 3 * max(inner, default=0) if inner else 2 * outer,
            largest_layer_bytes=max(
                own_bytes(chain(m.parameters(recurse=False), m.buffers(recurse=False)))
                for m in model.modules()
            ),
            largest_tensor_bytes=max(map(bytes_of, model.parameters())),
            sent_by_gathering=(world_size - 1) * rows,
            is_blank=is_blank,
        )
