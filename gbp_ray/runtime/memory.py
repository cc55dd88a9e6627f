"""Predict what each phase of a job holds at its peak, and sends, on one rank.

The passes of a job run on its own network over two and over four examples while every tensor they
make is counted (`training.footprint`): a forward pass, the criterion's scoring, a step of each
training with its average, teacher and attack, a step of the attack. The lines through both sizes
give the peak for as many examples as a rank takes at a time.

This is measured on one rank with the whole network. What a phase finds there already has a known
size: the model, masks, optimizer, teacher, dense weights and movement's sums. So has what W ranks
divide: the sums of gradients, the scores and, with "fsdp", all that is shaped like the parameters;
it is taken out of the measurement whole and put back as one rank's share. With "fsdp" the weights
that FSDP2 gathers come on top. The interpreter and the data are not part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.config.training import Recipe
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import (
    copy_network,
    cut_rows,
    differentiating,
    group_parameters,
    let_go,
)
from gbp_ray.distributed.sums import largest_exchange
from gbp_ray.pruning.criteria import criterion
from gbp_ray.pruning.moments import LayerMoments
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.statistics import movement_statistic
from gbp_ray.pruning.structure import Structure
from gbp_ray.pruning.unit_scores import score_units
from gbp_ray.pruning.units import Layout, survey
from gbp_ray.pruning.whole_units import find_units, survey_units
from gbp_ray.runtime.refit_memory import measure_refit
from gbp_ray.training.adversarial import num_attacked, perturb
from gbp_ray.training.batchnorm import norm_batch_size, running_statistics
from gbp_ray.training.distillation import Teacher, answer_bytes, is_taught_once
from gbp_ray.training.footprint import MOST_MEASURED, Footprint, measure_footprint
from gbp_ray.training.loop import Span, train_epochs
from gbp_ray.training.loss import counts_of
from gbp_ray.training.network import copy_frozen, unused_layers
from gbp_ray.training.optimizer import make_optimizer, num_steps, trainable_parameters
from gbp_ray.workloads.batch import Batch, forward, logits_of
from gbp_ray.workloads.contract import Portion, Workload, judged_split, num_examples
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.losses import batch_loss

__all__ = ["Memory", "Phase", "bytes_of"]

_SAMPLED_BYTES = 2**19  # of the scores, for a threshold's bracket, over all ranks


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase on one rank.

    Attributes:
        num_bytes: Peak of what is held.
        held: The parts of it, in bytes.
        sent_bytes: What this rank sends to others in each round (pretrain: once).
    """

    name: str
    num_bytes: int
    held: dict[str, int]
    sent_bytes: int = 0


def bytes_of(values: Iterable[Any]) -> int:
    """Count the bytes of tensors and arrays; memory maps and anything else have none."""
    return sum(
        value.nbytes
        for value in values
        if isinstance(value, (Tensor, np.ndarray)) and not isinstance(value, np.memmap)
    )


