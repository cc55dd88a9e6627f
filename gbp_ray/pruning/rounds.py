"""One prune from the dense network to the last mask: score, select, refit, fine-tune, evaluate.

`run_rounds` is a generator that yields one `RoundState` per round, the dense network first. The
caller decides what to do with it: a test collects, a worker writes a checkpoint. Resumed from the
`Checkpoint` of any whole round, it gives the same bits as if never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gbp_ray.config.job import JobConfig
from gbp_ray.config.prune import sparsity_schedule
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import PARTED, is_sharded, local, route_of
from gbp_ray.errors import PruneError, StoreError
from gbp_ray.pruning.checkpoint import Checkpoint, damaged, restore_state, save_round, shard_masks
from gbp_ray.pruning.checks import check_frozen_movement
from gbp_ray.pruning.masks import MaskSet, check_pruned_zero, forget_pruned, read_initial_masks
from gbp_ray.pruning.reconstruction import reconstruct
from gbp_ray.pruning.scoring import ScoreCache, score
from gbp_ray.pruning.selection import select_masks
from gbp_ray.pruning.statistics import movement_statistic
from gbp_ray.pruning.structure import Structure
from gbp_ray.pruning.units import SlicedScores, measure, num_to_prune, survey
from gbp_ray.pruning.whole_units import WholeUnits, find_units, scored_parameters
from gbp_ray.results.records import CostRecord, RoundRecord
from gbp_ray.training.adversarial import robust_accuracy
from gbp_ray.training.batchnorm import keeping_statistics, recalibrate_as_asked
from gbp_ray.training.distillation import Teacher, prepare_teacher
from gbp_ray.training.evaluation import Evaluation, evaluate
from gbp_ray.training.loop import Span, train_epochs, train_until_stale
from gbp_ray.training.network import build_start, copy_frozen, load_weights
from gbp_ray.training.non_finite import why_not_finite
from gbp_ray.training.optimizer import MovingAverage, make_optimizer, num_steps
from gbp_ray.training.progress import OnProgress, ignore_progress
from gbp_ray.workloads.contract import Workload, judged_split, num_examples
from gbp_ray.workloads.data import derive_seed, shuffled_indices
from gbp_ray.workloads.metrics import specs_of
from gbp_ray.workloads.weights import tensor_state

__all__ = ["RoundState", "run_rounds"]


@dataclass(frozen=True)
class RoundState:
    """The end of a round.

    Attributes:
        record: What was measured.
        model: The network itself, which the next round changes; whole units that were removed have
            left it, while masks and files have the dense network's shapes.
    """

    record: RoundRecord
    model: nn.Module
    masks: MaskSet
    _optimizer: Optimizer | None = field(repr=False, default=None)
    _movement: dict[str, Tensor] | None = field(repr=False, default=None)
    _units: WholeUnits | None = field(repr=False, default=None)

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yields the files of `checkpoint.save_round`. Communicates where it is sharded."""
        return save_round(self.model, self.masks, self._optimizer, self._movement, self._units)

    def to_files(self) -> dict[str, bytes]:
        """Returns all of them by name."""
        return dict(self.files())


def run_rounds(
    job: JobConfig,
    workload: Workload,
    ranks: Ranks,
    *,
    resume: Checkpoint | None = None,
    on_progress: OnProgress = ignore_progress,
    score_cache: ScoreCache | None = None,
) -> Iterator[RoundState]:
    """Prunes in rounds; every rank drives its own generator in step with the others.

    Args:
        job: Sections pretrain, prune and finetune, and the seed.
        resume: Continues after this round; rounds up to it are not yielded again.
        score_cache: For the scores of the dense network, with one rank only.

    Yields:
        The state after each round: 0 is the dense network, then 1 to `prune.rounds`.

    Raises:
        PruneError: A loss or score is not finite, a mask is impossible, or workers disagree.
        ConfigError: The job does not fit the network.
    """
    run = _Run(job, workload, ranks, on_progress, score_cache, resume)
    if resume is None:
        yield run.train_dense()
        first = 1
    else:
        ranks.run_collectively(partial(run.restore, resume), communicates=is_sharded(run.model))
        first = resume.round + 1
        resume = None  # Frees memory as large as the network.
    for number in range(first, job.prune.rounds + 1):
        yield run.prune_round(number)


