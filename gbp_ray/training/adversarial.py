"""Adversarial examples: inputs changed within a small box so that the loss rises the most.

A box holds what differs from an input by at most epsilon in each intensity and is an input still,
from dark to bright. Sizes are in intensities and turned into the network's own units by the range
of its inputs (`Workload.input_range`), so epsilon means the same with and without normalisation. An
augmented input that leaves the range is drawn into it.

    fgsm    x + epsilon * sign(gradient of the loss at x)
    pgd     from a random point of the box, again and again: a step along the gradient's sign, then
            back into the box

While an example is made the network is in eval mode: BatchNorm normalises by its running
statistics, which do not move, and dropout is off. So an example depends on the network and on its
own seed only, never on its neighbours or on its rank. Weights get no gradient.

Sources: Goodfellow, Shlens and Szegedy 2015 (1412.6572), section 4; Madry, Makelov, Schmidt,
Tsipras and Vladu 2018 (1706.06083), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gbp_ray.config.attack import AttackConfig, Perturbation
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import is_sharded
from gbp_ray.errors import ConfigError, WorkloadError
from gbp_ray.training.progress import OnProgress, deal_batches, ignore_progress
from gbp_ray.workloads.batch import Batch, forward, kind_of, size_of, take_part, tensors_in
from gbp_ray.workloads.checks import Checked, blaming_labels, check_labels
from gbp_ray.workloads.contract import (
    Workload,
    bounds_of_inputs,
    check_range,
    count_top1,
    in_mode,
    judged_split,
    num_examples,
)
from gbp_ray.workloads.data import cut_batches, derive_seed, first_example, take_batch
from gbp_ray.workloads.losses import batch_loss, check_share, count_right, loss_of, mark_right

__all__ = [
    "check_answers",
    "check_attack",
    "num_attacked",
    "perturb",
    "robust_accuracy",
]


def perturb(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    workload: Workload,
    inputs: Tensor,
    attack: Perturbation,
    seed: int,
    key: str,
) -> Tensor:
    """Makes adversarial examples of a batch. Communicates where the network is sharded.

    Args:
        model: What `loss_of` passes them through; left as it was found.
        loss_of: Perturbed inputs -> the loss to be raised, a scalar.
        inputs: (B, ...) prepared examples.
        seed: Of the random start.
        key: Dotted name of the section, for messages.

    Returns:
        Inputs of the same shape, without a gradient.
    """
    low, high = bounds_of_inputs(workload.input_range, inputs, f"{key}.kind")
    reach, stride = attack.epsilon * (high - low), attack.step * (high - low)
    centre = inputs.clamp(low, high)
    lowest, highest = (centre - reach).clamp(min=low), (centre + reach).clamp(max=high)
    changed = centre
    if attack.kind == "pgd":
        # Drawn by the CPU, which draws alike on every machine.
        generator = torch.Generator().manual_seed(derive_seed(seed, "start"))
        noise = torch.rand(inputs.shape, generator=generator, dtype=inputs.dtype)
        changed = (centre + reach * (2 * noise.to(inputs.device) - 1)).clamp(lowest, highest)
    with (
        in_mode(model, is_training=False),
        isolated(model, derive_seed(seed, "attack")),
        torch.enable_grad(),
    ):
        for _ in range(attack.num_steps):
            changed = changed.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(changed), changed)
            changed = (changed.detach() + stride * gradient.sign()).clamp(lowest, highest)
    return changed.detach()


def check_attack(workload: Workload, model: nn.Module, attack: Perturbation, key: str) -> None:
    """Tries an attack on one example.

    Raises:
        ConfigError: The workload names no range of its inputs, or the loss does not depend on them.
        WorkloadError: The inputs leave that range.
    """
    if attack.kind == "none":
        return
    batch = first_example(workload)
    inputs = _attackable(batch, key)
    check_range(inputs, *bounds_of_inputs(workload.input_range, inputs, f"{key}.kind"))
    briefly = attack.model_copy(update={"steps": 1, "step_size": attack.step})
    try:
        perturb(
            model,
            lambda seen: batch_loss(model, workload, batch._replace(inputs=seen)),
            *(workload, inputs, briefly, 0, key),
        )
    except RuntimeError as error:
        if "does not require grad" not in str(error) and "not have been used" not in str(error):
            raise
        raise ConfigError(
            f"{key}.kind = {attack.kind}: the loss has no gradient in the network's inputs, so no "
            "attack finds its way; set it to none"
        ) from error


def check_answers(attack: AttackConfig, checked: Checked) -> None:
    """Raises ConfigError where right answers under attack could not be counted."""
    if attack.kind == "none":
        return
    batch = checked.first_batch
    try:
        _find_right(
            checked.workload, "train", checked.outputs, batch.targets, size_of(batch.targets)
        )
    except WorkloadError as error:
        raise ConfigError(
            f"attack.kind = {attack.kind}: right answers cannot be counted ({error}); set it to "
            "none"
        ) from error


def _attackable(batch: Batch, key: str) -> Tensor:
    if not batch.is_pair or not isinstance(batch.inputs, Tensor):
        raise ConfigError(
            f"{key}.kind: an attack changes the inputs of pairs of tensors, and batches are "
            f"{kind_of(batch.nest)}; set it to none"
        )
    return batch.inputs


def robust_accuracy(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    attack: AttackConfig,
    batch_size: int,
    on_progress: OnProgress = ignore_progress,
) -> float:
    """Measures accuracy under attack on the first examples that judge rounds. Communicates.

    Returns:
        A share in [0, 1] of the examples, or under the built-in count of their labels.
    """
    split = judged_split(workload)
    data = getattr(workload, split)
    total = num_attacked(workload, attack)
    batches = cut_batches(total, batch_size)
    right, asked = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    num_restarts = attack.restarts if attack.kind == "pgd" else 1
    model.eval()

    def measure(item: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(batches[item].start, batches[item].stop)
        batch = take_batch(workload, data, indices, device=ranks.device)
        targets = batch.targets

        def loss_under(seen: Tensor) -> Tensor:
            outputs = forward(model, workload, batch._replace(inputs=seen))
            return loss_of(workload, outputs, targets)

        def find_right(seen: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), isolated(model, derive_seed("attack", item)):
                outputs = forward(model, workload, batch._replace(inputs=seen))
                check_labels(workload, split, indices, outputs, targets)
                return _find_right(workload, split, outputs, targets, len(indices))

        with blaming_labels(workload, model, split, indices):
            still, is_asked = find_right(batch.inputs)
            for restart in range(num_restarts):
                seed = derive_seed("attack", item, restart)
                attacked = perturb(
                    model, loss_under, workload, batch.inputs, attack, seed, "attack"
                )
                still &= find_right(attacked)[0]
        return still.sum(), is_asked.sum()

    def measure_own() -> None:
        for item in deal_batches(ranks, len(batches), "evaluate", on_progress):
            if item is not None:
                counts = measure(item)
                right.add_(counts[0])
                asked.add_(counts[1])
            elif is_sharded(model):
                # All ranks pass through a sharded network.
                measure(0)

    ranks.run_collectively(measure_own, communicates=is_sharded(model))
    right, asked = ranks.all_reduce_disjoint(right), ranks.all_reduce_disjoint(asked)
    if asked.item() == 0:
        raise WorkloadError(
            f"attack.examples = {attack.examples}: none of the first {total} examples of "
            f"workload.{split} has a label; raise it"
        )
    return right.item() / asked.item()


def num_attacked(workload: Workload, attack: AttackConfig) -> int:
    """Counts the examples that an attack is tried on."""
    return min(attack.examples, num_examples(getattr(workload, judged_split(workload))))


def _find_right(
    workload: Workload, split: str, outputs: Any, targets: Any, size: int
) -> tuple[Tensor, Tensor]:
    """Marks the examples, or labelled positions, that are right, and those that count."""
    if workload.count_correct is count_top1:
        return mark_right(workload, outputs, targets)
    # A workload's own metric only counts, so it is asked for one example after another.
    counts = []
    for row in range(size):
        own = slice(row, row + 1)
        right, _ = count_right(
            workload, take_part(outputs, own, size), take_part(targets, own, size)
        )
        check_share(split, int(right), 1, "asked for a single one")
        counts.append(int(right))
    marks = torch.tensor(counts, dtype=torch.bool, device=next(tensors_in(targets)).device)
    return marks, torch.ones_like(marks)
