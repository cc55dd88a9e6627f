"""Pruning of a network in memory, without a job, storage or Ray: score, select, both at once.

    masks = gbp_ray.prune_model(model, loader, sparsity=0.8, criterion="taylor")

The functions are those of a job, so the masks are, too: to the bit those of the first round of a
job with the same settings. Where torch.distributed is initialised, every rank must call them with
the same network and data, and all get the masks that one process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.prune import UNIT_KINDS, PruneConfig
from gbp_ray.distributed.agreement import (
    check_same_start,
    fingerprints_of_data,
    fingerprints_of_network,
)
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import is_sharded
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning import scoring
from gbp_ray.pruning.arguments import (
    Loss,
    as_in_a_job,
    buffers_of_first,
    check_reached,
    check_same_replicas,
    check_whole,
    check_whole_network,
    config_of,
    keeping_gradients,
    make_workload,
    network_in,
    reword_reasons,
)
from gbp_ray.pruning.budget import check_budget
from gbp_ray.pruning.checkpoint import shard_masks
from gbp_ray.pruning.checks import warn_of_unusual_weights
from gbp_ray.pruning.criteria import criterion as find_criterion
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.reconstruction import check_reconstruction, reconstruct
from gbp_ray.pruning.removal.comparison import observe
from gbp_ray.pruning.selection import (
    check_reachable,
    check_selectable,
    check_units,
    select_masks,
)
from gbp_ray.pruning.structure import Structure
from gbp_ray.pruning.units import (
    Prunable,
    SlicedScores,
    Survey,
    num_to_prune,
    survey,
)
from gbp_ray.pruning.whole_units import (
    WholeUnits,
    check_choice,
    few_of,
    find_units,
    passing,
    survey_units,
)
from gbp_ray.training.network import copy_frozen, unused_on_all
from gbp_ray.workloads.batch import kind_of
from gbp_ray.workloads.checks import Checked, blaming_batch, check_workload
from gbp_ray.workloads.contract import Workload

__all__ = ["Scores", "prune_model", "score", "select"]


class Scores(dict[str, Tensor]):
    """Scores by parameter name, float32 on the CPU and shaped like the weights; the lowest go.

    Attributes:
        criterion: That made them.
        units: The parameters that were scored.
        unpruned: As of `MaskSet`.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        criterion: str,
        units: Iterable[Prunable],
        unpruned: Mapping[str, tuple[int, str]],
    ) -> None:
        super().__init__(scores)
        self.criterion, self.unpruned = criterion, unpruned
        self.input_dims: dict[str, int | None] = {unit.name: unit.input_dim for unit in units}
        self.num_groups = {unit.name: unit.num_groups for unit in units}

    def __repr__(self) -> str:
        number = sum(values.numel() for values in self.values())
        return f"<Scores of {number:,} weights in {len(self)} tensors by {self.criterion}>"


