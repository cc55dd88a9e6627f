"""What each phase of a job holds and sends on a rank, from sizes and small passes alone.

The arithmetic of `plan`. Memory is counted in bytes of tensors and arrays; the interpreter with its
libraries, about 0.4 GB, and the data come on top. Activations are told from small real passes
(`footprint`), all else from sizes:

    P, B    bytes of the parameters, of the buffers
    T       bytes of the trainable parameters
    N, S    prunable weights; the most that a rank owns of them, about N / W
    e       bytes of a prunable weight
    O       state of the optimizer: T for sgd with momentum, 2 T for adam and adamw
    A(b)    peak of a pass over b examples, gradients in flight and vectors of its own included,
            the sum that it adds to not

Of a range of workers W is the most.

Strategy "replicated": each rank holds the whole model. Held all along:

    model P + B, masks N, the dense weights P + B with rewind = "weights", the teacher P + B with
    distillation, O from the first fine-tuning on (not with a rewind), movement's sums 8 N

To which each phase adds the greatest of what it holds at its moments:

    build       the forward pass of one example, which counts multiply-adds
    pretrain    O + T (the last step's gradients) + T / W (this one's sum) + B + A(part), or 2 T
    finetune    while they are put together; O is held all along in finetune;
                movement: or T + 24 times the largest layer
    score       8 S (the sum) + A(batch), or 8 S + N e + 8 N while a criterion's own vector is
                added (W > 1: 8 S + 3 N e); criteria without a pass: as measured, once
    decide      4 S (scores) + S (n:m: what the pattern exempts) + N (the new masks; W > 1: and
                S / 4 + N / 8 while their bits are exchanged)
    batchnorm   the forward pass of a batch
    evaluate    the forward pass of a batch + B
    write       O + 3 (P + B) + N / 4, on the first rank

While W > 1 ranks exchange gradients, a bucket of some 4 MB of them (`folding`) is in flight beside
them, as sent and as received. Bytes per weight of the scoring statistic are so 8 / W for every
criterion. Those of gradients alone (taylor, snip, taylor_squared) hold no vector; fisher, obd and a
user's own hold one of e (fisher: one for each example of a chunk), grasp the sum of its first pass,
8, on every rank.

A rank sends, each round, with n turns of all ranks over the batches or parts, and rows padded to
those of the rank that has most:

    score       passes * n * (W - 1) * S e, and (W - 1) * 8 S between two passes
    decide      (W - 1) * S / 8 for the masks; samples and counts, a few megabytes at most
    finetune    (n + 1) * (W - 1) * (T + B) / W for each step
    batchnorm   (n * 4 + 8) * (W - 1) / W for each running statistic

Strategy "fsdp": each rank holds its rows, p, n, t and o of the parameters, the prunable weights,
the trainable ones and the optimizer's state, each about a W-th; and the buffers B. G is the largest
group that FSDP2 gathers at once, R the outermost one, which stays gathered through a pass:

    all along   p + B + n, and what is asked for of rows as above: dense weights, teacher, o, 8 n
    a pass      R + 3 G (a group's weights, and the next one's twice while they arrive) + A(batch)
    build       the network as built, P + B, unless it is built on the meta device; then the
                largest layer
    pretrain    o + 2 t (the last step's gradients and this one's) + B + a pass
    score       8 S + a pass + a bucket of gradients that waits for its last one; criteria with
                passes of their own: 8 S + P + as replicated
    decide      4 S + S as replicated, + S (the new masks) + twice the largest layer of them
    write       p + o (the shards), the largest tensor twice, N / 4; the whole file lies on disk

A rank sends what a replicated one sends, but for finetune's gathering of gradients; each pass of
each turn gathers the weights twice (once without a backward pass), (W - 1) p a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gbp_ray.config import JobConfig, Recipe
from gbp_ray.pruning.criteria import criterion
from gbp_ray.pruning.folding import GradientSums, largest_exchange
from gbp_ray.pruning.footprint import Footprint, measure_footprint
from gbp_ray.pruning.masks import prunable_parameters
from gbp_ray.pruning.ranks import Ranks, isolated
from gbp_ray.pruning.saliency import score
from gbp_ray.pruning.sharding import group_parameters
from gbp_ray.pruning.slices import Layout, cut_rows
from gbp_ray.pruning.training import num_steps
from gbp_ray.workload import Workload, num_examples, take_batch

__all__ = ["Passes", "Phase", "Sizes", "bytes_of", "plan_phases"]

_LEAST_NORM_BATCH = 32
_SAMPLED_BYTES = 2**19  # of the scores, for a threshold's bracket, over all ranks


@dataclass(frozen=True)
class Phase:
    """One phase on one rank.

    Attributes:
        name: As in the module's docstring.
        num_bytes: Peak of what is held.
        held: The parts of it, in bytes.
        sent_bytes: What this rank sends to others in each round (pretrain: once).
    """

    name: str
    num_bytes: int
    held: dict[str, int]
    sent_bytes: int = 0


# -- sizes -----------------------------------------------------------------------------------------


class Sizes:
    """The letters of the module's docstring for one job."""

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
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.trainable_bytes = sum(map(bytes_of, trainable.values()))
        prunable = {n: p for n, p in model.named_parameters() if n in {u.name for u in units}}
        _, self.sent_in_training = largest_exchange(trainable, self.world_size)
        self.bucket_bytes, self.sent_in_scoring = largest_exchange(prunable, self.world_size)
        self.layer_rows = sum(
            max(pieces[number].size for pieces in layout.by_rank) * unit.parameter.element_size()
            for number, unit in enumerate(units)
        )
        self.trainable_rows = sum(
            cut_rows("", p.shape, self.world_size)[0].size * p.element_size()
            for p in trainable.values()
        )
        # A change of each buffer, of each counter one, and the loss.
        changes = sum(b.numel() if b.is_floating_point() else 1 for b in model.buffers())
        self.beside_bytes = 4 * (changes + 1)
        rule = criterion(job.prune.criterion)
        self.num_passes = 1 if rule.of_gradients is not None else len(rule.passes)
        self.statistic_elements = sum(
            statistic.numel()
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for statistic in (module.running_mean, module.running_var)
            if statistic is not None
        )
        self.state_bytes = sum(map(bytes_of, model.state_dict().values()))
        self.pretrain_steps = num_steps(job.pretrain, workload, job.pretrain.epochs)
        self.finetune_steps = num_steps(job.finetune, workload, job.finetune.epochs)
        available = num_examples(workload.train)
        self.calibration_examples = min(job.prune.calibration_examples, available)
        self.norm_examples = min(job.prune.batchnorm_examples, available)
        self.largest_rows = max(
            pieces[number].size for pieces in layout.by_rank for number in range(len(units))
        )
        self.shards = _Shards.of(model, self.world_size, is_blank=is_blank)

    def rows_of(self, num_bytes: int) -> int:
        """Computes what a rank holds of something shaped like the trainable parameters."""
        return num_bytes * self.trainable_rows // max(1, self.trainable_bytes)

    def optimizer_bytes(self, recipe: Recipe) -> int:
        """Computes what a recipe's optimizer keeps of the whole network."""
        if recipe.optimizer == "sgd":
            return self.trainable_bytes if recipe.momentum > 0 else 0
        return 2 * self.trainable_bytes

    @property
    def kept_optimizer_bytes(self) -> int:
        """What the optimizer of the fine-tuning keeps of the whole network."""
        return self.optimizer_bytes(self.job.finetune) if self.finetune_steps else 0

    @property
    def movement_bytes(self) -> int:
        """What movement has gathered, of the whole network."""
        return 8 * self.num_prunable if self.job.prune.criterion == "movement" else 0

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


