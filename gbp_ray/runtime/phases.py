"""What each phase of a job holds and sends on a rank, from sizes and small passes alone.

The arithmetic of `plan`. Memory is counted in bytes of tensors and arrays; the interpreter with its
libraries, about 0.4 GB, and the data come on top. Activations are told from small real passes
(`footprint`), all else from sizes:

    P, B    bytes of the parameters, of the buffers
    T       bytes of the parameters that a training moves, without those it freezes
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

    build       P + B (a copy) + the forward pass of one example, which counts multiply-adds
    pretrain    O + T (the last step's gradients) + T / W (this one's sum) + B + A(part), or 2 T
    finetune    while they are put together; O is held all along in finetune;
                movement: or T + 24 times the largest layer
                (either) ema_decay: T + B all along, or T + 3 times the largest tensor;
                max_gradient_norm: or T + the largest tensor in float64
    score       8 S (the sum) + A(batch), or 8 S + N e + 8 N while a criterion's own vector is
                added (W > 1: 8 S + 3 N e); criteria without a pass: as measured, once
    decide      4 S (scores) + S (n:m: what the pattern exempts) + N (the new masks; W > 1: and
                S / 4 + N / 8 while their bits are exchanged)
    batchnorm   the forward pass of a batch
    evaluate    the forward pass of a batch + B
    attack      a step of the attack on a batch + B
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
    pretrain    o + 2 t (the last step's gradients and this one's) + B + a pass; ema_decay: t + B;
                and of the largest tensor's rows what a replicated network takes of all
    score       8 S + a pass + a bucket of gradients that waits for its last one; criteria with
                passes of their own: 8 S + P + as replicated
    decide      4 S + S as replicated, + S (the new masks) + twice the largest layer of them
    write       p + o (the shards), the largest tensor twice, N / 4; the whole file lies on disk

A rank sends what a replicated one sends, but for finetune's gathering of gradients; each pass of
each turn gathers the weights twice (once without a backward pass), (W - 1) p a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from gbp_ray.config.job import JobConfig
from gbp_ray.config.training import Recipe
from gbp_ray.pruning.criteria import criterion
from gbp_ray.runtime.passes import Passes
from gbp_ray.runtime.sizes import Sizes
from gbp_ray.training.adversarial import num_attacked
from gbp_ray.training.batchnorm import norm_batch_size
from gbp_ray.workloads.contract import num_examples

__all__ = [
    "Phase",
    "plan_phases",
]

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


# -- phases ----------------------------------------------------------------------------------------


def _plan_replicated(sizes: Sizes, passes: Passes) -> list[Phase]:
    job = sizes.job
    base = {"model": sizes.model_bytes, "masks": sizes.num_prunable}
    later = dict(base)
    if job.prune.rewind == "weights":
        later["dense weights"] = sizes.state_bytes
    if sizes.has_teacher:
        later |= {"teacher": sizes.model_bytes, "its answers": sizes.answer_bytes}
    if sizes.movement_bytes:
        later["movement"] = sizes.movement_bytes
    kept = dict(later)
    if job.prune.rewind == "none" and sizes.kept_optimizer_bytes:
        kept["optimizer"] = sizes.kept_optimizer_bytes
    tuned = later | {"optimizer": sizes.kept_optimizer_bytes}
    counted = {"pass": passes.forward.peak_bytes(1), "copy": sizes.model_bytes}
    phases = [_phase("build", base, counted)]
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
        batch = norm_batch_size(job.prune)
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
                tuned | _best_so_far(job, sizes.state_bytes + sizes.kept_optimizer_bytes),
                *_training_moments(sizes, passes, job.finetune, is_finetune=True),
                sent=sizes.finetune_steps * _sent_by_step(sizes, job.finetune),
            )
        )
    batch = min(job.workload.eval_batch_size, sizes.num_judged)
    held = {"buffers": sizes.buffer_bytes, "pass": passes.forward.peak_bytes(batch)}
    phases.append(_phase("evaluate", tuned, held))
    if job.attack.kind != "none":
        held = {
            "buffers": sizes.buffer_bytes,
            "pass": passes.under_attack().peak_bytes(sizes.attacked),
        }
        phases.append(_phase("attack", tuned, held))
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
    if sizes.has_teacher:
        later |= {"teacher": shards.model_bytes, "its answers": sizes.answer_bytes}
    if sizes.movement_bytes:
        later["movement"] = 8 * sizes.stretch
    kept = dict(later)
    optimizer = sizes.rows_of(sizes.kept_optimizer_bytes, job.finetune)
    if job.prune.rewind == "none" and optimizer:
        kept["optimizer"] = optimizer
    tuned = later | {"optimizer": optimizer}
    built = shards.largest_layer_bytes if shards.is_blank else sizes.model_bytes
    copied = 0 if shards.is_blank else sizes.model_bytes
    phases = [_phase("build", base, {"as built": built, "copy": copied})]
    gathered = {"gathered": shards.gathered_bytes}

    def trained(name: str, recipe: Recipe, held: dict[str, int], steps: int) -> Phase:
        part = sizes.part_size(recipe)
        moved = sizes.trained(recipe)
        activations = passes.in_training(recipe).peak_bytes(part) - moved.num_bytes
        activations = max(0, activations)
        if name == "finetune" and sizes.has_teacher and not sizes.answer_bytes:
            activations += passes.forward.peak_bytes(part)
        rows = {"gradients": 2 * moved.rows, "buffers": sizes.buffer_bytes}
        if recipe.ema_decay > 0:
            rows["average"] = moved.rows + sizes.buffer_bytes
        moments = [gathered | rows | {"in flight": moved.sent_bytes, "pass": activations}]
        share = partial(sizes.rows_of, recipe=recipe)
        moments += [rows | moment for moment in _stepping_moments(sizes, recipe, share)]
        turns = sizes.num_turns(min(recipe.microbatches, recipe.batch_size))
        others = sizes.world_size - 1
        sent = steps * turns * (others * moved.rows + 2 * shards.sent_by_gathering)
        return _phase(name, held, *moments, sent=sent)

    if sizes.pretrain_steps:
        first = {"optimizer": sizes.rows_of(sizes.optimizer_bytes(job.pretrain), job.pretrain)}
        phases.append(trained("pretrain", job.pretrain, base | first, sizes.pretrain_steps))
    phases.append(_sharded_scoring(sizes, passes, kept))
    stretch = sizes.stretch
    marked = _scores_of(sizes) | {"new masks": stretch, "one layer": 2 * sizes.largest_layer}
    phases.append(_phase("decide", kept, marked, sent=_sent_by_decision(sizes)))
    if sizes.norm_examples and sizes.statistic_elements:
        batch = norm_batch_size(job.prune)
        turns = sizes.num_turns(-(-sizes.norm_examples // batch))
        held = gathered | {
            "sums": 8 * sizes.statistic_elements + sizes.buffer_bytes,
            "pass": passes.forward.peak_bytes(min(batch, sizes.norm_examples)),
        }
        sent = sizes.sent_share((4 * turns + 8) * sizes.statistic_elements)
        phases.append(_phase("batchnorm", kept, held, sent=sent + turns * shards.sent_by_gathering))
    if sizes.finetune_steps:
        best = _best_so_far(job, shards.model_bytes + optimizer)
        phases.append(trained("finetune", job.finetune, tuned | best, sizes.finetune_steps))
    batch = min(job.workload.eval_batch_size, sizes.num_judged)
    turns = sizes.num_turns(-(-sizes.num_judged // batch))
    held = gathered | {"buffers": sizes.buffer_bytes, "pass": passes.forward.peak_bytes(batch)}
    # After the prune and after the fine-tuning.
    sent = 2 * turns * shards.sent_by_gathering
    phases.append(_phase("evaluate", tuned, held, sent=sent))
    if job.attack.kind != "none":
        turns = sizes.num_turns(-(-num_attacked(sizes.workload, job.attack) // batch))
        held = gathered | {
            "buffers": sizes.buffer_bytes,
            "pass": passes.under_attack().peak_bytes(sizes.attacked),
        }
        # A look at the examples, and for each restart its steps, forward and back, and a look.
        restarts = job.attack.restarts if job.attack.kind == "pgd" else 1
        gatherings = 1 + restarts * (2 * job.attack.num_steps + 1)
        sent = turns * gatherings * shards.sent_by_gathering
        phases.append(_phase("attack", tuned, held, sent=sent))
    rows = shards.model_bytes + optimizer
    files = {
        "shards": rows,
        "one tensor": 2 * shards.largest_tensor_bytes,
        "packed masks": sizes.num_prunable // 4,
    }
    phases.append(_phase("write", tuned, files))
    return phases


def _best_so_far(job: JobConfig, num_bytes: int) -> dict[str, int]:
    """What early stopping keeps to go back to; while a better one is copied, twice."""
    return {"best so far": 2 * num_bytes} if job.finetune.patience else {}


def _sharded_scoring(sizes: Sizes, passes: Passes, kept: dict[str, int]) -> Phase:
    prune, shards = sizes.job.prune, sizes.shards
    if not sizes.num_passes and not prune.spec.feeds_ones:
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
    trained = sizes.trained(recipe)
    whole, own = trained.num_bytes, trained.rows
    part = sizes.part_size(recipe)
    # The pass was measured together with a sum over all of the parameters.
    activations = max(0, passes.in_training(recipe).peak_bytes(part) - whole)
    if is_finetune and sizes.has_teacher and not sizes.answer_bytes:
        # The teacher's pass comes while the activations wait.
        activations += passes.forward.peak_bytes(part)
    held = {"buffers": sizes.buffer_bytes, "in flight": trained.sent_bytes}
    if recipe.ema_decay > 0:
        held["average"] = whole + sizes.buffer_bytes
    for moment in _stepping_moments(sizes, recipe, lambda num_bytes: num_bytes):
        yield held | {"gradients": whole} | moment
    yield held | {"gradients": whole + own, "pass": activations}
    yield held | {"gradients": 2 * whole}
    if is_finetune and sizes.movement_bytes:
        yield held | {"gradients": whole, "-w g": 24 * sizes.largest_layer}


def _stepping_moments(
    sizes: Sizes, recipe: Recipe, share_of: Callable[[int], int]
) -> Iterator[dict[str, int]]:
    """Tells what the greatest tensor takes while gradients are clipped and weights averaged."""
    if recipe.max_gradient_norm is not None:
        # In float64.
        yield {"squares": 2 * share_of(sizes.trained(recipe).largest_bytes)}
    if recipe.ema_decay > 0:
        yield {"average's step": 3 * share_of(sizes.trained(recipe).largest_bytes)}


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
    rows = sizes.trained(recipe).rows
    return (turns + 1) * (others * rows + sizes.sent_share(sizes.beside_bytes))


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