def prune_model(
    model: nn.Module,
    data: Any = None,
    *,
    sparsity: float | None = None,
    target: Mapping[str, float] | None = None,
    criterion: str = "taylor",
    loss: Loss = functional.cross_entropy,
    scope: str = "global",
    granularity: str = "weight",
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    masks: MaskSet | None = None,
    reconstruct: str = "none",
    calibration_examples: int = 512,
    calibration_batch_size: int = 64,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    count: Callable[[Any], float | Tensor] | None = None,
    seed: int = 0,
    num_threads: int = 1,
    **fields: Any,
) -> MaskSet:
    """Sets the weights with the lowest scores to zero, in place, and returns the masks.

    Whole units (channels, heads) go with all that is coupled to them; `gbp_ray.compact` then takes
    them out of the network. Training mode, gradients, buffers and `requires_grad` are as before.
    Kept weights are, too, unless `reconstruct` refits them. Communicates where torch.distributed is
    initialised.

    Args:
        model: On any one device, also wrapped by DDP or `torch.compile`, or sharded by FSDP2 over
            all ranks; names are those of the network inside. Of a sharded one layers that no pass
            reaches are not found and left out; name them in `exclude`. Whole units and
            `reconstruct` need it in one piece.
        data: What a split of a `Workload` may be: `(inputs, targets)`, a map-style dataset, or a
            DataLoader, of which only dataset and collate function are used. Criteria that read no
            data need none without `reconstruct`; whole units are found by an example.
        sparsity: Zero / prunable weights afterwards, in [0, 1); of whole units removed / all.
        target: In its place, for whole units: what stays, {"macs": 0.5}, or "parameters" or
            "bytes"; up to 1 a part of the dense network's, above a number. Never exceeded.
        criterion: See `gbp-ray criteria`, or your own as "module:attr"; not movement, which
            `Pruner` gathers in training.
        loss: `(outputs, targets) -> scalar`, a mean; see `Workload`, as for `forward`, `collate`
            and `count`.
        scope: "global", "layer" or "row".
        granularity: "weight", "n:m"; or "channel", "head", "channel+head".
        exclude: Name globs of parameters that are not pruned.
        include: Name globs of others that are, such as embeddings and recurrent weights.
        masks: From an earlier call: what is pruned stays so and counts towards the sparsity.
        reconstruct: "least_squares" then refits the kept weights of linear layers and convolutions
            to the outputs that the network has when it is given, masks or not, on the calibration
            examples; "sparsegpt" and "sparsegpt_least_squares" also choose them anew, as many in
            each layer; see `gbp-ray fields prune`. They read no targets.
        calibration_examples: How many examples the seed draws to score and refit on.
        num_threads: CPU threads, on which the order of additions depends; jobs take 1 by default.
        fields: `layer_min_sparsity`, `layer_max_sparsity` and `hutchinson_probes` of a job; of
            `reconstruct`, obs and kfac `reconstruct_damping` and `reconstruct_positions`; of
            `reconstruct` also `reconstruct_relu_steps`; for whole units `round_to`, `min_width`,
            `unit_score`, and `compact=False`, which allows units that only masks can remove, as
            `gbp_ray.compact` would fail on them.

    Returns:
        The masks; `unpruned` names the weight matrices that were left alone, and why.

    Raises:
        GbpError: One line that names the argument, what is allowed and what to do.
    """
    with as_in_a_job(num_threads):
        config = config_of(
            fields,
            sparsity=sparsity,
            target=target,
            reconstruct=reconstruct,
            criterion=criterion,
            scope=scope,
            granularity=granularity,
            exclude=exclude,
            include=include,
            calibration_examples=calibration_examples,
            calibration_batch_size=calibration_batch_size,
        )
        task = _prepare(model, data, config, seed, loss, forward, collate, count)
        prune = _prune_weights if task.structure is None else _prune_units
        with buffers_of_first(task.model, task.ranks):
            return replace(prune(task, masks), unpruned=task.unpruned)


def score(
    model: nn.Module,
    data: Any = None,
    *,
    criterion: str = "taylor",
    loss: Loss = functional.cross_entropy,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    calibration_examples: int = 512,
    calibration_batch_size: int = 64,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    count: Callable[[Any], float | Tensor] | None = None,
    seed: int = 0,
    num_threads: int = 1,
    **fields: Any,
) -> Scores:
    """Scores every prunable weight and changes nothing; arguments as for `prune_model`.

    Whole units are scored and chosen at once, by `prune_model`.

    Returns:
        float32 tensors on the CPU by parameter name, for `select`.
    """
    with as_in_a_job(num_threads):
        _refuse_units("score", fields.get("granularity"))
        config = config_of(
            fields,
            sparsity=0.0,
            criterion=criterion,
            exclude=exclude,
            include=include,
            calibration_examples=calibration_examples,
            calibration_batch_size=calibration_batch_size,
        )
        task = _prepare(model, data, config, seed, loss, forward, collate, count)
        with buffers_of_first(task.model, task.ranks):
            scores = task.score(1).gather(task.ranks)
        return Scores(scores, criterion, task.units, task.unpruned)


def select(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float,
    scope: str = "global",
    granularity: str = "weight",
    masks: MaskSet | None = None,
    **fields: Any,
) -> MaskSet:
    """Chooses the weights with the lowest scores; `masks.apply_(model)` sets them to zero.

    Communicates nothing.

    Args:
        scores: From `score`, or any tensors by name. Groups of n:m run along the inputs of what
            `score` gave; in other mappings along axis 1.
        masks: As for `prune_model`, as are the others.

    Raises:
        GbpError: As for `prune_model`.
    """
    with as_in_a_job(torch.get_num_threads()):
        _refuse_units("select", granularity)
        if not isinstance(scores, Mapping) or not scores:
            raise ConfigError(
                f"scores: must be tensors by parameter name, as score() gives, not "
                f"{kind_of(scores)}"
            )
        for name, values in scores.items():
            is_fit = isinstance(values, Tensor) and values.is_floating_point()
            is_fit = is_fit and values.layout is torch.strided and not values.is_meta
            if not is_fit or not isinstance(name, str):
                raise ConfigError(
                    f"scores: {name!r} is {kind_of(values)}; give dense tensors of floating point "
                    "by parameter name"
                )
            if number := int((~torch.isfinite(values)).sum()):
                raise PruneError(
                    f"scores of '{name}': {number} are NaN or infinite, which have no order; "
                    "replace them"
                )
        if not isinstance(scores, Scores):
            scores = Scores(scores, "given scores", (), {})
        # The scores are made; any criterion stands for the one that made them.
        config = config_of(
            fields, sparsity=sparsity, criterion="magnitude", scope=scope, granularity=granularity
        )
        dense = {name: torch.ones_like(v, dtype=torch.bool) for name, v in scores.items()}
        before = _checked_masks(masks, MaskSet(dense), config)
        shapes = {name: tuple(values.shape) for name, values in scores.items()}
        check_selectable(shapes, config, scores.input_dims, scores.num_groups)
        check_reachable(shapes, config)
        found = select_masks(scores, before, config, sparsity, scores.input_dims).masks
        return replace(found, criterion=scores.criterion, unpruned=scores.unpruned)