class Memory:
    """The measured passes and the known sizes of one job; the network given is left as it is."""

    def __init__(
        self, job: JobConfig, workload: Workload, model: nn.Module, *, is_blank: bool
    ) -> None:
        self._job, self._workload, self._is_blank = job, workload, is_blank
        self._model = model = copy_network(model)
        available = num_examples(workload.train)
        # Enough for two steps of an epoch, and counted once for all passes.
        few = torch.arange(2 * MOST_MEASURED)
        self._few = dataclasses.replace(workload, train=Portion(workload.train, few % available))
        counts_of(self._few, few, Ranks())
        self._trainings: dict[str, Footprint] = {}
        self._is_sharded = job.cluster.strategy == "fsdp"
        self._world_size = max(1, job.cluster.max_workers)
        unused = unused_layers(workload, model, is_blank=is_blank)
        self._structure: Structure | None = None
        if job.prune.unit_kinds:
            self._structure = find_units(workload, model, job.prune)
            found = survey_units(self._structure, model)
        else:
            found = survey(model, job.prune.exclude, job.prune.include, unused)
        self._units, self.unpruned = found.units, found.unpruned
        self._layout = Layout(self._units, Ranks(0, self._world_size))
        self.num_prunable = self._layout.num_weights
        self.num_owned = max(stop - start for start, stop in pairwise(self._layout.bounds))
        self._buffers = bytes_of(model.buffers())
        self._whole = self._own = bytes_of(model.parameters()) + self._buffers
        self._gathered = self._gathered_to_refit = self._gathering = 0
        if self._is_sharded:
            rows = self._rows(model.parameters())
            self._own, self._gathering = rows + self._buffers, (self._world_size - 1) * rows
            *inner, outer = map(bytes_of, group_parameters(model))
            # A group's weights, and the next one's twice while they arrive.
            self._gathered = outer + 3 * max(inner) if inner else 2 * outer
            # Of two networks, a group that passes leave and the one that they come to.
            self._gathered_to_refit = 2 * outer + (5 * max(inner) if inner else outer)
        self._has_movement = job.prune.spec.needs_history
        self.num_passes = criterion(job.prune.criterion).spec.num_passes
        self.calibration_examples = min(job.prune.calibration_examples, available)
        self.pretrain_steps = num_steps(job.pretrain, workload, job.pretrain.epochs)
        self.finetune_steps = num_steps(job.finetune, workload, job.finetune.epochs)
        self._has_teacher = self.finetune_steps > 0 and job.finetune.distillation.is_on
        is_once = self._has_teacher and is_taught_once(job, workload, model)
        self._answers = answer_bytes(workload, model) if is_once else 0
        # What a network makes once and keeps is not its passes' own.
        self._run_forward(MOST_MEASURED)
        self._forward = self._measure(self._run_forward)

    def stored_bytes(self, *, has_optimizer: bool) -> int:
        """Compute what one round writes to storage, over all ranks."""
        kept = 8 * self.num_prunable * self._has_movement
        if has_optimizer and self.finetune_steps:
            kept += self._optimizer(self._job.finetune, is_whole=True)
        # Shards hold the weights beside the file that anyone loads.
        return (1 + self._is_sharded) * self._whole + self.num_prunable // 8 + kept

    # -- sizes -----------------------------------------------------------------------------------

    def _rows(self, parameters: Iterable[Tensor]) -> int:
        """Count the bytes of one rank's rows, of the rank that has most."""
        rows = ((p, cut_rows("", p.shape, self._world_size)[0].size) for p in parameters)
        return sum(size * p.element_size() for p, size in rows)

    def _optimizer(self, recipe: Recipe, *, is_whole: bool = False) -> int:
        trained = trainable_parameters(self._model, recipe.freeze).values()
        moments = int(recipe.momentum > 0) if recipe.optimizer == "sgd" else 2
        has_rows = self._is_sharded and not is_whole
        return moments * (self._rows(trained) if has_rows else bytes_of(trained))

    def _turns(self, num_items: int, batch_size: int = 1) -> int:
        """Count the turns that all ranks need for so many items in batches."""
        return -(-num_items // batch_size // self._world_size)

    def _share(self, num_bytes: int) -> int:
        """Compute what a rank sends when each has a share of so many bytes for every other."""
        return (self._world_size - 1) * -(-num_bytes // self._world_size)

    # -- passes ----------------------------------------------------------------------------------

    def _measure(self, run: Callable[[int], object]) -> Footprint:
        with isolated(self._model, 0):
            return measure_footprint(run)

    def _batch(self, size: int) -> Batch:
        return take_batch(self._few, self._few.train, torch.arange(size), augment_seed=0)

    @torch.no_grad()
    def _run_forward(self, size: int) -> object:
        return self._loss(self._batch(size))

    def _run_backward(self, size: int) -> None:
        batch = self._batch(size)
        scored = {unit.name: unit.parameter for unit in self._units}
        with differentiating(self._model, scored), ExitStack() as hooks:
            for leaf in scored.values():
                hooks.callback(leaf.register_post_accumulate_grad_hook(let_go).remove)
            self._loss(batch).backward()

    def _run_attack(self, size: int) -> object:
        model, batch = self._model, self._batch(size)
        given = (
            self._workload,
            batch.inputs,
            self._job.attack.model_copy(update={"steps": 1}),
            0,
            "attack",
        )
        return perturb(model, lambda seen: self._loss(batch._replace(inputs=seen)), *given)

    def _loss(self, batch: Batch) -> Tensor:
        return batch_loss(self._model.eval(), self._workload, batch)

    def _measure_scoring(self) -> Footprint:
        gathered = {
            unit.name: torch.zeros_like(unit.parameter, dtype=torch.float64)
            for unit in self._units
            if self._has_movement
        }
        # The second probe holds what all after it do.
        few: dict[str, int] = {"hutchinson_probes": min(self._job.prune.hutchinson_probes, 2)}

        def run(size: int) -> object:
            few["calibration_examples"] = few["calibration_batch_size"] = size
            config = self._job.prune.model_copy(update=few)
            given = (self._few, config, Ranks())
            if self._structure is not None:
                everything = self._structure.everything
                return score_units(
                    *(self._model, self._structure, everything, *given),
                    movement=gathered,
                    must_be_finite=False,
                )
            return score(self._model, self._units, *given, movement=gathered)

        return self._measure(run)

    def _measure_training(self, name: str, recipe: Recipe) -> Footprint:
        """Measure two steps, in the first of which the optimizer makes its state."""
        # One step of an attack holds what many do. Without a rate the weights stay as they are.
        attack = {"steps": 1, "step_size": recipe.adversarial.step}
        short: dict[str, Any] = dict.fromkeys(("epochs", "warmup_epochs", "learning_rate"), 0.0)
        short |= {"microbatches": 1, "batch_size": 1, "lr_schedule": "constant"}
        short["adversarial"] = recipe.adversarial.model_copy(update=attack)
        recipe = recipe.model_copy(update=short)
        lessons: dict[str, Any] = {}
        if name == "finetune" and self._has_teacher:
            teacher = Teacher(copy_frozen(self._model), self._job.finetune.distillation)
            with torch.no_grad():
                known = None
                if self._answers:
                    batch = self._batch(2 * MOST_MEASURED)
                    known = logits_of(forward(teacher.model, self._workload, batch))
            lessons["teacher"] = dataclasses.replace(teacher, known=known)
        if name == "finetune" and self._has_movement:
            lessons["movement"] = self._gather_movement
        kind = f"{recipe.model_dump(include=set(Recipe.model_fields))} {list(lessons)}"
        if kind not in self._trainings:
            span = Span(name, range(2), range(2))

            def run(size: int) -> object:
                sized = recipe.model_copy(update={"batch_size": size})
                given = self._model, self._few, sized, Ranks(), make_optimizer(self._model, recipe)
                # Under a seed of its own no run finds an order of examples that another has drawn.
                return train_epochs(*given, span, seed=size, **lessons)

            self._trainings[kind] = self._measure(run)
        return self._trainings[kind]

    def _gather_movement(self, gradients: Mapping[str, Tensor]) -> None:
        for unit in self._units:
            movement_statistic(unit.parameter.detach(), gradients[unit.name])

    # -- phases ----------------------------------------------------------------------------------

    def count_units(self) -> dict[str, tuple[int, int]]:
        """Counts by kind the groups of whole units, and their units; nothing of weights."""
        counts: dict[str, tuple[int, int]] = {}
        for group in self._structure.groups if self._structure else ():
            groups, units = counts.get(group.kind, (0, 0))
            counts[group.kind] = groups + 1, units + group.num_units
        return counts

    def phases(self) -> list[Phase]:
        """Predict the phases of the job, in the order in which they come."""
        job = self._job
        masks = self.num_owned if self._is_sharded else self.num_prunable
        base = {"rows of the model" if self._is_sharded else "model": self._own, "masks": masks}
        later = base | {
            "dense weights": self._own * (job.prune.rewind == "weights"),
            "dense network": self._own * (job.prune.reconstruct != "none"),
            "teacher": self._own * self._has_teacher,
            "its answers": self._answers,
            "movement": 8 * masks * self._has_movement,
        }
        optimizer = self._optimizer(job.finetune) if self.finetune_steps else 0
        tuned = later | {"optimizer": optimizer}
        kept = tuned if job.prune.rewind == "none" else later
        phases = [self._build(base)]
        if self.pretrain_steps:
            phases.append(self._train("pretrain", job.pretrain, base, self.pretrain_steps))
        phases += [self._score(kept), self._decide(kept)]
        if job.prune.reconstruct != "none":
            phases.append(self._refit(kept))
        num_statistics = sum(s.numel() for s in running_statistics(self._model))
        examples = min(job.prune.norm_examples, num_examples(self._workload.train))
        if examples and num_statistics:
            size = min(norm_batch_size(job.prune), examples)
            held = kept | {"sums": 8 * num_statistics}
            turns = self._turns(examples, size)
            sent = self._share((4 * turns + 8) * num_statistics)
            peak = self._forward.peak_bytes(size)
            phases.append(self._pass("batchnorm", held, peak, turns, sent))
        if self.finetune_steps:
            # What early stopping goes back to is there twice while a better one is copied.
            best = 2 * (self._own + optimizer) * (job.finetune.patience > 0)
            held = later | {"best so far": best}
            phases.append(self._train("finetune", job.finetune, held, self.finetune_steps))
        total = num_examples(getattr(self._workload, judged_split(self._workload)))
        size = min(job.workload.eval_batch_size, total)
        # After the prune and after the fine-tuning.
        turns = 2 * self._turns(total, size)
        phases.append(self._pass("evaluate", tuned, self._forward.peak_bytes(size), turns))
        if job.attack.kind != "none":
            total = num_attacked(self._workload, job.attack)
            # A look at the examples, and for each restart its steps, forward and back, and a look.
            restarts = job.attack.restarts if job.attack.kind == "pgd" else 1
            turns = self._turns(total, size) * (1 + restarts * (2 * job.attack.num_steps + 1))
            peak = self._measure(self._run_attack).peak_bytes(min(size, total))
            phases.append(self._pass("attack", tuned, peak, turns))
        # One file after another, and from a GPU by way of the host's memory.
        copies = 1 + job.cluster.use_gpu
        files = {"a file": copies * max(optimizer + later["movement"], self._whole)}
        if self._is_sharded:
            largest = max(bytes_of([p]) for p in self._model.parameters())
            files = {"shards": self._own + optimizer, "one tensor": 2 * largest}
        return [*phases, _phase("write", tuned, files | {"packed masks": self.num_prunable // 4})]

    def _build(self, base: dict[str, int]) -> Phase:
        if not self._is_sharded or not self._is_blank:
            # A copy of the network counts its multiply-adds.
            held = {"as built": self._whole * self._is_sharded, "copy": self._whole}
            return _phase("build", base, held | {"pass": self._forward.peak_bytes(1)})
        modules = self._model.modules()
        own = ((*m.parameters(recurse=False), *m.buffers(recurse=False)) for m in modules)
        return _phase("build", base, {"as built": max(map(bytes_of, own))})

    def _pass(self, name: str, held: dict[str, int], peak: int, turns: int, sent: int = 0) -> Phase:
        """Predict a phase of passes, which copies the buffers to put them back."""
        moment = {"buffers": self._buffers, "gathered": self._gathered, "pass": peak}
        return _phase(name, held, moment, sent=sent + turns * self._gathering)

    def _train(self, name: str, recipe: Recipe, held: dict[str, int], steps: int) -> Phase:
        trained = trainable_parameters(self._model, recipe.freeze)
        whole, rows = bytes_of(trained.values()), self._rows(trained.values())
        own = rows if self._is_sharded else whole
        size = min(recipe.batch_size, num_examples(self._workload.train))
        parts = min(recipe.microbatches, size)
        footprint = self._measure_training(name, recipe)
        # Measured whole: the last step's gradients beside this one's sums, the optimizer's state
        # and the average.
        known = 2 * whole + self._optimizer(recipe, is_whole=True)
        known += self._whole * (recipe.ema_decay > 0)
        passing = {"gradients": own + rows, "gathered": self._gathered}
        passing["in flight"] = largest_exchange(trained, self._world_size)[1]
        passing["pass"] = footprint.peak_bytes(-(-size // parts), known)
        stepping = {"gradients": 2 * own, "step": footprint.peak_bytes(0, known, own / whole)}
        held = held | {"average": self._own * (recipe.ema_decay > 0)}
        held["optimizer"] = self._optimizer(recipe)
        turns = self._turns(parts)
        # A change of each buffer, of each counter one, and the loss.
        changes = [b.numel() if b.is_floating_point() else 1 for b in self._model.buffers()]
        sent = (turns + 1) * self._share(4 * (sum(changes) + 1)) + 2 * turns * self._gathering
        # Sums of a replicated network are gathered at the end.
        sent += (turns + (not self._is_sharded)) * (self._world_size - 1) * rows
        return _phase(name, held, passing, stepping, sent=steps * sent)

    def _score(self, kept: dict[str, int]) -> Phase:
        prune, total, owned = self._job.prune, self.num_prunable, self.num_owned
        footprint, others = self._measure_scoring(), self._world_size - 1
        if not self.num_passes and not prune.spec.feeds_ones:
            # Layer by layer, each rank its own slices.
            return _phase("score", kept, {"pass": footprint.peak_bytes(1) * owned // total})
        size = min(prune.calibration_batch_size, self.calibration_examples)
        turns = self._turns(self.calibration_examples, size)
        # Measured with the sum over all weights or of all layers' moments; data-free criteria have
        # none.
        num_summed, most, num_told = self._size_sums()
        held = {"statistic": 8 * most}
        moment = {"gathered": self._gathered, "pass": footprint.peak_bytes(size, 8 * num_summed)}
        scored = {unit.name: unit.parameter for unit in self._units}
        if criterion(prune.criterion).of_gradients is not None:
            bucket, in_flight = largest_exchange(scored, self._world_size)
            moment["in flight"] = in_flight
            finish = {"scores": footprint.peak_bytes(0, 8 * num_summed, owned / total)}
            if self._is_sharded:
                # Gradients leave as they arrive, or wait in a bucket for its last one.
                moment["pass"] = self._measure(self._run_backward).peak_bytes(size)
                moment["in flight"] += bucket
            by_layer = zip(*self._layout.by_rank, strict=True)
            longest = (max(piece.size for piece in pieces) for pieces in by_layer)
            rows = sum(n * p.element_size() for n, p in zip(longest, scored.values(), strict=True))
            sent = turns * (others * rows + 2 * self._gathering)
            return _phase("score", kept | held, moment, finish, sent=sent)
        item = reduce(torch.promote_types, (p.dtype for p in scored.values())).itemsize
        moment["gathered"] += self._whole * self._is_sharded
        # A batch's vector as it is made, sent and received, in equal parts, each as the largest.
        vectors = {
            "gathered": moment["gathered"],
            "vectors": (num_summed + 2 * self._world_size * most) * item * (others > 0),
        }
        sent = others * (most * self.num_passes * turns * item + 8 * num_told)
        return _phase("score", kept | held, moment, vectors, sent=sent + self._gathering)

    def _size_sums(self) -> tuple[int, int, int]:
        """Count elements of the sums of scoring: in all, on the rank with most, and told to all.

        Between passes ranks tell each other the sums, and what they make of moments at the end.
        """
        if (rule := criterion(self._job.prune.criterion).layers) is None:
            passes, owned = self.num_passes, self.num_owned
            has_sums = passes > 0
            return has_sums * self.num_prunable, has_sums * owned, max(0, passes - 1) * owned
        moments = LayerMoments(rule, self._model, self._units, self._job.prune)
        sizes = [unit.parameter.numel() for unit in self._units]
        cuts = list(pairwise(moments.deal(self._world_size)))
        most = max(moments.starts[stop] - moments.starts[start] for start, stop in cuts)
        return moments.size, most, max(sum(sizes[start:stop]) for start, stop in cuts)

    def _decide(self, kept: dict[str, int]) -> Phase:
        total, owned, world_size = self.num_prunable, self.num_owned, self._world_size
        held = {"scores": 4 * owned, "exempt": owned * (self._job.prune.pattern is not None)}
        if self._is_sharded:
            largest = max(unit.parameter.numel() for unit in self._units)
            held |= {"new masks": owned, "one layer": 2 * largest}
        else:
            bits = owned // 4 + total // 8 if world_size > 1 else 0
            held |= {"new masks": total, "bits": bits}
        # A sample of the scores, four rounds of counts, and a bit for each weight.
        sent = self._share(min(_SAMPLED_BYTES, total // 16))
        sent += 8 * self._share(2048 * len(self._units)) + (world_size - 1) * -(-owned // 8)
        return _phase("decide", kept, held, sent=sent)

    def _refit(self, kept: dict[str, int]) -> Phase:
        prune, world_size = self._job.prune, self._world_size
        size = min(prune.calibration_batch_size, self.calibration_examples)
        turns = self._turns(self.calibration_examples, size)
        refit = measure_refit(self._model, self._few, prune, self._batch, turns)
        held, sent = kept, refit.sent_bytes(turns, world_size)
        if self._is_sharded:
            # Of both networks; three passes of one and two of the other, and the dense weights.
            largest = max(unit.parameter.numel() for unit in self._units)
            held = kept | {"gathered": self._gathered_to_refit, "one layer": 6 * largest}
            sent += 6 * self._gathering
        moments = refit.moments(self.calibration_examples, size, world_size)
        return _phase("reconstruct", held, *moments, sent=sent)


def _phase(name: str, held: dict[str, int], *moments: dict[str, int], sent: int = 0) -> Phase:
    """Make a phase of what it holds all along and of the moment that adds most."""
    most = max(moments, key=lambda moment: sum(moment.values()))
    parts = {part: num_bytes for part, num_bytes in (held | most).items() if num_bytes}
    return Phase(name, sum(parts.values()), parts, sent)
