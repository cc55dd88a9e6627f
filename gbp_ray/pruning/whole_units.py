"""Whole units in a trial: which there are, which of them stay, and how the network follows.

A decision masks units first. Then, unless the job keeps them as zeros, they leave the network, and
later rounds train what is left. Masks, stored weights and the optimizer's stored state keep the
dense network's shapes, so that files mean the same in every round.

Shape suffixes: U = units of the dense network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.gathering import copy_unsharded
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import (
    add_over_ranks,
    copy_network,
    gather_whole,
    is_sharded,
    local,
    shard_like,
    shard_network,
)
from gbp_ray.errors import ConfigError, name_some
from gbp_ray.pruning.budget import (
    Bounds,
    UnitChoice,
    can_shrink,
    check_budget,
    count_cost,
    plan_budgets,
    select_units,
)
from gbp_ray.pruning.dimensions import check_uniform
from gbp_ray.pruning.graph.find import find_structure
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.removal.caches import Run
from gbp_ray.pruning.removal.comparison import observe
from gbp_ray.pruning.removal.cutting import (
    cut_state,
    expand_optimizer,
    expand_state,
    shrink_structure,
)
from gbp_ray.pruning.removal.fixed_groups import find_fixed_groups, without_groups
from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.pruning.scoring import on_few_examples
from gbp_ray.pruning.structure import Structure
from gbp_ray.pruning.unit_scores import score_units
from gbp_ray.pruning.units import Prunable, Survey, excluded_parameters
from gbp_ray.results.records import CostRecord, LayerRecord, UnitsRecord, WidthRecord
from gbp_ray.training.distillation import capture_outputs
from gbp_ray.training.passes import Macs
from gbp_ray.training.progress import OnProgress, ignore_progress
from gbp_ray.workloads.batch import Batch, forward, logits_of, map_tensors, size_of, tensors_in
from gbp_ray.workloads.checks import blaming_batch
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import first_example, take_batch

__all__ = [
    "COMPARED",
    "WholeUnits",
    "check_choice",
    "check_features",
    "check_removable",
    "few_of",
    "find_units",
    "passing",
    "scored_parameters",
    "structure_by",
    "survey_units",
    "units_by_batch",
]

COMPARED = 8
"""Examples on which the network without its removed units is compared with the masked one."""


def find_units(
    workload: Workload, model: nn.Module, prune: PruneConfig, batch: Batch | None = None
) -> Structure:
    """Finds the units of a network that a job may remove, by one example.

    Where units are to leave the network, some of each group leave a copy of it on trial. Groups
    that its code cannot go without are left out, and named in `Structure.frozen`.

    Args:
        model: Unsharded; on the meta device, too.
        batch: Examples to take in place of the first training ones.

    Raises:
        ConfigError: It has none of the kinds that the job names, or a glob matches nothing.
        PruneError: torch.export cannot follow it.
    """
    excluded = excluded_parameters(model, prune.exclude)
    if batch is None:
        example = first_example(workload)
    else:
        example = batch.part(slice(0, 1), size_of(batch.inputs))
    structure = structure_by(workload, model, example, excluded, prune.unit_kinds)
    if prune.compact and not any(parameter.is_meta for parameter in model.parameters()):
        # What the graph allows, the code of the network may not.
        if batch is None:
            batch = few_of(workload, next(model.parameters()).device)
        run = passing(workload, batch)
        fixed = find_fixed_groups(copy_network(model), structure, run)
        reasons = {number: why.partition(", and no number")[0] for number, why in fixed.items()}
        structure = without_groups(structure, reasons)
    if not structure.groups:
        why = [f"'{axis}' ({reason})" for axis, reason in structure.frozen.items()]
        raise ConfigError(
            f"prune.granularity = '{prune.granularity}': the network has no such units that can "
            f"go; fixed are {name_some(why, 3) or 'all of its axes'}; choose another granularity"
        )
    if prune.target.uniform:
        check_uniform(structure, {name: p.shape for name, p in model.named_parameters()})
    return structure


def structure_by(
    workload: Workload,
    model: nn.Module,
    example: Batch,
    excluded: Iterable[str] = (),
    kinds: Iterable[str] = ("channel", "head"),
) -> Structure:
    """Finds the groups of a network as the pass of an example shows them.

    Args:
        excluded: First names of parameters that no unit may lie in.

    Raises:
        PruneError: torch.export cannot follow it.
    """
    device = next(model.parameters()).device
    inputs = [tensor.to(device) for tensor in tensors_in(example.inputs)]

    def run(network: nn.Module, *tensors: Tensor) -> Sequence[Tensor]:
        given = iter(tensors)
        nest = map_tensors(example.inputs, lambda _: next(given))
        batch = Batch(nest, example.targets if example.is_pair else nest)
        return list(tensors_in(logits_of(forward(network, workload, batch))))

    return find_structure(model, inputs, run, excluded, kinds)


def check_removable(
    workload: Workload, model: nn.Module, structure: Structure, prune: PruneConfig, seed: int
) -> None:
    """Tries on a copy what a trial will do: score few examples, decide, remove.

    Raises:
        ConfigError: The target cannot be met, or a glob matches nothing.
        PruneError: Units cannot be scored or removed; names the layer.
    """
    everything = structure.everything
    check_budget(structure, prune, everything)
    ranks = Ranks(device=next(model.parameters()).device)
    if not prune.spec.needs_history:
        few = on_few_examples(prune)
        score_units(
            *(model, structure, everything, workload, few, ranks), seed=seed, must_be_finite=False
        )
    if prune.compact:
        units = WholeUnits(structure, prune)
        choice = units.choose(prune.rounds, np.arange(structure.num_units, dtype=np.float64))
        check_choice(workload, model, structure, choice.kept_U)


def check_choice(
    workload: Workload,
    model: nn.Module,
    structure: Structure,
    kept_U: np.ndarray,
    batch: Batch | None = None,
) -> None:
    """Removes units from a copy of a network, to learn if that is possible.

    Args:
        batch: Passed through it; by default the first training examples.

    Raises:
        PruneError: It is not; names the layer.
    """
    device = next(model.parameters()).device
    run = passing(workload, few_of(workload, device) if batch is None else batch)
    twin = copy_network(model)
    MaskSet(structure.masks(kept_U, [name for name, _ in model.named_parameters()])).apply_(twin)
    remove_units(twin, structure, kept_U, run)


def check_features(
    workload: Workload,
    model: nn.Module,
    structure: Structure,
    prune: PruneConfig,
    features: Sequence[str],
) -> None:
    """Refuses modules whose outputs lose units that leave, as the teacher's keep theirs.

    One unit of each group that may lose any leaves a copy of the network.

    Args:
        features: Names of modules, of `finetune.distillation`.

    Raises:
        ConfigError: The outputs of one get another shape.
    """
    kept_U = structure.everything
    kept_U[np.asarray(structure.bounds[:-1])[can_shrink(structure, Bounds.of(prune))]] = False
    run = passing(workload, few_of(workload, next(model.parameters()).device))
    twin = copy_network(model)
    MaskSet(structure.masks(kept_U, [name for name, _ in model.named_parameters()])).apply_(twin)
    before = _shapes_of(twin, run, features)
    remove_units(twin, structure, kept_U, run)
    after = _shapes_of(twin, run, features)
    for name in features:
        if before[name] != after[name]:
            raise ConfigError(
                f"finetune.distillation.features = '{name}': its outputs become narrower when "
                "units leave the network, and the teacher's do not; name modules whose outputs "
                "keep their shape, or set prune.compact to false"
            )


def _shapes_of(model: nn.Module, run: Run, names: Sequence[str]) -> dict[str, torch.Size]:
    with capture_outputs(model, names) as outputs:
        observe(model, run)
    return {name: output.shape for name, output in outputs.items()}


def scored_parameters(structure: Structure, model: nn.Module) -> list[Prunable]:
    """Lists the parameters that units lie in, biases and those of norms included."""
    return [
        Prunable(name, parameter, None)
        for name, parameter in sorted(model.named_parameters())
        if name in structure.shapes
    ]


class Removed(NamedTuple):
    """A network after units have left it, with what belongs to it."""

    model: nn.Module
    optimizer: Optimizer | None
    movement: dict[str, Tensor] | None
    difference: float


class WholeUnits:
    """The units of one trial on one rank; all ranks hold the same.

    Attributes:
        dense: The structure of the dense network.
        left: That of the network as it is.
        kept_U: bool, the units that the last decision kept.
        plan: The budget of each round.
    """

    def __init__(self, structure: Structure, prune: PruneConfig, kept_U: np.ndarray | None = None):
        self.dense = self.left = structure
        everything = structure.everything
        self.kept_U = everything if kept_U is None else kept_U
        self._present_U = everything
        self._prune = prune
        self.plan = plan_budgets(structure, prune, self.kept_U)

    @property
    def is_cut(self) -> bool:
        """Returns whether every unit that was removed has left the network."""
        return bool((self._present_U == self.kept_U).all())

    def is_due(self, number: int) -> bool:
        """Returns whether round `number` has to remove anything."""
        budget = self.plan[number - 1]
        return count_cost(self.dense, budget.kind, self.kept_U) > budget.limit

    def share_gone(self, number: int) -> float:
        """Returns the part of the dense network's cost that is to be gone after a round."""
        if number == 0:
            budget, left = self.plan[0], self.kept_U
            stays = float(count_cost(self.dense, budget.kind, left))
        else:
            budget = self.plan[number - 1]
            stays = budget.limit
        everything = self.dense.everything
        return 1 - stays / count_cost(self.dense, budget.kind, everything)

    def score(
        self,
        model: nn.Module,
        workload: Workload,
        ranks: Ranks,
        seed: int,
        number: int,
        movement: Mapping[str, Tensor] | None,
        on_progress: OnProgress = ignore_progress,
        batches: Sequence[Batch] | None = None,
    ) -> np.ndarray:
        """Scores the units of the network as it is, (U,); 0 for those that have left.

        Args:
            batches: As of `score_units`.
        """
        scores_U = np.zeros(self.dense.num_units)
        scores_U[self._present_U] = score_units(
            *(model, self.left, self.kept_U[self._present_U], workload, self._prune, ranks),
            seed=seed,
            round_number=number,
            movement=movement,
            on_progress=on_progress,
            batches=batches,
        )
        return scores_U

    def choose(self, number: int, scores_U: np.ndarray) -> UnitChoice:
        """Decides which units stay in round `number`."""
        bounds = Bounds.of(self._prune)
        budget = self.plan[number - 1]
        scope: Literal["global", "layer"] = "layer" if self._prune.scope == "layer" else "global"
        return select_units(self.dense, scores_U, self.kept_U, budget, scope=scope, bounds=bounds)

    def masks(self, model: nn.Module, kept_U: np.ndarray) -> MaskSet:
        """Makes the masks of the network as it is for the units that stay."""
        names = [name for name, _ in model.named_parameters()]
        return MaskSet(self.left.masks(kept_U[self._present_U], names))

    def dense_masks(self, kept_U: np.ndarray, before: MaskSet | None = None) -> MaskSet:
        """Makes the masks in the dense network's shapes, which are stored."""
        masks = self.dense.masks(kept_U, sorted(self.dense.bytes_per_weight))
        if before is None:
            return MaskSet(masks)
        return MaskSet(masks, before.round + 1, self._prune.criterion, before.digest)

    def remove(
        self,
        kept_U: np.ndarray,
        model: nn.Module,
        workload: Workload,
        ranks: Ranks,
        optimizer: Optimizer | None = None,
        movement: dict[str, Tensor] | None = None,
        make_optimizer: Callable[[nn.Module], Optimizer] | None = None,
    ) -> Removed:
        """Removes units from a masked network and from all that belongs to it.

        A network that is not sharded is changed in place. A sharded one is gathered on every rank,
        cut and sharded anew. Communicates then.

        Args:
            make_optimizer: Makes a fresh optimizer for the new network of a sharded one.

        Raises:
            PruneError: It cannot be cut, or computes something else then; names the layer.
        """
        run, stays = passing(workload, few_of(workload, ranks.device)), kept_U[self._present_U]
        if is_sharded(model):
            removed = self._remove_sharded(stays, model, run, ranks, optimizer, movement)
            if optimizer is not None:
                assert make_optimizer is not None
                removed = removed._replace(optimizer=make_optimizer(removed.model))
                self._fill_optimizer(stays, optimizer, model, removed)
        else:
            done = remove_units(
                model, self.left, stays, run, optimizer=optimizer, movement=movement
            )
            removed = Removed(model, optimizer, movement, done.difference)
        self.left = shrink_structure(self.left, stays)
        self._present_U = self.kept_U = kept_U
        return removed

    def _remove_sharded(
        self,
        stays: np.ndarray,
        model: nn.Module,
        run: Run,
        ranks: Ranks,
        optimizer: Optimizer | None,
        movement: dict[str, Tensor] | None,
    ) -> Removed:
        whole = copy_unsharded(model, ranks.device)
        difference = ranks.run_collectively(
            lambda: remove_units(whole, self.left, stays, run).difference
        )
        shard_network(whole, ranks.device, ranks.world_size)
        if movement is not None:
            by_name = dict(whole.named_parameters())
            movement = {
                name: shard_like(self._cut_whole(stays, name, value), by_name[name])
                for name, value in movement.items()
            }
        return Removed(whole, None, movement, difference)

    def _fill_optimizer(
        self, stays: np.ndarray, optimizer: Optimizer, model: nn.Module, removed: Removed
    ) -> None:
        """Gives the optimizer of a network that was sharded anew the state of the one before."""
        assert removed.optimizer is not None
        before = dict(model.named_parameters())
        for name, parameter in removed.model.named_parameters():
            own = {}
            for key, value in optimizer.state.get(before[name], {}).items():
                if isinstance(value, Tensor) and value.shape == before[name].shape and value.ndim:
                    value = shard_like(self._cut_whole(stays, name, value), parameter)
                own[key] = value
            if own:
                removed.optimizer.state[parameter] = own

    def _cut_whole(self, stays: np.ndarray, name: str, value: Tensor) -> Tensor:
        return cut_state(self.left, stays, {name: gather_whole(value)})[name]

    def cut(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Cuts tensors of dense shapes to those of the network as it is.

        Communicates where they are sharded.

        Args:
            state: By any name of a parameter or buffer.
        """
        if self._present_U.all():
            return dict(state)
        own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        own |= model.named_buffers(remove_duplicate=False)
        first: dict[Tensor, str] = {}
        for name, tensor in own.items():
            first.setdefault(tensor, name)
        cut = {}
        for name, tensor in state.items():
            # A tied tensor comes under each of its names, and is cut by the first.
            known = first[own[name]] if name in own else name
            found = cut_state(self.dense, self._present_U, {known: gather_whole(tensor)})[known]
            cut[name] = shard_like(found, own[name]) if name in own else found
        return cut

    def rows_left(self) -> dict[str, Tensor]:
        """Returns for the tensors that lost entries of their first axis, by name, which stay."""
        stays = self.dense.kept_positions(self._present_U)
        return {name: torch.from_numpy(axes[0]) for name, axes in stays.items() if 0 in axes}

    def expand(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Lays tensors out in dense shapes, zero where units have left."""
        return expand_state(self.dense, self._present_U, state)

    def expand_optimizer(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the optimizer's state dict in dense shapes."""
        return expand_optimizer(self.dense, self._present_U, model, optimizer)

    def prunable(self, model: nn.Module) -> list[Prunable]:
        """Lists the matrices that units lie in, as the network has them now."""
        return [
            Prunable(name, parameter, None)
            for name, parameter in sorted(model.named_parameters())
            if name in self.dense.shapes and parameter.ndim > 1
        ]

    def measure(self, model: nn.Module, macs: Macs, difference: float | None) -> CostRecord:
        """Measures size and multiply-adds, exact for units. Communicates where it is sharded."""
        dense = [group.num_units for group in self.dense.groups]
        widths = self.dense.widths(self.kept_U)
        by_name: dict[str, list[int]] = {}
        for product in self.dense.macs:
            sums = by_name.setdefault(product.name, [0, 0])
            sums[0] += product.value(dense)
            sums[1] += product.value(widths)
        total, left = (sum(sums[place] for sums in by_name.values()) for place in (0, 1))
        parameters = list(model.parameters())
        counted = [int(torch.count_nonzero(local(parameter))) for parameter in parameters]
        nonzero = dict(zip(parameters, add_over_ranks(counted, parameters), strict=True))
        everything = self.dense.everything
        num_bytes = self._count_bytes(model, everything)
        units = UnitsRecord(
            num_parameters=self.dense.count_weights(self.kept_U),
            macs=left,
            num_bytes=self._count_bytes(model, self.kept_U),
            is_compact=self._prune.compact and self.is_cut,
            difference=difference,
            widths=tuple(
                WidthRecord(name=group.name, kind=group.kind, num_units=before, num_kept=after)
                for group, before, after in zip(self.dense.groups, dense, widths, strict=True)
            ),
        )
        return CostRecord(
            num_parameters=self.dense.count_weights(everything),
            num_nonzero=sum(nonzero.values()),
            macs=total,
            macs_nonzero=left,
            macs_fault="" if total else macs.fault,
            num_bytes=num_bytes,
            num_bytes_sparse=units.num_bytes,
            layers=tuple(
                LayerRecord(
                    name=unit.name,
                    shape=self.dense.shapes[unit.name],
                    num_weights=math.prod(self.dense.shapes[unit.name]),
                    num_nonzero=nonzero[unit.parameter],
                    macs=by_name.get(unit.name, [0, 0])[0],
                    macs_nonzero=by_name.get(unit.name, [0, 0])[1],
                )
                for unit in self.prunable(model)
            ),
            unpruned=unpruned_matrices(self.dense, model),
            units=units,
        )

    def _count_bytes(self, model: nn.Module, kept_U: np.ndarray) -> int:
        """Counts the bytes of all parameters of the dense network with so many units."""
        stays = self.dense.kept_positions(kept_U)
        total = 0
        for name, tensor in model.named_parameters():
            lengths = list(self.dense.shapes.get(name, tensor.shape))
            for dim, kept in stays.get(name, {}).items():
                lengths[dim] = int(kept.sum())
            total += math.prod(lengths) * tensor.element_size()
        return total


def survey_units(structure: Structure, model: nn.Module) -> Survey:
    """Returns what `units.survey` does, of whole units: biases and norms are among them."""
    return Survey(scored_parameters(structure, model), unpruned_matrices(structure, model))


def unpruned_matrices(structure: Structure, model: nn.Module) -> dict[str, tuple[int, str]]:
    """Says of matrices in which no unit lies their size, and why, where it is known."""

    def explain(name: str) -> str:
        reasons = (w for axis, w in structure.frozen.items() if axis.startswith(f"{name}["))
        return next(reasons, "no units lie in it")

    return {
        name: (parameter.numel(), explain(name))
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.numel() and name not in structure.shapes
    }


def few_of(workload: Workload, device: torch.device) -> Batch:
    """Takes the first training examples, on which networks are compared."""
    few = torch.arange(min(COMPARED, num_examples(workload.train)))
    return take_batch(workload, workload.train, few, device=device)


def passing(workload: Workload, batch: Batch) -> Run:
    """Returns what passes a batch through a network."""

    def run(network: nn.Module) -> Any:
        return logits_of(forward(network, workload, batch))

    return run


def units_by_batch(
    model: nn.Module,
    workload: Workload,
    prune: PruneConfig,
    num_rounds: int,
    batch: Batch,
    masks: MaskSet,
    ranks: Ranks,
) -> WholeUnits:
    """Finds units by a batch, that of the first rank, and tries if they can go. Communicates.

    Args:
        num_rounds: In all; more than a job may have, too.
        masks: Of a training that goes on; empty for none. The plan is that of the dense network.

    Raises:
        GbpError: As `find_units` and `check_choice`; or the batch does not suit the network.
    """
    batch = batch.part(slice(0, COMPARED), size_of(batch.inputs))
    batch = ranks.broadcast_object(batch.map(lambda tensor: tensor.cpu()))
    batch = batch.map(lambda tensor: tensor.to(ranks.device))
    planned = prune.model_copy(update={"rounds": num_rounds})

    def find() -> WholeUnits:
        with blaming_batch(batch):
            observe(model, passing(workload, batch))
        structure = find_units(workload, model, prune, batch)
        whole = WholeUnits(structure, planned)
        check_budget(structure, planned, whole.kept_U)
        whole.kept_U = structure.units_in(masks.to(torch.device("cpu")))
        if prune.compact:
            ranked_U = np.arange(structure.num_units, dtype=np.float64)
            kept_U = whole.choose(num_rounds, ranked_U).kept_U
            check_choice(workload, model, structure, kept_U, batch)
        return whole

    return ranks.run_collectively(find)