# -- the parts -------------------------------------------------------------------------------------


def _refuse_units(function: str, granularity: object) -> None:
    if granularity in UNIT_KINDS:
        raise ConfigError(
            f"granularity = '{granularity}': {function}() is of single weights, as the choice of "
            "whole units needs their cost in the network; use prune_model, on a copy of a network "
            "that is to stay as it is"
        )


def _prune_weights(task: _Task, masks: MaskSet | None) -> MaskSet:
    """Chooses single weights and sets them to zero; see `prune_model`."""
    config = task.config
    before = _checked_masks(masks, MaskSet.dense(task.units), config)
    check_units(task.units, config)
    dense = task.copy_dense()
    if masks is not None:
        before.apply_(task.model)
        before = shard_masks(before, task.model)
    scores = task.score(before.round + 1)
    removal = select_masks(scores, before, config, config.sparsity, task.input_dims, task.ranks)
    task.ranks.check_agreement(removal.masks.digest, "the mask")
    removal.masks.apply_(task.model)
    return task.refit(dense, removal.masks, before)


def _prune_units(task: _Task, masks: MaskSet | None) -> MaskSet:
    """Chooses whole units and sets them to zero; see `prune_model`."""
    model, config, ranks, structure = task.model, task.config, task.ranks, task.structure
    assert structure is not None
    kept_U: np.ndarray | None = None
    if masks is not None:
        before = _as_masks(masks).to(torch.device("cpu"))
        kept_U = structure.units_in(before)
    whole = WholeUnits(structure, config, kept_U)
    if masks is None:
        before = whole.dense_masks(whole.kept_U)
    check_budget(structure, config, whole.kept_U)
    dense = task.copy_dense()
    before.apply_(model)
    with keeping_gradients(model):
        scores_U = whole.score(
            *(model, task.workload, ranks, task.seed, before.round + 1), movement=None
        )
    choice = whole.choose(1, scores_U)
    if config.compact:
        ranks.run_collectively(lambda: check_choice(task.workload, model, structure, choice.kept_U))
    found = whole.dense_masks(choice.kept_U, before)
    ranks.check_agreement(found.digest, "the mask")
    found.apply_(model)
    return task.refit(dense, found.to(ranks.device), before)


def _as_masks(masks: object) -> MaskSet:
    if not isinstance(masks, MaskSet):
        raise ConfigError(f"masks: must be a MaskSet, as prune_model returns, not {kind_of(masks)}")
    return masks


def _checked_masks(masks: MaskSet | None, dense: MaskSet, config: PruneConfig) -> MaskSet:
    if masks is None:
        return dense
    _as_masks(masks)
    if config.pattern is not None:
        raise ConfigError(
            f'masks with granularity = "{config.granularity}": leave no whole groups to choose '
            'from; leave them out, or set granularity to "weight"'
        )
    dense.check_alike(masks)
    if num_to_prune(config.sparsity, masks.num_units) < masks.num_pruned:
        raise ConfigError(
            f"sparsity = {config.sparsity:g}: is below the {masks.sparsity:.4f} of masks, and "
            "masks only ever remove; raise it"
        )
    device = next(iter(dense.values())).device
    return masks.to(device)


