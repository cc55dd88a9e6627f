"""Takes whole units that masks remove out of a network in memory: `gbp_ray.compact`.

masks = gbp_ray.prune_model(model, loader, granularity="channel", target={"macs": 0.5})
...  # train; masks.apply_(model) after each step keeps the zeros
print(gbp_ray.compact(model, masks, loader, optimizer=optimizer))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError, PruneError, WorkloadError, name_some
from gbp_ray.pruning.arguments import (
    as_in_a_job,
    check_same_replicas,
    check_whole_network,
    make_workload,
    network_in,
    optimizer_in,
)
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.removal.comparison import observe
from gbp_ray.pruning.removal.layers import KEPT_AS_ZEROS
from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.pruning.whole_units import COMPARED, few_of, passing, structure_by
from gbp_ray.results.records import WidthRecord
from gbp_ray.workloads.batch import Batch, kind_of, size_of
from gbp_ray.workloads.checks import blaming_batch
from gbp_ray.workloads.contract import Workload

__all__ = ["CompactResult", "compact_model"]

_INSTEAD = "keep its units as zeros, or prune again with the layer in exclude"


@dataclass(frozen=True)
class CompactResult:
    """What left a network.

    Attributes:
        difference: Largest difference of outputs from those of the masked network, over their
            greatest magnitude.
        attributes: New values of modules' attributes by dotted path, such as "conv1.out_channels".
        uncalled: Paths of cut modules that the batch did not go through; nothing is proven of them.
        num_parameters_before: Weights of all parameters with the units, and `num_parameters`
            without them.
        macs_before: Multiply-adds of one example with the units, and `macs` without them.
        widths: Of each group of units: its name, kind, and number of units before and after.
    """

    difference: float
    attributes: Mapping[str, Any]
    uncalled: tuple[str, ...]
    num_parameters_before: int
    num_parameters: int
    macs_before: int
    macs: int
    widths: tuple[WidthRecord, ...]

    def __repr__(self) -> str:
        gone = sum(width.num_units - width.num_kept for width in self.widths)
        total = sum(width.num_units for width in self.widths)
        text = (
            f"{gone:,} of {total:,} units left the network: {self.num_parameters_before:,} -> "
            f"{self.num_parameters:,} parameters, {self.macs_before:,} -> {self.macs:,} MACs, "
            f"outputs differ by {self.difference:.1g}"
        )
        if self.uncalled:
            text += f"; not passed: {name_some(list(self.uncalled), 3)}"
        return f"<CompactResult {text}>"


def compact_model(
    model: nn.Module,
    masks: MaskSet,
    data: Any,
    *,
    optimizer: Optimizer | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    num_threads: int = 1,
) -> CompactResult:
    """Takes the units that masks remove out of a network, in place, proven on a real batch.

    Parameters and buffers are cut, widths such as `out_channels` follow, and the outputs are those
    of the masked network up to rounding; otherwise all stays as it was. Cut parameters are new
    objects. So a DistributedDataParallel around the network refuses to train on: wrap the network
    anew. Communicates where torch.distributed is initialised; every rank must call it alike.

    Args:
        model: The dense network with the masked weights at zero; also wrapped by DDP or
            `torch.compile`, not sharded.
        masks: Of whole units: from `prune_model`, from a `Pruner`, or of a job's round.
        data: As of `prune_model`; or one batch, as the network or `forward` takes it: a tensor, a
            dict, (inputs, targets). Of several ranks that of the first counts.
        optimizer: Of the same parameters; it goes on with the cut ones, its state cut alike.
        forward: As in `Workload`, as is `collate`.
        num_threads: As of `prune_model`.

    Raises:
        GbpError: The masks remove no whole units or masked weights are not zero, the network is in
            shards or cannot be cut, or it computes something else then; names the layer.
    """
    with as_in_a_job(num_threads):
        if not isinstance(masks, MaskSet):
            raise ConfigError(
                f"masks: must be a MaskSet, as prune_model returns, not {kind_of(masks)}"
            )
        plain = network_in(model)
        check_whole_network(plain, "taking units out")
        inner = None if optimizer is None else optimizer_in(optimizer)
        ranks = Ranks.current(next(plain.parameters()).device)
        workload = make_workload(plain, data, functional.cross_entropy, forward, collate, None)
        batch = ranks.run_collectively(lambda: _batch_of(workload, data))
        batch = ranks.broadcast_object(batch).map(lambda tensor: tensor.to(ranks.device))
        masks = masks.to(torch.device("cpu"))
        ranks.check_agreement(masks.digest, "the mask")
        check_same_replicas(plain, ranks)
        _check_masked(plain, masks)
        found = ranks.run_collectively(lambda: _remove(workload, plain, masks, batch, inner))
        _stop_ddp(model)
        return found


def _remove(
    workload: Workload, model: nn.Module, masks: MaskSet, batch: Batch, optimizer: Optimizer | None
) -> CompactResult:
    run = passing(workload, batch)
    with blaming_batch(batch):
        observe(model, run)
    structure = structure_by(workload, model, batch.part(slice(0, 1), size_of(batch.inputs)))
    try:
        kept_U = structure.units_in(masks)
    except PruneError as error:
        raise PruneError(
            f"{error}; give the masks of prune_model or of a job with granularity channel, head or "
            "channel+head, and the network as it was then"
        ) from None
    try:
        done = remove_units(model, structure, kept_U, passing(workload, batch), optimizer=optimizer)
    except PruneError as error:
        error.args = (str(error).replace(KEPT_AS_ZEROS, _INSTEAD),)
        raise
    everything = np.ones_like(kept_U)
    widths = zip(structure.groups, structure.widths(kept_U), strict=True)
    return CompactResult(
        done.difference,
        done.attributes,
        done.uncalled,
        structure.count_weights(everything),
        structure.count_weights(kept_U),
        structure.count_macs(everything),
        structure.count_macs(kept_U),
        tuple(
            WidthRecord(name=g.name, kind=g.kind, num_units=g.num_units, num_kept=number)
            for g, number in widths
        ),
    )


def _batch_of(workload: Workload, data: Any) -> Batch:
    """Takes the first examples of a data set or of a batch."""
    # A list of dicts is a data set.
    kinds = (Tensor,) if isinstance(data, list) else (Tensor, Mapping)
    parts = data if isinstance(data, (tuple, list)) else [data]
    if not any(isinstance(part, kinds) for part in parts):
        return few_of(workload, torch.device("cpu"))
    batch = Batch.of(data)
    size = size_of(batch.inputs)
    if not size:
        raise WorkloadError(f"data: holds no examples; give at least one, not {kind_of(data)}")
    return batch.part(slice(0, COMPARED), size)


def _check_masked(model: nn.Module, masks: MaskSet) -> None:
    """Raises PruneError where masks and weights are not of one network."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        shape = tuple(named[name].shape) if name in named else None
        if shape != mask.shape:
            raise PruneError(
                f"masks: that of '{name}' has shape {tuple(mask.shape)}, and the network has "
                f"{shape or 'no such parameter'}; give the dense network, from which no unit has "
                "left"
            )
    revived = masks.find_revived(model)
    if revived is not None:
        raise PruneError(
            f"'{revived}': has weights other than zero that the masks remove; call "
            "masks.apply_(model), which changes the outputs, before, or after every step of "
            "training"
        )


def _stop_ddp(model: nn.Module) -> None:
    """Has each DistributedDataParallel around a network refuse to train: it reduces old gradients.

    It would train ranks apart without a word.
    """

    def refuse(*_: Any) -> None:
        if torch.is_grad_enabled():
            raise WorkloadError(
                "model: this DistributedDataParallel was made before gbp_ray.compact and adds up "
                "gradients of parameters that are gone; wrap the network in it anew"
            )

    while True:
        if isinstance(model, DistributedDataParallel):
            model.register_forward_pre_hook(refuse)
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return
