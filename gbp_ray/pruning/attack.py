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
own seed alone, never on its neighbours or on who makes it. Weights get no gradient.

Sources: Goodfellow, Shlens and Szegedy 2015 (1412.6572), section 4; Madry, Makelov, Schmidt,
Tsipras and Vladu 2018 (1706.06083), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gbp_ray.config import Perturbation
from gbp_ray.errors import ConfigError
from gbp_ray.intensities import bounds_of_inputs, check_range
from gbp_ray.pruning.ranks import isolated
from gbp_ray.workload import (
    Workload,
    derive_seed,
    in_mode,
    take_batch,
)

__all__ = ["perturb", "refuse_unattackable"]


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


def refuse_unattackable(
    workload: Workload, model: nn.Module, attack: Perturbation, key: str
) -> None:
    """Refuses an attack that cannot be made; tries it on one example.

    Raises:
        ConfigError: The workload does not say what range its inputs have, or the loss does not
            depend on them.
        WorkloadError: Its inputs leave that range.
    """
    if attack.kind == "none":
        return
    first = torch.zeros(1, dtype=torch.long)
    inputs, targets = take_batch(workload, workload.train, first)
    check_range(inputs, *bounds_of_inputs(workload.input_range, inputs, f"{key}.kind"))
    briefly = attack.model_copy(update={"steps": 1, "step_size": attack.step})
    try:
        perturb(
            model, lambda x: workload.loss(model(x), targets), workload, inputs, briefly, 0, key
        )
    except RuntimeError as error:
        if "does not require grad" not in str(error) and "not have been used" not in str(error):
            raise
        raise ConfigError(
            f"{key}.kind = {attack.kind}: the loss has no gradient in the network's inputs, so no "
            "attack finds its way; set it to none"
        ) from error
