"""What a network has that pruning does not treat as one might think, said before any training.

Weights that no pass uses count as sparsity, embeddings may be pruned through a layer that shares
them, and state that is no tensor is not stored. None of it is wrong by itself.
"""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import nn

from gbp_ray.errors import name_some
from gbp_ray.pruning.masks import Prunable
from gbp_ray.pruning.ranks import isolated
from gbp_ray.weights import tensor_state
from gbp_ray.workload import Workload, in_mode, take_batch

__all__ = ["warn_of_unusual_weights"]


def warn_of_unusual_weights(
    model: nn.Module, units: list[Prunable], workload: Workload, batch_size: int
) -> None:
    """Warns of weights that get no gradient, of embeddings, and of state that is not stored.

    Args:
        batch_size: Of the training examples that are tried.
    """
    total = sum(unit.parameter.numel() for unit in units)
    known: list[Prunable] = []
    for is_training, when in ((True, "in training"), (False, "in eval mode, where it is scored")):
        found = _find_idle(model, units, workload, batch_size, is_training=is_training)
        if idle := [unit for unit in found if unit not in known]:
            known += idle
            number = sum(unit.parameter.numel() for unit in idle)
            warnings.warn(
                f"prune: {_name_some(idle)} get{'s' if len(idle) == 1 else ''} no gradient from "
                f"{batch_size} examples {when}; {number:,} of {total:,} prunable weights, whose "
                "removal counts as sparsity; name in prune.exclude what no pass uses",
                stacklevel=2,
            )
    tables = {m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    if embedded := [unit for unit in units if unit.parameter in tables]:
        warnings.warn(
            f"prune: {_name_some(embedded)}, which a layer shares with an embedding, loses weights "
            "in both; name it in prune.exclude to keep it",
            stacklevel=2,
        )
    kept = tensor_state(model)
    if left_out := [f"'{name}'" for name in model.state_dict() if name not in kept]:
        warnings.warn(
            f"workload.factory: {name_some(left_out)} of the network's state is no "
            "tensor and is not stored with its weights; a network that they are loaded into has "
            "what build_model gives it",
            stacklevel=2,
        )


def _find_idle(
    model: nn.Module,
    units: list[Prunable],
    workload: Workload,
    batch_size: int,
    *,
    is_training: bool,
) -> list[Prunable]:
    """Finds what the loss of a batch does not depend on; frozen weights are passed over."""
    seen = [unit for unit in units if unit.parameter.requires_grad]
    # What fails here fails in training too, and says why there.
    with (
        suppress(Exception),
        in_mode(model, is_training=is_training),
        isolated(model, 0),
        torch.enable_grad(),
    ):
        indices = torch.arange(batch_size)
        inputs, targets = take_batch(workload, workload.train, indices, augment_seed=0)
        loss = workload.loss(model(inputs), targets)
        gradients = torch.autograd.grad(loss, [unit.parameter for unit in seen], allow_unused=True)
        return [unit for unit, found in zip(seen, gradients, strict=True) if found is None]
    return []


def _name_some(units: list[Prunable]) -> str:
    return name_some([f"'{unit.name}' ({unit.parameter.numel():,})" for unit in units])
