"""Pruning while a training loop of one's own runs: decides when it is due, and keeps zeros zero.

    pruner = gbp_ray.Pruner(model, sparsity=0.9, end=1000, every=100, optimizer=optimizer)
    for batch in loader:
        ...  # forward, backward
        optimizer.step()
        pruner.step(batch)

A decision is that of a job's round, on the batches that `step` is given in place of calibration
examples, at the weights of that moment. With W ranks (torch.distributed, under DDP, FSDP2 or what
is built on them) the statistic of each rank's k-th batch is item k * W + rank of one sum in that
order, so one process that calls `step` with the same batches in that order gets the same mask, to
the bit. In the forward passes all ranks have the buffers of rank 0, as under DDP.

Whole units (granularity "channel", "head", "channel+head") are found at the first step, by an
example of its batch. They stay in the network as zeros while it is trained; `Pruner.compact` takes
them out at the end.

Shape suffixes: U = units of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from gbp_ray.config.prune import sparsity_schedule
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import (
    adopt_sharded,
    gather_whole,
    is_sharded,
    local,
    shard_like,
)
from gbp_ray.errors import ConfigError, PruneError, WorkloadError
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
    optimizer_in,
    reword_reasons,
)
from gbp_ray.pruning.checkpoint import shard_masks
from gbp_ray.pruning.checks import warn_of_unusual_weights
from gbp_ray.pruning.compact_in_memory import CompactResult, compact_model
from gbp_ray.pruning.criteria import criterion as find_criterion
from gbp_ray.pruning.masks import MaskSet, forget_pruned
from gbp_ray.pruning.selection import check_units, select_masks
from gbp_ray.pruning.statistics import movement_statistic
from gbp_ray.pruning.units import Prunable, SlicedScores, Survey, num_to_prune, survey
from gbp_ray.pruning.whole_units import (
    WholeUnits,
    survey_units,
    units_by_batch,
)
from gbp_ray.workloads.batch import Batch, forward, kind_of, size_of
from gbp_ray.workloads.checks import (
    Checked,
    blaming_batch,
    check_labels,
    check_scalar,
    find_unreached,
)
from gbp_ray.workloads.contract import in_mode
from gbp_ray.workloads.losses import batch_loss, mean_loss
from gbp_ray.workloads.means import check_means

__all__ = ["Pruner"]

_FORMAT = 1


class Pruner:
    """Prunes a network step by step while it is trained elsewhere.

    Layers that no pass reaches are pruned like others, unlike in a job, but warned of at the first
    step (not of a sharded network); name them in `exclude`.

    Rounds are after steps start + every, start + 2 * every and so on, the last after step `end`;
    the sparsity after each is that of a job with as many rounds.

    Args:
        model: As for `prune_model`; wrap, shard and move it first. Every rank makes a pruner.
        sparsity: Zero / prunable weights after step `end`; of whole units removed / all.
        target: In its place, for whole units; as for `prune_model`.
        end: The step after which the sparsity is reached; steps are calls of `step`.
        start: The step after which pruning begins.
        every: Steps from one round to the next.
        schedule: "cubic", "linear", "geometric" or "one_shot"; see `sparsity_schedule`.
        criterion: See `gbp-ray criteria`. Of one that reads no data, `step` needs no batch.
            movement is gathered from the gradients that `optimizer` is given.
        optimizer: Of the same parameters; gradients of pruned weights are set to zero before its
            steps, and its state for them when they are pruned. Without one, momentum moves pruned
            weights, and `step` sets them back to zero.
        loss: `(outputs, targets) -> scalar`, a mean; `forward` and `count` as in `Workload`.
        fields: As for `prune_model`, as are the others.

    Attributes:
        num_steps: Calls of `step` so far.
        masks: Of the last round; sharded where the network is. Of whole units none before the
            first step.
        sparsity: Reached so far, as in `sparsity` above.

    Raises:
        GbpError: One line that names the argument, what is allowed and what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float | None = None,
        target: Mapping[str, float] | None = None,
        end: int,
        start: int = 0,
        every: int = 1,
        schedule: str = "cubic",
        criterion: str = "taylor",
        optimizer: Optimizer | None = None,
        loss: Loss = functional.cross_entropy,
        scope: str = "global",
        granularity: str = "weight",
        exclude: Iterable[str] = (),
        include: Iterable[str] = (),
        forward: Callable[[nn.Module, Any], Any] | None = None,
        count: Callable[[Any], float | Tensor] | None = None,
        seed: int = 0,
        num_threads: int = 1,
        **fields: Any,
    ) -> None:
        with as_in_a_job(num_threads, "batch"):
            self._config = config_of(
                fields,
                sparsity=sparsity,
                target=target,
                schedule=schedule,
                criterion=criterion,
                scope=scope,
                granularity=granularity,
                exclude=exclude,
                include=include,
            )
            check_whole("seed", seed, 0)
            self._rounds = _list_rounds(start, end, every)
            self._seed, self._num_threads = seed, num_threads
            self._wrapped, self._model = model, network_in(model)
            if self._config.unit_kinds:
                check_whole_network(self._model, f"granularity = '{granularity}'")
                # Until an example shows in which of them units lie.
                parameters = sorted(self._model.named_parameters())
                matrices = [Prunable(name, p, None) for name, p in parameters if p.ndim > 1]
                self._found = Survey(matrices, {})
            else:
                self._found = survey(self._model, self._config.exclude, self._config.include)
            self._units = self._found.units
            self._unpruned = reword_reasons(self._found.unpruned)
            self._workload = make_workload(self._model, None, loss, forward, None, count)
            self._rule = find_criterion(self._config.criterion)
            self._check_criterion(optimizer)
            if not self._config.unit_kinds:
                check_units(self._units, self._config)
            self._axes = {unit.name: unit.input_dim for unit in self._units}
        self._schedule = sparsity_schedule(schedule, self._config.sparsity, len(self._rounds))
        self._settings = {
            **self._config.model_dump(mode="json"),
            **{"start": start, "end": end, "every": every, "seed": seed},
        }
        dense = MaskSet({}) if self._config.unit_kinds else MaskSet.dense(self._units)
        self.masks = replace(dense, unpruned=self._unpruned)
        self._whole: WholeUnits | None = None
        self._is_compact = False
        self.num_steps, self.sparsity = 0, 0.0
        self._is_tried = False
        self._num_updates = 0
        self._movement = self._blank_movement()
        self._optimizer = None if optimizer is None else self._listen_to(optimizer)

    def __repr__(self) -> str:
        name, last = self._config.criterion, max(self._rounds)
        if not self._config.unit_kinds:
            goal = f"{self._config.sparsity:.2%}"
            reached = f"{self.sparsity:.2%} of {self.masks.num_units:,} weights"
        else:
            goal, reached = self._config.goal, "units are found at the first step"
            if self._whole is not None:
                reached = f"{self.sparsity:.2%} of {len(self._whole.kept_U):,} units"
        return (
            f"<Pruner by {name} to {goal} at step {last}, now at step {self.num_steps}: {reached}>"
        )

    @property
    def is_due(self) -> bool:
        """Returns True if the next call of `step` prunes."""
        return self.num_steps + 1 in self._rounds

    def step(self, *batches: Any) -> bool:
        """Sets pruned weights to zero after a step of the optimizer, and prunes where it is due.

        Communicates with all ranks at the first call and where it prunes.

        Args:
            batches: This rank's batch of the step, or several, such as its microbatches. They are
                read only where it prunes, and at the first call, which tries the criterion and
                finds whole units.

        Returns:
            True if it pruned.

        Raises:
            GbpError: A batch does not suit network, loss or criterion, scores are not finite, or
                ranks differ; the masks stay as they were.
        """
        number = self.num_steps + 1
        if self._is_compact:
            self.num_steps = number
            return False
        adopt_sharded(self._model)
        is_due = number in self._rounds
        if is_due or not self._is_tried:
            with as_in_a_job(self._num_threads, "batch"):
                self._check_parameters()
                given = [Batch.of(batch) for batch in batches]
                self._check_given(given)
                if self._config.unit_kinds and self._whole is None:
                    self._find_units(given[0])
                given = given if self._reads_batches else []
                if not self._is_tried:
                    self._try(given)
                if is_due:
                    self._prune(self._rounds[number], given)
        self.masks.apply_(self._model)
        self.num_steps = number
        return is_due

    def compact(self, data: Any) -> CompactResult:
        """Takes the removed units out of the network, and out of the optimizer.

        Further steps then have nothing to do. Communicates with all ranks. A
        DistributedDataParallel around the network refuses to train on: wrap the network anew.

        Args:
            data: As of `gbp_ray.compact`, which does it: one batch is enough.

        Raises:
            GbpError: Rounds are still to come, or as `gbp_ray.compact`.
        """
        if not self._config.unit_kinds:
            raise ConfigError(
                f"granularity = '{self._config.granularity}': removes single weights, which stay "
                "in the network as zeros; only whole units can leave it (channel, head or "
                "channel+head)"
            )
        if self.num_steps < max(self._rounds):
            raise ConfigError(
                f"compact: the last round is after step {max(self._rounds)}, now at step "
                f"{self.num_steps}; call it after that"
            )
        optimizer, forward = self._optimizer, self._workload.forward
        found = compact_model(
            *(self._wrapped, self.masks, data),
            optimizer=optimizer,
            forward=forward,
            num_threads=self._num_threads,
        )
        self._is_compact, self._units, self._movement = True, [], {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns what another process goes on with to the same bits: tensors and plain values.

        The same on every rank; communicates where the network is sharded. Network and optimizer
        have state of their own.
        """
        masks = {name: gather_whole(mask).cpu() for name, mask in self.masks.items()}
        movement = {name: gather_whole(value).cpu() for name, value in self._movement.items()}
        return {**self._plain_state(), "masks": masks, "movement": movement}

    def _plain_state(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "settings": self._settings,
            "num_steps": self.num_steps,
            "num_updates": self._num_updates,
            "sparsity": self.sparsity,
            "round": self.masks.round,
            "parent": self.masks.parent,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict` of a pruner with the same arguments.

        Sets weights and optimizer state of pruned weights to zero, so either may be loaded first.

        Raises:
            ConfigError: It is no such state, or of other arguments.
            PruneError: It is of another network.
        """
        if (
            not isinstance(state, Mapping)
            or not state.keys() >= self._plain_state().keys()
            or not isinstance(state.get("masks"), Mapping)
            or not isinstance(state.get("movement"), Mapping)
            or state["format"] != _FORMAT
        ):
            raise ConfigError(
                f"state: must be what Pruner.state_dict() returned, not {kind_of(state)}"
            )
        for name, value in self._settings.items():
            if state["settings"].get(name, value) != value:
                raise ConfigError(
                    f"{name} = {value!r}: the state was saved with {name} = "
                    f"{state['settings'].get(name)!r}; make the Pruner with the same arguments"
                )
        masks = MaskSet(
            {name: mask.bool() for name, mask in state["masks"].items()},
            state["round"],
            self._config.criterion if state["round"] else "",
            state["parent"],
            self._unpruned,
        )
        kept_U = None if self._whole is None else self._whole.dense.units_in(masks)
        if self._config.unit_kinds:
            masks.apply_(self._model)
        else:
            MaskSet.dense(self._units).check_alike(masks)
        adopt_sharded(self._model)
        self.masks = shard_masks(masks, self._model).to(self._ranks.device)
        self.masks.apply_(self._model)
        if self._whole is not None and kept_U is not None:
            self._whole.kept_U = kept_U
        self._movement = {
            name: shard_like(state["movement"][name].to(blank.device), blank)
            for name, blank in self._blank_movement().items()
            # Of whole units, once found, that of the matrices that they lie in.
            if name in state["movement"] or not self._config.unit_kinds
        }
        self.num_steps, self.sparsity = state["num_steps"], state["sparsity"]
        self._num_updates = state["num_updates"]
        if self._optimizer is not None:
            forget_pruned(self._model, self._optimizer, self.masks)

    @property
    def _ranks(self) -> Ranks:
        return Ranks.current(self._units[0].parameter.device)

    @property
    def _reads_batches(self) -> bool:
        return self._rule.spec.needs_data

    def _check_criterion(self, optimizer: Optimizer | None) -> None:
        spec, name = self._rule.spec, self._config.criterion
        if self._rule.of_network is not None:
            raise ConfigError(
                f"criterion = {name}: takes an example of a data set, which a training loop does "
                "not give; use prune_model, or another criterion"
            )
        if spec.needs_history and optimizer is None:
            raise ConfigError(
                f"optimizer: criterion = {name} gathers its scores from the gradients that the "
                "optimizer is given; pass it, or choose another criterion"
            )

    def _listen_to(self, optimizer: Optimizer) -> Optimizer:
        """Sets gradients of pruned weights to zero before its steps; returns the one inside."""
        optimizer = optimizer_in(optimizer)
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(unit.parameter) in updated for unit in self._units):
            raise ConfigError(
                "optimizer: holds none of the model's prunable weights; pass the one that trains "
                "this model, made after the model was sharded"
            )
        optimizer.register_step_pre_hook(lambda *_: self._before_update())
        return optimizer

    @torch.no_grad()
    def _before_update(self) -> None:
        # A GradScaler leaves it to fused optimizers to unscale gradients and to skip steps.
        found_inf = getattr(self._optimizer, "found_inf", None)
        scale = getattr(self._optimizer, "grad_scale", None)
        is_skipped = found_inf is not None and bool(found_inf)
        self._num_updates += not is_skipped
        for unit in self._units:
            gradient = unit.parameter.grad
            if gradient is None:
                continue
            rows = local(gradient)
            if unit.name in self._movement and not is_skipped:
                part = movement_statistic(local(unit.parameter.detach()), rows)
                gathered = local(self._movement[unit.name])
                gathered += part if scale is None else part / scale
            if unit.name in self.masks:
                rows.masked_fill_(~local(self.masks[unit.name]).to(rows.device), 0)

    def _blank_movement(self) -> dict[str, Tensor]:
        return {
            unit.name: torch.zeros_like(unit.parameter.detach(), dtype=torch.float64)
            for unit in self._units
            # Of whole units that of matrices, as in a job.
            if self._rule.spec.needs_history
            and (unit.parameter.ndim > 1 or not self._config.unit_kinds)
        }

    def _check_parameters(self) -> None:
        """Checks that the network has the parameters that it had, and follows them to a device."""
        named = dict(self._model.named_parameters(remove_duplicate=False))
        for unit in self._units:
            if named.get(unit.name) is not unit.parameter:
                raise WorkloadError(
                    f"model: '{unit.name}' is another parameter than when the Pruner was made; "
                    "make it after the model was wrapped, sharded or changed"
                )
        device = self._ranks.device
        self.masks = self.masks.to(device)
        self._movement = {name: value.to(device) for name, value in self._movement.items()}

    def _check_given(self, given: list[Batch]) -> None:
        if given:
            return
        if self._reads_batches:
            raise ConfigError(
                f"batch: criterion = {self._config.criterion} reads the batches of the "
                "training loop; call step(batch)"
            )
        if self._config.unit_kinds and self._whole is None:
            raise ConfigError(
                f"batch: granularity = '{self._config.granularity}' finds units by passing an "
                "example through the network; call step(batch), at least the first time"
            )

    def _find_units(self, batch: Batch) -> None:
        """Finds whole units by a batch, and makes the first masks if no state had any."""
        ranks = self._ranks
        self._whole = whole = units_by_batch(
            *(self._model, self._workload, self._config, len(self._rounds)),
            *(batch, self.masks, ranks),
        )
        self._found = survey_units(whole.dense, self._model)
        self._units, self._unpruned = self._found.units, reword_reasons(self._found.unpruned)
        if not self.masks:
            self.masks = whole.dense_masks(whole.kept_U).to(ranks.device)
        self.masks = replace(self.masks, unpruned=self._unpruned)

    def _try(self, given: list[Batch]) -> None:
        """Tries loss and criterion, so that they do not fail after hours."""
        if given:
            if not is_sharded(self._model):
                self._ranks.run_collectively(lambda: self._check_loss(given[0]))
            if self._whole is None:
                self._score(1, given)
            else:
                self._score_units(self._whole, 1, given)
        self._is_tried = True

    def _check_loss(self, batch: Batch) -> None:
        model, workload = self._model, self._workload
        device = self._ranks.device
        batch = batch.map(lambda tensor: tensor.to(device))
        with in_mode(model, is_training=False), isolated(model, 0):
            with blaming_batch(batch), torch.no_grad():
                outputs = forward(model, workload, batch)
                size = size_of(batch.targets)
                check_labels(workload, "train", torch.arange(size), outputs, batch.targets)
                loss = mean_loss(workload, outputs, batch.targets)
                check_means(workload, model, batch, outputs, (), partial(batch.part, size=size))
                check_scalar(loss)
            unreached = find_unreached(model, lambda: batch_loss(model, workload, batch))
        check_reached(self._units, unreached)
        warn_of_unusual_weights(Checked(workload, model, batch, outputs, unreached), self._found)

    def _prune(self, number: int, given: list[Batch]) -> None:
        ranks, sparsity = self._ranks, self._schedule[number - 1]
        if self._whole is not None:
            is_due = self._whole.is_due(number)
        else:
            is_due = num_to_prune(sparsity, self.masks.num_units) > self.masks.num_pruned
        if is_due:
            if self._rule.spec.needs_history and not self._num_updates:
                raise PruneError(
                    f"criterion = {self._config.criterion}: the optimizer has taken no step since "
                    "the last round; call optimizer.step() before pruner.step()"
                )
            kept_U: np.ndarray | None = None
            if self._whole is not None:
                scores_U = self._score_units(self._whole, number, given)
                kept_U = self._whole.choose(number, scores_U).kept_U
                masks = self._whole.dense_masks(kept_U, self.masks).to(ranks.device)
            else:
                scores = self._score(number, given)
                removal = select_masks(
                    scores, self.masks, self._config, sparsity, self._axes, ranks
                )
                masks = removal.masks
            ranks.check_agreement(masks.digest, f"the mask of step {self.num_steps + 1}")
            self.masks = replace(masks, unpruned=self._unpruned)
            if self._whole is not None and kept_U is not None:
                self._whole.kept_U = kept_U
                self.sparsity = int(np.count_nonzero(~kept_U)) / len(kept_U)
            else:
                self.sparsity = self.masks.sparsity
            if self._optimizer is not None:
                forget_pruned(self._model, self._optimizer, self.masks)
        self._movement, self._num_updates = self._blank_movement(), 0

    def _score_units(self, whole: WholeUnits, number: int, given: list[Batch]) -> np.ndarray:
        ranks = self._ranks
        check_same_replicas(self._model, ranks)
        with keeping_gradients(self._model), buffers_of_first(self._model, ranks):
            return whole.score(
                *(self._model, self._workload, ranks, self._seed, number, self._movement or None),
                batches=given or None,
            )

    def _score(self, number: int, given: list[Batch]) -> SlicedScores:
        ranks = self._ranks
        check_same_replicas(self._model, ranks)
        with keeping_gradients(self._model), buffers_of_first(self._model, ranks):
            return scoring.score(
                self._model,
                self._units,
                self._workload,
                self._config,
                ranks,
                seed=self._seed,
                round_number=number,
                movement=self._movement or None,
                batches=given or None,
            )


def _list_rounds(start: int, end: int, every: int) -> dict[int, int]:
    """Returns the number of the round after each step that has one."""
    check_whole("start", start, 0)
    check_whole("every", every, 1)
    check_whole("end", end, start + 1, " (above start)")
    number = math.ceil((end - start) / every)
    return {min(start + k * every, end): k for k in range(1, number + 1)}