# -- passes ----------------------------------------------------------------------------------------


class Passes:
    """A(b) of the passes of a job, from small real ones that leave the model as it was."""

    def __init__(self, job: JobConfig, workload: Workload, model: nn.Module) -> None:
        self._job, self._workload, self._model = job, workload, model
        self._units = prunable_parameters(model, job.prune.exclude)
        self._movement = {
            unit.name: torch.zeros(unit.parameter.shape, dtype=torch.float64)
            for unit in self._units
        }
        self.forward = self._measure(self._run_forward)
        self.training = self._measure(self._run_training) if self._trains() else None
        self.scoring = self._measure(self._run_scoring)
        self.backward = self._measure(self._run_backward)

    def _trains(self) -> bool:
        return self._job.pretrain.epochs > 0 or self._job.finetune.epochs > 0

    def _measure(self, run: Callable[[int], object]) -> Footprint:
        modes = {module: module.training for module in self._model.modules()}
        try:
            with isolated(self._model, 0):
                return measure_footprint(run)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _batch(self, size: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(size) % num_examples(self._workload.train)
        return take_batch(self._workload, self._workload.train, indices, augment_seed=0)

    @torch.no_grad()
    def _run_forward(self, size: int) -> object:
        self._model.eval()
        inputs, targets = self._batch(size)
        return self._workload.loss(self._model(inputs), targets)

    def _run_training(self, size: int) -> object:
        self._model.train()
        trainable = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        pieces = {name: cut_rows(name, p.shape, 1) for name, p in trainable.items()}
        sums = GradientSums(
            Ranks(), trainable, trainable, pieces, [1.0], lambda gradient, weight, share: gradient
        )
        inputs, targets = self._batch(size)
        with sums.listening(), sums.turn():
            self._workload.loss(self._model(inputs), targets).backward()
        return sums

    def _run_backward(self, size: int) -> object:
        """Takes the gradients of the prunable weights and drops them as they arrive."""
        self._model.eval()

        def drop(leaf: Tensor) -> None:
            leaf.grad = None

        frozen = [p for p in self._model.parameters() if p.requires_grad]
        hooks = []
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for unit in self._units:
                unit.parameter.requires_grad_(True)
                hooks.append(unit.parameter.register_post_accumulate_grad_hook(drop))
            inputs, targets = self._batch(size)
            self._workload.loss(self._model(inputs), targets).backward()
        finally:
            for hook in hooks:
                hook.remove()
            for unit in self._units:
                unit.parameter.requires_grad_(False)
            for parameter in frozen:
                parameter.requires_grad_(True)
        return None

    def _run_scoring(self, size: int) -> object:
        small = {"calibration_examples": size, "calibration_batch_size": size}
        config = self._job.prune.model_copy(update=small)
        return score(
            self._model, self._units, self._workload, config, Ranks(), movement=self._movement
        )


# -- phases ----------------------------------------------------------------------------------------


def _plan_replicated(sizes: Sizes, passes: Passes) -> list[Phase]:
    job = sizes.job
    base = {"model": sizes.model_bytes, "masks": sizes.num_prunable}
    later = dict(base)
    if job.prune.rewind == "weights":
        later["dense weights"] = sizes.state_bytes
    if job.finetune.distillation.weight > 0:
        later["teacher"] = sizes.model_bytes
    if sizes.movement_bytes:
        later["movement"] = sizes.movement_bytes
    kept = dict(later)
    if job.prune.rewind == "none" and sizes.kept_optimizer_bytes:
        kept["optimizer"] = sizes.kept_optimizer_bytes
    tuned = later | {"optimizer": sizes.kept_optimizer_bytes}
    phases = [_phase("build", base, {"pass": passes.forward.peak_bytes(1)})]
    if sizes.pretrain_steps:
        optimizer = {"optimizer": sizes.optimizer_bytes(job.pretrain)}
        phases.append(
            _phase(
                "pretrain",
                base | optimizer,
                *_training_moments(sizes, passes, job.pretrain, is_finetune=False),
                sent=sizes.pretrain_steps * _sent_by_step(sizes, job.pretrain),
            )
        )
    phases.append(
        _phase("score", kept, *_scoring_moments(sizes, passes), sent=_sent_by_scoring(sizes))
    )
    phases.append(_phase("decide", kept, *_deciding_moments(sizes), sent=_sent_by_decision(sizes)))
    if sizes.norm_examples and sizes.statistic_elements:
        batch = max(job.prune.calibration_batch_size, _LEAST_NORM_BATCH)
        num_batches = -(-sizes.norm_examples // batch)
        turns = sizes.num_turns(num_batches)
        held = {
            "sums": 8 * sizes.statistic_elements + sizes.buffer_bytes,
            "pass": passes.forward.peak_bytes(min(batch, sizes.norm_examples)),
        }
        sent = sizes.sent_share((4 * turns + 8) * sizes.statistic_elements)
        phases.append(_phase("batchnorm", kept, held, sent=sent))
    if sizes.finetune_steps:
        phases.append(
            _phase(
                "finetune",
                tuned,
                *_training_moments(sizes, passes, job.finetune, is_finetune=True),
                sent=sizes.finetune_steps * _sent_by_step(sizes, job.finetune),
            )
        )
    batch = min(job.workload.eval_batch_size, num_examples(sizes.workload.test))
    held = {"buffers": sizes.buffer_bytes, "pass": passes.forward.peak_bytes(batch)}
    phases.append(_phase("evaluate", tuned, held))
    files = {
        "state": sizes.kept_optimizer_bytes + sizes.movement_bytes,
        "weights": 3 * sizes.state_bytes,
        "packed masks": sizes.num_prunable // 4,
    }
    phases.append(_phase("write", tuned, files))
    return phases


def _plan_fsdp(sizes: Sizes, passes: Passes) -> list[Phase]:
    job, shards = sizes.job, sizes.shards
    base = {"rows of the model": shards.model_bytes, "masks": sizes.stretch}
    later = dict(base)
    if job.prune.rewind == "weights":
        later["dense weights"] = shards.model_bytes
    if job.finetune.distillation.weight > 0:
        later["teacher"] = shards.model_bytes
    if sizes.movement_bytes:
        later["movement"] = 8 * sizes.stretch
    kept = dict(later)
    optimizer = sizes.rows_of(sizes.kept_optimizer_bytes)
    if job.prune.rewind == "none" and optimizer:
        kept["optimizer"] = optimizer
    tuned = later | {"optimizer": optimizer}
    built = shards.largest_layer_bytes if shards.is_blank else sizes.model_bytes
    phases = [_phase("build", base, {"as built": built})]
    gathered = {"gathered": shards.gathered_bytes}

    def trained(name: str, recipe: Recipe, held: dict[str, int], steps: int) -> Phase:
        assert passes.training is not None
        part = sizes.part_size(recipe)
        activations = max(0, passes.training.peak_bytes(part) - sizes.trainable_bytes)
        if name == "finetune" and job.finetune.distillation.weight > 0:
            activations += passes.forward.peak_bytes(part)
        moment = gathered | {
            "gradients": 2 * sizes.trainable_rows,
            "buffers": sizes.buffer_bytes,
            "in flight": sizes.sent_in_training,
            "pass": activations,
        }
        turns = sizes.num_turns(min(recipe.microbatches, recipe.batch_size))
        others = sizes.world_size - 1
        sent = steps * turns * (others * sizes.trainable_rows + 2 * shards.sent_by_gathering)
        return _phase(name, held, moment, sent=sent)

    if sizes.pretrain_steps:
        first = {"optimizer": sizes.rows_of(sizes.optimizer_bytes(job.pretrain))}
        phases.append(trained("pretrain", job.pretrain, base | first, sizes.pretrain_steps))
    phases.append(_sharded_scoring(sizes, passes, kept))
    stretch = sizes.stretch
    marked = _scores_of(sizes) | {"new masks": stretch, "one layer": 2 * sizes.largest_layer}
    phases.append(_phase("decide", kept, marked, sent=_sent_by_decision(sizes)))
    if sizes.norm_examples and sizes.statistic_elements:
        batch = max(job.prune.calibration_batch_size, _LEAST_NORM_BATCH)
        turns = sizes.num_turns(-(-sizes.norm_examples // batch))
        held = gathered | {
            "sums": 8 * sizes.statistic_elements + sizes.buffer_bytes,
            "pass": passes.forward.peak_bytes(min(batch, sizes.norm_examples)),
        }
        sent = sizes.sent_share((4 * turns + 8) * sizes.statistic_elements)
        phases.append(_phase("batchnorm", kept, held, sent=sent + turns * shards.sent_by_gathering))
    if sizes.finetune_steps:
        phases.append(trained("finetune", job.finetune, tuned, sizes.finetune_steps))
    batch = min(job.workload.eval_batch_size, num_examples(sizes.workload.test))
    turns = sizes.num_turns(-(-num_examples(sizes.workload.test) // batch))
    held = gathered | {"buffers": sizes.buffer_bytes, "pass": passes.forward.peak_bytes(batch)}
    # After the prune and after the fine-tuning.
    sent = 2 * turns * shards.sent_by_gathering
    phases.append(_phase("evaluate", tuned, held, sent=sent))
    rows = shards.model_bytes + optimizer
    files = {
        "shards": rows,
        "one tensor": 2 * shards.largest_tensor_bytes,
        "packed masks": sizes.num_prunable // 4,
    }
    phases.append(_phase("write", tuned, files))
    return phases


def _sharded_scoring(sizes: Sizes, passes: Passes, kept: dict[str, int]) -> Phase:
    prune, shards = sizes.job.prune, sizes.shards
    if not sizes.num_passes and prune.criterion != "synflow":
        return _phase(
            "score", kept, {"scores": 4 * sizes.stretch, "widened": 24 * sizes.largest_rows}
        )
    if criterion(prune.criterion).of_gradients is None:
        whole = {"gathered": sizes.model_bytes + shards.gathered_bytes}
        moments = (whole | moment for moment in _scoring_moments(sizes, passes))
        return _phase(
            "score", kept, *moments, sent=_sent_by_scoring(sizes) + shards.sent_by_gathering
        )
    batch = min(prune.calibration_batch_size, sizes.calibration_examples)
    turns = sizes.num_turns(-(-sizes.calibration_examples // prune.calibration_batch_size))
    moment = {
        "statistic": 8 * sizes.stretch,
        "gathered": shards.gathered_bytes,
        "pass": passes.backward.peak_bytes(batch),
        # The pass was measured dropping each gradient as it arrives.
        "in flight": sizes.bucket_bytes + sizes.sent_in_scoring,
    }
    finished = {"statistic": 8 * sizes.stretch, "scores": 4 * sizes.stretch}
    finished["widened"] = 24 * sizes.largest_rows
    sent = _sent_by_scoring(sizes) + 2 * turns * shards.sent_by_gathering
    return _phase("score", kept, moment, finished, sent=sent)


_PHASES_OF: dict[str, Callable[[Sizes, Passes], list[Phase]]] = {
    "replicated": _plan_replicated,
    "fsdp": _plan_fsdp,
}


def _phase(name: str, held: dict[str, int], *moments: dict[str, int], sent: int = 0) -> Phase:
    """Makes a phase of what is held all along and of the moment that adds most."""
    most = max(moments, key=lambda moment: sum(moment.values()))
    parts = {part: num_bytes for part, num_bytes in (held | most).items() if num_bytes}
    return Phase(name, sum(parts.values()), parts, sent)


def _training_moments(
    sizes: Sizes, passes: Passes, recipe: Recipe, *, is_finetune: bool
) -> Iterator[dict[str, int]]:
    assert passes.training is not None
    whole, own = sizes.trainable_bytes, sizes.trainable_rows
    part = sizes.part_size(recipe)
    # The pass was measured together with a sum over all of the parameters.
    activations = max(0, passes.training.peak_bytes(part) - whole)
    if is_finetune and sizes.job.finetune.distillation.weight > 0:
        # The teacher's pass comes while the activations wait.
        activations += passes.forward.peak_bytes(part)
    held = {"buffers": sizes.buffer_bytes, "in flight": sizes.sent_in_training}
    yield held | {"gradients": whole + own, "pass": activations}
    yield held | {"gradients": 2 * whole}
    if is_finetune and sizes.movement_bytes:
        yield held | {"gradients": whole, "-w g": 24 * sizes.largest_layer}


def _scoring_moments(sizes: Sizes, passes: Passes) -> Iterator[dict[str, int]]:
    prune = sizes.job.prune
    if not sizes.num_passes:
        yield {"pass": passes.scoring.peak_bytes(1)}
        return
    batch = min(prune.calibration_batch_size, sizes.calibration_examples)
    total, statistic = sizes.num_prunable, {"statistic": 8 * sizes.stretch}
    vector = total * sizes.weight_bytes
    # The pass was measured together with a sum over all of the weights.
    alone = max(0, passes.scoring.peak_bytes(batch) - 8 * total)
    if criterion(prune.criterion).of_gradients is not None:
        yield statistic | {"pass": alone, "in flight": sizes.sent_in_scoring}
        return
    yield statistic | {"pass": alone}
    yield statistic | {"vectors": 3 * vector if sizes.world_size > 1 else vector + 8 * total}


def _scores_of(sizes: Sizes) -> dict[str, int]:
    is_patterned = sizes.job.prune.pattern is not None
    return {"scores": 4 * sizes.stretch, "exempt": sizes.stretch if is_patterned else 0}


def _deciding_moments(sizes: Sizes) -> Iterator[dict[str, int]]:
    stretch, total = sizes.stretch, sizes.num_prunable
    bits = stretch // 4 + total // 8 if sizes.world_size > 1 else 0
    yield _scores_of(sizes) | {"new masks": total, "bits": bits}


def _sent_by_step(sizes: Sizes, recipe: Recipe) -> int:
    size = min(recipe.batch_size, num_examples(sizes.workload.train))
    turns = sizes.num_turns(min(recipe.microbatches, size))
    others = sizes.world_size - 1
    return (turns + 1) * (others * sizes.trainable_rows + sizes.sent_share(sizes.beside_bytes))


def _sent_by_scoring(sizes: Sizes) -> int:
    prune = sizes.job.prune
    turns = sizes.num_turns(-(-sizes.calibration_examples // prune.calibration_batch_size))
    others = sizes.world_size - 1
    if criterion(prune.criterion).of_gradients is not None:
        return turns * others * sizes.layer_rows
    reduced = sizes.num_passes * turns * others * sizes.stretch * sizes.weight_bytes
    return reduced + max(0, sizes.num_passes - 1) * others * 8 * sizes.stretch


def _sent_by_decision(sizes: Sizes) -> int:
    others = sizes.world_size - 1
    # A sample of the scores, four rounds of counts, and a bit for each weight.
    sampled = min(_SAMPLED_BYTES, sizes.num_prunable // 16)
    counted = 4 * 2 * sizes.sent_share(2048 * sizes.num_layers)
    return sizes.sent_share(sampled) + counted + others * -(-sizes.stretch // 8)


def plan_phases(sizes: Sizes, passes: Passes) -> list[Phase]:
    """Plans the phases of a job under its strategy."""
    return _PHASES_OF[sizes.job.cluster.strategy](sizes, passes)
