"""One prune from the dense network to the last mask: score, select, apply, fine-tune, evaluate.

`run_rounds` is a generator that yields one `RoundState` per round, the dense network first. What a
round's end means is the caller's to decide: a test collects, a worker writes a checkpoint. Given a
`Checkpoint` of any whole round it goes on from there, to the same bits as if never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from gbp_ray.config import JobConfig, Recipe
from gbp_ray.errors import ConfigError, PruneError, StoreError
from gbp_ray.pruning.batchnorm import recalibrate_batchnorm
from gbp_ray.pruning.building import build_start, copy_frozen, network_of_seed
from gbp_ray.pruning.checkpoint import (
    Checkpoint,
    damaged,
    load_weights,
    restore_state,
    save_round,
    spread_masks,
)
from gbp_ray.pruning.criteria import criterion, movement_statistic
from gbp_ray.pruning.evaluation import evaluate
from gbp_ray.pruning.masks import MaskSet, Prunable, prunable_parameters
from gbp_ray.pruning.metrics import measure
from gbp_ray.pruning.objective import Teacher
from gbp_ray.pruning.ranks import Ranks, isolated
from gbp_ray.pruning.saliency import check_criterion, score
from gbp_ray.pruning.schedule import sparsity_schedule
from gbp_ray.pruning.selection import check_reachable, check_selectable, num_to_prune, select_masks
from gbp_ray.pruning.sharding import is_sharded, local
from gbp_ray.pruning.slices import SlicedScores
from gbp_ray.pruning.training import (
    Span,
    check_pruned_zero,
    forget_pruned,
    make_optimizer,
    num_steps,
    train_epochs,
)
from gbp_ray.store import RoundRecord
from gbp_ray.workload import (
    Workload,
    check_workload,
    num_examples,
    take_batch,
)

__all__ = [
    "Checkpoint",
    "RoundState",
    "ScoreCache",
    "Tell",
    "check_job",
    "load_weights",
    "run_rounds",
]

_LEAST_NORM_BATCH = 32
"""Smaller scoring batches would make poor statistics, and single examples none at all."""

Tell = Callable[[str, int, int, int, float | None], None]
"""(phase, round, steps done, steps of the phase, loss or None): live progress of this rank."""


class ScoreCache(Protocol):
    """Where trials find the scores of the dense network that another one has computed."""

    def fetch(
        self, job: JobConfig, model: nn.Module, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor] | None:
        """Gives the float32 scores of a model by parameter name, computing them if nobody has.

        Returns None where scores of this job are not worth keeping.
        """


@dataclass(frozen=True)
class RoundState:
    """The end of a round.

    Attributes:
        record: What was measured.
        model: The network itself, which the next round goes on changing.
        masks: The masks in force.
    """

    record: RoundRecord
    model: nn.Module
    masks: MaskSet
    _optimizer: Optimizer | None = field(repr=False, default=None)
    _movement: dict[str, Tensor] | None = field(repr=False, default=None)

    def to_files(self) -> dict[str, bytes]:
        """Writes weights, masks and the state that the next round needs; see `checkpoint`."""
        return save_round(self.model, self.masks, self._optimizer, self._movement)


def run_rounds(
    job: JobConfig,
    workload: Workload,
    ranks: Ranks,
    *,
    resume: Checkpoint | None = None,
    tell: Tell = lambda phase, number, done, total, loss: None,
    score_cache: ScoreCache | None = None,
) -> Iterator[RoundState]:
    """Prunes in rounds; every rank drives its own generator in step with the others.

    Args:
        job: Sections pretrain, prune and finetune, and the seed.
        resume: Goes on after this round; rounds up to it are not yielded again.
        score_cache: Asked for the scores of the dense network, with one rank only.

    Yields:
        The state after each round: 0 is the dense network, then 1 to `prune.rounds`.

    Raises:
        PruneError: A loss or score is not finite, a mask is impossible, or workers disagree.
        ConfigError: The job asks for something this model does not have.
    """
    run = _Run(job, workload, ranks, tell, score_cache)
    if resume is None:
        yield run.train_dense()
        first = 1
    else:
        # A sharded network is restored by all ranks together, communicating.
        ranks.together(lambda: run.restore(resume), communicates=is_sharded(run.model))
        first = resume.round + 1
    for number in range(first, job.prune.rounds + 1):
        yield run.prune_round(number)


def check_job(job: JobConfig, workload: Workload) -> None:
    """Refuses what a job could only fail at later; builds the model, trains and writes nothing.

    Raises:
        ConfigError: The criterion, an exclude glob, a layer bound, n:m, the final sparsity or the
            size of a batch's parts does not suit the model.
        WorkloadError: The network cannot be built, or a batch of the data cannot be used.
        PruneError: The criterion fails on a small batch.
    """
    criterion(job.prune.criterion)
    model, _ = network_of_seed(workload, job.seed)
    units = prunable_parameters(model, job.prune.exclude)
    _refuse_frozen_movement(job, units)
    shapes = {unit.name: tuple(unit.parameter.shape) for unit in units}
    check_selectable(shapes, job.prune, {unit.name: unit.input_dim for unit in units})
    check_reachable(shapes, job.prune)
    _refuse_split_patterns(job, units)
    check_workload(workload, model, min(8, job.prune.calibration_batch_size))
    if job.finetune.distillation.weight > 0:
        _refuse_unteachable(workload, model)
    _refuse_lone_examples(job, workload, model)
    check_criterion(model, units, workload, job.prune, seed=job.seed)


def _refuse_split_patterns(job: JobConfig, units: list[Prunable]) -> None:
    split = [unit.name for unit in units if unit.input_dim == 0]
    if job.cluster.strategy == "fsdp" and job.prune.pattern is not None and split:
        raise ConfigError(
            f"cluster.strategy = fsdp: cuts '{split[0]}' between its inputs, along which the "
            f"groups of prune.granularity = '{job.prune.granularity}' run; name it in "
            "prune.exclude or set cluster.strategy to replicated"
        )


def _refuse_unteachable(workload: Workload, model: nn.Module) -> None:
    inputs, _ = take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))
    with torch.no_grad(), isolated(model.eval(), 0):
        outputs = model(inputs)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.ndim < 2:
        raise ConfigError(
            "finetune.distillation.weight: needs a network that gives logits of shape "
            "(examples, classes); set it to 0"
        )


def _refuse_frozen_movement(job: JobConfig, units: list[Prunable]) -> None:
    frozen = [unit.name for unit in units if not unit.parameter.requires_grad]
    if job.prune.criterion == "movement" and frozen:
        raise ConfigError(
            f"prune.criterion = movement: '{frozen[0]}' is frozen (requires_grad = False) and "
            "never moves; name it in prune.exclude"
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


class _Run:
    """The moving parts of one trial on one rank."""

    def __init__(
        self,
        job: JobConfig,
        workload: Workload,
        ranks: Ranks,
        tell: Tell,
        score_cache: ScoreCache | None = None,
    ) -> None:
        self.job, self.workload, self.ranks, self.tell = job, workload, ranks, tell
        self.score_cache = score_cache
        self.model, self.macs = build_start(workload, job.seed, ranks, job.cluster.strategy)
        self.units = prunable_parameters(self.model, job.prune.exclude)
        _refuse_frozen_movement(job, self.units)
        self.masks = MaskSet.dense(self.units)
        self.schedule = sparsity_schedule(
            job.prune.schedule, job.prune.sparsity, job.prune.rounds, job.prune.ramp_rounds
        )
        self.gathers_movement = job.prune.criterion == "movement"
        self.movement: dict[str, Tensor] | None = None
        self.optimizer: Optimizer | None = None
        self.dense_state: dict[str, Tensor] = {}
        self.teacher: Teacher | None = None
        self.seconds: dict[str, float] = {}

    def train_dense(self) -> RoundState:
        recipe, seed = self.job.pretrain, self.job.seed
        train_loss = math.nan
        if total := num_steps(recipe, self.workload, recipe.epochs):
            with self._timed("pretrain"):
                train_loss = train_epochs(
                    self.model,
                    self.workload,
                    recipe,
                    self.ranks,
                    make_optimizer(self.model, recipe),
                    Span("pretrain", range(total), range(total)),
                    seed=seed,
                    tell=self._step_teller("pretrain", 0),
                )
        if self.gathers_movement:
            # The first decision, too, needs a stretch of training to look back on.
            train_loss = self._finetune(0)
        self._remember_dense()
        accuracy, loss = self._evaluate(0)
        return self._finish_round(
            RoundRecord(
                round=0,
                sparsity_target=0.0,
                accuracy=accuracy,
                loss=loss,
                train_loss=_finite_or_none(train_loss),
                cost=measure(self.model, self.units, self.macs),
                mask_digest=self.masks.digest,
            )
        )

    def prune_round(self, number: int) -> RoundState:
        sparsity = self.schedule[number - 1]
        held_back: tuple[str, ...] = ()
        accuracy_pruned = loss_pruned = None
        # A round may only fine-tune, and there is then nothing to look at before it.
        is_pruned = num_to_prune(sparsity, self.masks.num_units) > self.masks.num_pruned
        if is_pruned:
            held_back = self._prune(number, sparsity)
        if is_pruned or self.job.prune.rewind == "weights":
            self._rewind()
            with self._timed("batchnorm"):
                self._recalibrate()
            accuracy_pruned, loss_pruned = self._evaluate(number)
        train_loss = self._finetune(number)
        accuracy, loss = accuracy_pruned, loss_pruned
        if self.job.finetune.epochs > 0 or accuracy is None or loss is None:
            accuracy, loss = self._evaluate(number)
        check_pruned_zero(self.model, self.optimizer, self.masks)
        return self._finish_round(
            RoundRecord(
                round=number,
                sparsity_target=sparsity,
                accuracy=accuracy,
                loss=loss,
                accuracy_pruned=accuracy_pruned,
                loss_pruned=loss_pruned,
                train_loss=_finite_or_none(train_loss),
                cost=measure(self.model, self.units, self.macs),
                mask_digest=self.masks.digest,
                held_back=held_back,
            )
        )

    def restore(self, saved: Checkpoint) -> None:
        if saved.dense_weights:
            load_weights(self.model, saved.dense_weights, "round_000/weights.safetensors")
            self._remember_dense()
        masks = self._read_masks(saved)
        self.optimizer, self.movement = restore_state(
            saved,
            self.model,
            lambda: make_optimizer(self.model, self.job.finetune),
            self.ranks.device,
        )
        if (name := masks.find_revived(self.model)) is not None:
            raise StoreError(
                f"round_{saved.round:03d}/masks.safetensors: prunes weights of '{name}' that the "
                "weights file keeps"
            )
        self.masks = masks
        try:
            check_pruned_zero(self.model, self.optimizer, self.masks)
        except PruneError as error:
            raise damaged(f"round_{saved.round:03d}/state", error) from error

    def _read_masks(self, saved: Checkpoint) -> MaskSet:
        source = f"round_{saved.round:03d}/masks.safetensors"
        masks = MaskSet.from_bytes(saved.masks, source)
        shapes = {name: mask.shape for name, mask in masks.items()}
        if shapes != {name: mask.shape for name, mask in self.masks.items()}:
            raise StoreError(f"{source}: does not fit the model; was the workload changed?")
        return spread_masks(masks, self.model).to(self.ranks.device)

    # -- the steps of a round --------------------------------------------------------------------

    def _prune(self, number: int, sparsity: float) -> tuple[str, ...]:
        with self._timed("score"):
            scores = self._recall_scores(number) or self._score(number)
        with self._timed("select"):
            selection = select_masks(
                scores,
                self.masks,
                self.job.prune,
                sparsity,
                {unit.name: unit.input_dim for unit in self.units},
                self.ranks,
            )
        self.ranks.check_agreement(selection.masks.digest, f"the mask of round {number}")
        self.masks = selection.masks
        return selection.held_back

    def _score(self, number: int) -> SlicedScores:
        return score(
            self.model,
            self.units,
            self.workload,
            self.job.prune,
            self.ranks,
            seed=self.job.seed,
            round_number=number,
            movement=self.movement,
            tell=lambda done, total: self.tell("score", number, done, total, None),
        )

    def _recall_scores(self, number: int) -> SlicedScores | None:
        # Later weights are this trial's own, and nobody else can use their scores.
        if self.score_cache is None or self.ranks.world_size > 1 or number > 1:
            return None
        scores = self.score_cache.fetch(
            self.job, self.model, lambda: self._score(number).gather(self.ranks)
        )
        if scores is None:
            return None
        return SlicedScores.whole({n: s.to(self.ranks.device) for n, s in scores.items()})

    def _rewind(self) -> None:
        if self.job.prune.rewind == "weights":
            self.model.load_state_dict(self.dense_state)
        if self.job.prune.rewind != "none":
            self.optimizer = None
        self.masks.apply_(self.model)
        if self.optimizer is not None:
            forget_pruned(self.model, self.optimizer, self.masks)

    def _recalibrate(self) -> None:
        if self.job.prune.batchnorm_examples:
            recalibrate_batchnorm(
                self.model,
                self.workload,
                self.ranks,
                examples=self.job.prune.batchnorm_examples,
                batch_size=max(self.job.prune.calibration_batch_size, _LEAST_NORM_BATCH),
                seed=self.job.seed,
            )

    def _finetune(self, number: int) -> float:
        recipe = self.job.finetune
        length = num_steps(recipe, self.workload, recipe.epochs)
        if length == 0:
            return math.nan
        # With movement a stretch comes before the first prune as well.
        stretches = self.job.prune.rounds + self.gathers_movement
        stretch = number - 1 + self.gathers_movement
        steps = range(stretch * length, (stretch + 1) * length)
        planned = range(stretches * length) if self.job.prune.rewind == "none" else steps
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, recipe)
        if self.gathers_movement:
            self.movement = {
                unit.name: torch.zeros_like(unit.parameter.detach(), dtype=torch.float64)
                for unit in self.units
            }
        with self._timed("finetune"):
            return train_epochs(
                self.model,
                self.workload,
                recipe,
                self.ranks,
                self.optimizer,
                Span("finetune", steps, planned),
                seed=self.job.seed,
                masks=self.masks,
                teacher=self.teacher,
                movement=self._gather_movement if self.gathers_movement else None,
                tell=self._step_teller("finetune", number),
            )

    def _gather_movement(self, gradients: Mapping[str, Tensor]) -> None:
        assert self.movement is not None
        for unit in self.units:
            weight, gradient = unit.parameter.detach(), gradients[unit.name]
            gathered = local(self.movement[unit.name])
            gathered += movement_statistic(local(weight), local(gradient))

    def _evaluate(self, number: int) -> tuple[float, float]:
        with self._timed("evaluate"):
            accuracy, loss = evaluate(
                self.model,
                self.workload,
                self.ranks,
                self.job.workload.eval_batch_size,
                tell=lambda done, total: self.tell("evaluate", number, done, total, None),
            )
        if not math.isfinite(loss):
            raise PruneError(
                f"round {number}: the test loss is {loss:g}; the weights diverged, lower "
                "pretrain.learning_rate or finetune.learning_rate"
            )
        return accuracy, loss

    # -- small change ----------------------------------------------------------------------------

    def _remember_dense(self) -> None:
        if self.job.prune.rewind == "weights":
            self.dense_state = {k: v.clone() for k, v in self.model.state_dict().items()}
        distillation = self.job.finetune.distillation
        if distillation.weight > 0:
            self.teacher = Teacher(copy_frozen(self.model), distillation)

    def _finish_round(self, record: RoundRecord) -> RoundState:
        record = record.model_copy(update={"seconds": self.seconds})
        self.seconds = {}
        return RoundState(record, self.model, self.masks, self.optimizer, self.movement)

    def _step_teller(self, phase: str, number: int) -> Callable[[int, int, float], None]:
        return lambda done, total, loss: self.tell(phase, number, done, total, loss)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + elapsed, 3)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