@dataclass(frozen=True)
class _Task:
    """A network in memory and what its weights are scored on."""

    model: nn.Module
    found: Survey
    workload: Workload
    config: PruneConfig
    ranks: Ranks
    seed: int
    structure: Structure | None = None

    @property
    def units(self) -> list[Prunable]:
        return self.found.units

    @property
    def unpruned(self) -> dict[str, tuple[int, str]]:
        return reword_reasons(self.found.unpruned)

    @property
    def input_dims(self) -> dict[str, int | None]:
        return {unit.name: unit.input_dim for unit in self.units}

    def score(self, round_number: int) -> SlicedScores:
        with keeping_gradients(self.model):
            return scoring.score(
                self.model,
                self.units,
                self.workload,
                self.config,
                self.ranks,
                seed=self.seed,
                round_number=round_number,
            )

    def copy_dense(self) -> nn.Module | None:
        """Copies the network as it is given if weights are refitted to its outputs."""
        return None if self.config.reconstruct == "none" else copy_frozen(self.model)

    def refit(self, dense: nn.Module | None, masks: MaskSet, before: MaskSet) -> MaskSet:
        """Refits kept weights to the outputs of `dense`, or puts its weights back. Communicates.

        Returns:
            The masks, or those that took their place.
        """
        if dense is None:
            return masks
        given = dict(dense.named_parameters())
        try:
            chosen = reconstruct(
                *(self.model, dense, self.workload, self.config, self.ranks),
                masks=masks,
                masks_before=before,
                kept_rows={},
                dense_weights=given,
                seed=self.seed,
            )
        except BaseException:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(given[name])
            raise
        masks = replace(masks, masks={**masks, **chosen})
        self.ranks.check_agreement(masks.digest, "the mask")
        return masks


def _prepare(
    model: nn.Module,
    data: Any,
    config: PruneConfig,
    seed: int,
    *functions: Any,
) -> _Task:
    """Checks network, data and loss; see `prune_model`. Communicates."""
    check_whole("seed", seed, 0)
    plain = network_in(model)
    rule = find_criterion(config.criterion)
    if rule.spec.needs_history:
        raise ConfigError(
            f"criterion = {config.criterion}: is gathered while training; use gbp_ray.Pruner in "
            "your training loop, or another criterion"
        )
    if config.unit_kinds:
        why = "finds units by passing an example through the network"
        _check_fit(plain, data, f"granularity = '{config.granularity}'", why)
    if is_refitted := config.reconstruct != "none":
        why = "refits weights on examples"
        _check_fit(plain, data, f"reconstruct = '{config.reconstruct}'", why)
    ranks = Ranks.current(next(plain.parameters()).device)
    workload = make_workload(plain, data, *functions)
    start = fingerprints_of_network(plain, is_blank=False)
    checked: Checked | None = None
    unused: frozenset[str] = frozenset()
    is_scored_on_data = rule.spec.needs_data or rule.of_network is not None
    if is_scored_on_data:
        if data is None:
            raise ConfigError(
                f"data: criterion = {config.criterion} reads examples; give (inputs, targets), a "
                "dataset or a DataLoader"
            )
        # Of a sharded network a pass without its backward pass would leave weights gathered.
        if not is_sharded(plain):
            size = min(8, config.calibration_batch_size)
            checked = ranks.run_collectively(lambda: _check_data(workload, plain, size))
    elif is_refitted:
        ranks.run_collectively(lambda: _check_passes(workload, plain))
    if ranks.world_size > 1 and (is_scored_on_data or is_refitted):
        start |= fingerprints_of_data(replace(workload, test=None))
    check_same_start(ranks, start)
    check_same_replicas(plain, ranks)
    if is_refitted:
        ranks.run_collectively(lambda: check_reconstruction(plain, workload, config))
    structure: Structure | None = None
    if config.unit_kinds:
        if checked is None and not is_refitted:
            ranks.run_collectively(lambda: _check_passes(workload, plain))
        structure = ranks.run_collectively(lambda: find_units(workload, plain, config))
        found = survey_units(structure, plain)
    else:
        if data is not None and not is_sharded(plain):
            unused = unused_on_all(workload, plain, ranks)
        found = survey(plain, config.exclude, config.include, unused)
    if checked is not None:
        check_reached(found.units, checked.unreached)
        warn_of_unusual_weights(checked, found)
    return _Task(plain, found, workload, config, ranks, seed, structure)


def _check_fit(model: nn.Module, data: Any, named: str, why: str) -> None:
    """Refuses sharded networks, and to go on without data, for what an argument asks."""
    check_whole_network(model, named)
    if data is None:
        raise ConfigError(f"data: {named} {why}; give (inputs, targets), a dataset or a DataLoader")


def _check_passes(workload: Workload, model: nn.Module) -> None:
    """Raises WorkloadError where examples do not suit a network that is not scored on them."""
    batch = few_of(workload, next(model.parameters()).device)
    with blaming_batch(batch):
        observe(model, passing(workload, batch))


def _check_data(workload: Workload, model: nn.Module, size: int) -> Checked:
    with isolated(model, 0):
        return check_workload(workload, model, size)