class _Run:
    """The state of one trial on one rank."""

    def __init__(
        self,
        job: JobConfig,
        workload: Workload,
        ranks: Ranks,
        on_progress: OnProgress,
        score_cache: ScoreCache | None = None,
        resume: Checkpoint | None = None,
    ) -> None:
        self.job, self.workload, self.ranks = job, workload, ranks
        self.number = 0  # of the round
        self.on_progress: OnProgress = lambda progress: on_progress(
            replace(progress, round=self.number)
        )
        self.score_cache = score_cache
        stored = {} if resume is None else resume.fingerprints
        prune = job.prune
        self.model, self.macs, self.fingerprints, unused, structure = build_start(
            workload,
            job.seed,
            ranks,
            job.cluster.strategy,
            stored,
            "round_000",
            lambda model: find_units(workload, model, prune) if prune.unit_kinds else None,
        )
        self.whole: WholeUnits | None = None
        self.difference: float | None = None  # of the round's removal
        if structure is None:
            self._begin_weights(unused, resume)
        else:
            self._begin_units(structure)
        check_frozen_movement(job, self.model, self.units)
        self.gathers_movement = job.prune.spec.needs_history
        self.movement: dict[str, Tensor] | None = None
        self.optimizer: Optimizer | None = None
        self.dense_state: dict[str, Tensor] = {}
        self.dense: nn.Module | None = None
        self.teacher: Teacher | None = None
        self.is_teacher_ready = False
        self.seconds: dict[str, float] = {}
        self.kept_step: int | None = None
        self.metrics = specs_of(workload)
        self.split = judged_split(workload)
        seed = derive_seed(job.seed, "train sample")
        drawn = shuffled_indices(num_examples(workload.train), seed)
        self.sample = drawn[: job.workload.train_sample]

    def _begin_weights(self, unused: frozenset[str], resume: Checkpoint | None) -> None:
        job, ranks = self.job, self.ranks
        # A trial goes on with the layers that it began with.
        begun = ranks.run_collectively(lambda: resume.read_masks() if resume else MaskSet({}))
        unused -= begun.keys()
        found = survey(self.model, job.prune.exclude, job.prune.include, unused)
        self.units, self.unpruned = found.units, found.unpruned
        self.masks = MaskSet.dense(self.units)
        initial = ranks.run_collectively(lambda: read_initial_masks(job, self.units, unused))
        self.has_initial_masks = initial is not None
        if initial is not None:
            self.masks = shard_masks(initial, self.model).to(ranks.device)
        start = self.masks.sparsity if self.has_initial_masks else 0.0
        prune = job.prune
        ramp = (prune.schedule, prune.sparsity, prune.rounds, prune.ramp_rounds, start)
        self.schedule = [start, *sparsity_schedule(*ramp)]

    def _begin_units(self, structure: Structure) -> None:
        job, model = self.job, self.model
        initial = self.ranks.run_collectively(
            lambda: read_initial_masks(job, scored_parameters(structure, model))
        )
        self.has_initial_masks = initial is not None
        kept_U = None if initial is None else structure.units_in(initial)
        self.whole = whole = WholeUnits(structure, job.prune, kept_U)
        self.units, self.masks = whole.prunable(model), whole.dense_masks(whole.kept_U)
        if initial is not None:
            self.masks = replace(self.masks, criterion=initial.criterion, parent=initial.parent)
        self.schedule = [whole.share_gone(number) for number in range(job.prune.rounds + 1)]

    @property
    def live_masks(self) -> MaskSet | None:
        """Masks in the shapes of the network as it is; None where all that was removed has left."""
        if self.whole is None:
            return self.masks
        if self.whole.is_cut:
            return None
        masks = self.whole.masks(self.model, self.whole.kept_U)
        return shard_masks(masks, self.model).to(self.ranks.device)

    def train_dense(self) -> RoundState:
        recipe, seed = self.job.pretrain, self.job.seed
        train_loss = math.nan
        masks = self.live_masks if self.has_initial_masks else None
        if masks is not None:
            masks.apply_(self.model)
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
                    masks=masks,
                    on_progress=self.on_progress,
                )
        if self.gathers_movement:
            # The first decision, too, needs movement to score by.
            train_loss = self._finetune()
        self._keep_dense()
        found, recalibrated = self._evaluate(), self._evaluate_recalibrated()
        scores = [found.score] if recalibrated is None else [found.score, recalibrated.score]
        best = max(scores, key=self.metrics[0].rank)
        return self._finish_round(
            train_loss,
            found,
            sparsity_target=self.schedule[0],
            **_name(recalibrated, "recalibrated"),
            fingerprints=self.fingerprints,
            metric_fault=found.specs[0].find_chance_fault(best, found.num_items),
        )

    def prune_round(self, number: int) -> RoundState:
        self.number = number
        # What initial masks remove leaves before the first decision.
        self._cut()
        before, sparsity = self.masks, self.schedule[number]
        held_back: tuple[str, ...] = ()
        pruned: Evaluation | None = None
        # A round may only fine-tune.
        if self.whole is not None:
            is_pruned = self.whole.is_due(number)
        else:
            is_pruned = num_to_prune(sparsity, self.masks.num_units) > self.masks.num_pruned
        if is_pruned:
            held_back = self._prune(sparsity) if self.whole is None else self._prune_units()
        if is_pruned or self.job.prune.rewind == "weights":
            self._rewind()
            self._cut()
            self._reconstruct(before)
            with self._timed("batchnorm"):
                recalibrate_as_asked(self.job, self.model, self.workload, self.ranks)
            pruned = self._evaluate()
        self.kept_step = None
        train_loss = self._finetune(pruned)
        found = pruned
        if self.job.is_finetuned(number) or found is None:
            found = self._evaluate()
        self._check_zeros()
        return self._finish_round(
            train_loss,
            found,
            kept_step=self.kept_step,
            sparsity_target=sparsity,
            **_name(pruned, "pruned"),
            held_back=held_back,
        )

    def restore(self, saved: Checkpoint) -> None:
        if saved.dense_weights:
            load_weights(self.model, saved.dense_weights, "round_000/weights.safetensors")
            self._keep_dense()
        folder, masks = f"round_{saved.round:03d}", saved.read_masks()
        shapes = {name: mask.shape for name, mask in masks.items()}
        if shapes != {name: mask.shape for name, mask in self.masks.items()}:
            raise StoreError(
                f"{folder}/masks.safetensors: does not fit the model; was the workload changed?"
            )
        if self.whole is not None:
            self.whole.kept_U = self.whole.dense.units_in(masks)
        else:
            masks = shard_masks(masks, self.model).to(self.ranks.device)
        self.optimizer, self.movement = restore_state(
            saved,
            self.model,
            lambda: make_optimizer(self.model, self.job.finetune),
            self.ranks.device,
        )
        self.masks = masks
        live = self.live_masks
        if live is not None and (name := live.find_revived(self.model)) is not None:
            raise StoreError(
                f"{folder}/masks.safetensors: prunes weights of '{name}' that the weights file "
                "keeps"
            )
        try:
            self._check_zeros()
        except PruneError as error:
            raise damaged(f"{folder}/state", error) from error
        if saved.round:
            self._cut()
        self.difference = None

    # -- the steps of a round --------------------------------------------------------------------

    def _prune(self, sparsity: float) -> tuple[str, ...]:
        with self._timed("score"):
            scores = self._recall_scores() or self._score()
        with self._timed("select"):
            removal = select_masks(
                *(scores, self.masks, self.job.prune, sparsity),
                {unit.name: unit.input_dim for unit in self.units},
                self.ranks,
            )
        self._take_over(removal.masks)
        return removal.capped_layers

    def _take_over(self, masks: MaskSet) -> None:
        self.ranks.check_agreement(masks.digest, f"the mask of round {self.number}")
        self.masks = masks

    def _prune_units(self) -> tuple[str, ...]:
        assert self.whole is not None
        with self._timed("score"):
            scores_U = self.whole.score(
                *(self.model, self.workload, self.ranks, self.job.seed, self.number),
                *(self.movement, self.on_progress),
            )
        with self._timed("select"):
            choice = self.whole.choose(self.number, scores_U)
            masks = self.whole.dense_masks(choice.kept_U, self.masks)
        self._take_over(masks)
        self.whole.kept_U = choice.kept_U
        return choice.held_back

    def _cut(self) -> None:
        """Removes from the network the units that are masked, unless the job keeps them."""
        if self.whole is None or self.whole.is_cut or not self.job.prune.compact:
            return
        with self._timed("compact"):
            removed = self.whole.remove(
                self.whole.kept_U,
                self.model,
                self.workload,
                self.ranks,
                self.optimizer,
                self.movement,
                lambda model: make_optimizer(model, self.job.finetune),
            )
        self.model, self.optimizer, self.movement = removed[:3]
        self.difference = removed.difference
        self.units = self.whole.prunable(self.model)

    def _check_zeros(self) -> None:
        if (masks := self.live_masks) is not None:
            check_pruned_zero(self.model, self.optimizer, masks)

    def _score(self) -> SlicedScores:
        return score(
            self.model,
            self.units,
            self.workload,
            self.job.prune,
            self.ranks,
            seed=self.job.seed,
            round_number=self.number,
            movement=self.movement,
            on_progress=self.on_progress,
        )

    def _recall_scores(self) -> SlicedScores | None:
        # Later weights belong to this trial only.
        if self.score_cache is None or self.ranks.world_size > 1 or self.number > 1:
            return None
        scores = self.score_cache.fetch(
            self.job, self.model, lambda: self._score().gather(self.ranks)
        )
        # A trial that an earlier version began may have layers that no pass uses.
        if scores is None or not self.masks.keys() <= scores.keys():
            return None
        return SlicedScores.from_full({n: scores[n].to(self.ranks.device) for n in self.masks})

    def _rewind(self) -> None:
        if self.job.prune.rewind == "weights":
            dense = self.dense_state
            if self.whole is not None:
                dense = self.whole.cut(dense, self.model)
            self.model.load_state_dict(dense, strict=False)
        if self.job.prune.rewind != "none":
            self.optimizer = None
        self._apply_masks()

    def _apply_masks(self) -> None:
        if (masks := self.live_masks) is not None:
            masks.apply_(self.model)
            forget_pruned(self.model, self.optimizer, masks)

    def _reconstruct(self, before: MaskSet) -> None:
        """Refits the kept weights, which may be others than the decision kept."""
        if self.dense is None:
            return
        dense = tensor_state(self.dense)
        with self._timed("reconstruct"):
            chosen = reconstruct(
                *(self.model, self.dense, self.workload, self.job.prune, self.ranks),
                masks=self.live_masks or {},
                masks_before=before,
                kept_rows={} if self.whole is None else self.whole.rows_left(),
                dense_weights=dense if self.whole is None else self.whole.cut(dense, self.model),
                seed=self.job.seed,
                on_progress=self.on_progress,
            )
        if chosen:
            masks = replace(self.masks, masks={**self.masks, **chosen})
            self._take_over(shard_masks(masks, self.model))
            self._apply_masks()

    def _finetune(self, before: Evaluation | None = None) -> float:
        """Trains after a prune, given what was measured before it where that is known."""
        recipe = self.job.finetune
        length = num_steps(recipe, self.workload, recipe.epochs)
        if length == 0 or not self.job.is_finetuned(self.number):
            return math.nan
        first = self.job.num_finetunings_before(self.number) * length
        planned = steps = range(first, first + length)
        if self.job.prune.rewind == "none":
            planned = range(self.job.num_finetunings * length)
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, recipe)
        if self.teacher is not None and not self.is_teacher_ready:
            with self._timed("teach"):
                self.teacher = prepare_teacher(
                    self.teacher,
                    self.job,
                    self.workload,
                    self.ranks,
                    on_progress=self.on_progress,
                )
            self.is_teacher_ready = True
        if self.gathers_movement:
            self.movement = {
                unit.name: torch.zeros_like(unit.parameter.detach(), dtype=torch.float64)
                for unit in self.units
            }
        optimizer = self.optimizer

        average: MovingAverage | None = None
        if recipe.ema_decay > 0 and recipe.patience > 0:
            # One average for all steps, not one for each validation.
            average = MovingAverage(self.model, recipe.ema_decay)

        def train(some: range) -> float:
            num_before = some.start - steps.start
            with self._timed("finetune"), average.set_aside() if average else nullcontext():
                return train_epochs(
                    self.model,
                    self.workload,
                    recipe,
                    self.ranks,
                    optimizer,
                    Span("finetune", some, planned),
                    seed=self.job.seed,
                    masks=self.live_masks,
                    teacher=self.teacher,
                    movement=self._gather_movement if self.gathers_movement else None,
                    average=average,
                    on_progress=lambda progress: self.on_progress(
                        replace(progress, done=num_before + progress.done, total=length)
                    ),
                )

        if recipe.patience == 0:
            return train(steps)
        outcome = train_until_stale(
            self.model,
            self.optimizer,
            steps,
            every=num_steps(recipe, self.workload, recipe.validate_every),
            patience=recipe.patience,
            train=train,
            validate=self._evaluate,
            start=before or self._evaluate(),
            rank=self.metrics[0].rank,
        )
        self.kept_step = outcome.kept_step
        return outcome.train_loss

    def _gather_movement(self, gradients: Mapping[str, Tensor]) -> None:
        assert self.movement is not None
        for unit in self.units:
            weight, gradient = unit.parameter.detach(), gradients[unit.name]
            gathered = local(self.movement[unit.name])
            gathered += movement_statistic(local(weight), local(gradient))

    def _evaluate_recalibrated(self) -> Evaluation | None:
        """Measures the dense network recalibrated like pruned ones, and restores it.

        Returns None where statistics are not recalibrated or the loss is not finite.
        """
        with keeping_statistics(self.model):
            with self._timed("batchnorm"):
                if not recalibrate_as_asked(self.job, self.model, self.workload, self.ranks):
                    return None
            found = self._measure(self.split)
        return found if math.isfinite(found.loss) else None

    def _measure(self, split: str, sample: Tensor | None = None) -> Evaluation:
        with self._timed("evaluate"):
            return evaluate(
                self.model,
                self.workload,
                self.ranks,
                self.job.workload.eval_batch_size,
                on_progress=self.on_progress,
                split=split,
                sample=sample,
                precision=self.job.workload.eval_precision,
            )

    def _evaluate(self) -> Evaluation:
        found = self._measure(self.split)
        if not math.isfinite(found.loss):
            weights = {unit.name: unit.parameter for unit in self.units}
            why = why_not_finite(weights) or (
                "the weights diverged, lower pretrain.learning_rate or finetune.learning_rate"
            )
            raise PruneError(f"round {self.number}: the {self.split} loss is {found.loss:g}; {why}")
        return found

    def _keep_dense(self) -> None:
        if self.job.prune.rewind == "weights":
            self.dense_state = {k: v.detach().clone() for k, v in tensor_state(self.model).items()}
        distillation = self.job.finetune.distillation
        if distillation.is_on and self.job.finetune.epochs > 0:
            self.teacher = Teacher(copy_frozen(self.model), distillation)
        if self.job.prune.reconstruct != "none":
            self.dense = copy_frozen(self.model)

    def _finish_round(self, train_loss: float, found: Evaluation, **measured: Any) -> RoundState:
        train_score = self._measure("train", self.sample).score if len(self.sample) else None
        robust: float | None = None
        if self.job.attack.kind != "none":
            with self._timed("attack"):
                robust = robust_accuracy(
                    *(self.model, self.workload, self.ranks, self.job.attack),
                    *(self.job.workload.eval_batch_size, self.on_progress),
                )
        record = RoundRecord(
            round=self.number,
            judged_on=self.split,
            metric=self.metrics[0],
            other_metrics=self.metrics[1:],
            score=found.score,
            loss=found.loss,
            metrics=found.metrics,
            train_score=train_score,
            robust_accuracy=robust,
            train_loss=train_loss if math.isfinite(train_loss) else None,
            cost=self._measure_cost(),
            mask_digest=self.masks.digest,
            seconds=self.seconds,
            **measured,
        )
        self.seconds, self.difference = {}, None
        routes = is_sharded(self.model) and self.ranks.all_gather_objects(route_of(self.model))
        if routes and len(set(routes)) > 1:
            raise PruneError(PARTED)
        return RoundState(record, self.model, self.masks, self.optimizer, self.movement, self.whole)

    def _measure_cost(self) -> CostRecord:
        if self.whole is not None:
            return self.whole.measure(self.model, self.macs, self.difference)
        return measure(self.model, self.units, self.macs, self.unpruned)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + elapsed, 3)


def _name(found: Evaluation | None, when: str) -> dict[str, Any]:
    """Names what was measured at another moment than a round's end, as its record does."""
    if found is None:
        return {}
    return {
        f"score_{when}": found.score,
        f"loss_{when}": found.loss,
        f"metrics_{when}": found.several,
    }
