"""Prunable parameters, their slices by rank, their scores, and what a network costs.

Multiply-adds are those of convolutions and matrix products, counted operation by operation and
attributed to the parameter that takes part, whichever module calls it. Where an operation hides its
products, or the pass fails, nothing is counted and the record says why: a partial sum would look
like a saving.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from gbp_ray.config.schema import match_names, nearest_glob
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import RankSlice, add_over_ranks, cut_rows, is_shard, local
from gbp_ray.errors import ConfigError, PruneError, name_some
from gbp_ray.results.records import CostRecord, LayerRecord
from gbp_ray.training.passes import Macs
from gbp_ray.workloads.contract import TRANSPOSED, WEIGHT_LAYERS

__all__ = ["Layout", "Prunable", "SlicedScores", "measure", "num_to_prune", "prunable_parameters"]


@torch.no_grad()
def measure(model: nn.Module, units: list[Prunable], macs: Macs) -> CostRecord:
    """Measures size, sparsity and multiply-adds. Communicates where the network is sharded.

    Args:
        units: The prunable parameters.
        macs: From `count_macs`, which pruning does not change.

    Returns:
        Counts over the whole model and by prunable layer. `macs_nonzero` leaves out multiply-adds
        with a zero weight, as if each weight of a parameter took part equally often.
        `num_bytes_sparse` is what non-zero weights and one bit per prunable weight would take.
    """
    # parameters() yields a tied parameter once.
    parameters = list(model.parameters())
    counted = [int(torch.count_nonzero(local(p))) for p in parameters]
    nonzero = dict(zip(parameters, add_over_ranks(counted, parameters), strict=True))
    layers = []
    for unit in units:
        num_weights, num_nonzero = unit.parameter.numel(), nonzero[unit.parameter]
        layer_macs = macs.by_parameter.get(unit.name, 0)
        layers.append(
            LayerRecord(
                name=unit.name,
                shape=tuple(unit.parameter.shape),
                num_weights=num_weights,
                num_nonzero=num_nonzero,
                macs=layer_macs,
                macs_nonzero=layer_macs * num_nonzero // num_weights,
            )
        )
    state = [*parameters, *model.buffers()]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state)
    spared_bytes = sum(
        (unit.parameter.numel() - layer.num_nonzero) * unit.parameter.element_size()
        for unit, layer in zip(units, layers, strict=True)
    )
    mask_bytes = sum(-(-layer.num_weights // 8) for layer in layers)
    return CostRecord(
        num_parameters=sum(p.numel() for p in parameters),
        num_nonzero=sum(nonzero.values()),
        macs=macs.total,
        macs_nonzero=macs.total - sum(layer.macs - layer.macs_nonzero for layer in layers),
        macs_fault=macs.fault,
        num_bytes=num_bytes,
        num_bytes_sparse=num_bytes - spared_bytes + mask_bytes,
        layers=tuple(layers),
        unpruned=_find_unpruned(model, units),
    )


def _find_unpruned(model: nn.Module, units: list[Prunable]) -> dict[str, tuple[int, str]]:
    pruned = {unit.parameter for unit in units}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.numel() and parameter not in pruned:
            owner = model.get_submodule(name.rpartition(".")[0])
            is_layer = isinstance(owner, (*WEIGHT_LAYERS, ParametrizationList))
            kind = type(owner).__name__.removeprefix("FSDP")
            found[name] = (parameter.numel(), "prune.exclude" if is_layer else kind)
    return found


class Layout:
    """The assignment of all prunable weights to ranks.

    Args:
        units: In flat order.

    Attributes:
        by_rank: For each rank its slices, one of each layer.
    """

    def __init__(self, units: Sequence[Prunable], ranks: Ranks) -> None:
        cuts = [
            cut_rows(
                unit.name,
                unit.parameter.shape,
                ranks.world_size,
                is_whole=unit.input_dim == 0 and not is_shard(unit.parameter),
            )
            for unit in units
        ]
        self.by_rank = [tuple(cut[rank] for cut in cuts) for rank in range(ranks.world_size)]
        self._rank = ranks.rank
        self._sizes = [unit.parameter.numel() for unit in units]

    @property
    def own(self) -> tuple[RankSlice, ...]:
        """Returns this rank's slices."""
        return self.by_rank[self._rank]

    @property
    def num_weights(self) -> int:
        """Returns N, over all ranks."""
        return sum(self._sizes)

    @property
    def bounds(self) -> list[int]:
        """Returns W + 1 positions: where each rank's weights begin in a vector in rank order."""
        sizes = (sum(rank_slice.size for rank_slice in own) for own in self.by_rank)
        return list(accumulate(sizes, initial=0))

    def by_owner(self, vector_N: Tensor) -> Tensor:
        """Reorders a flat vector by rank: all that rank 0 owns, then rank 1, and so on."""
        if len(self.by_rank) == 1:
            return vector_N
        layers = vector_N.split(self._sizes)
        return torch.cat(
            [
                layer[rank_slice.start : rank_slice.stop]
                for own in self.by_rank
                for layer, rank_slice in zip(layers, own, strict=True)
            ]
        )

    def by_layer(self, vector_N: Tensor) -> Tensor:
        """Undoes `by_owner`."""
        if len(self.by_rank) == 1:
            return vector_N
        slices = vector_N.split([rank_slice.size for own in self.by_rank for rank_slice in own])
        num_layers = len(self._sizes)
        return torch.cat([s for layer in range(num_layers) for s in slices[layer::num_layers]])

    def split_own(self, vector_S: Tensor) -> dict[str, Tensor]:
        """Splits the values of this rank's weights by layer name."""
        values = vector_S.split([rank_slice.size for rank_slice in self.own])
        return {s.name: values_L for s, values_L in zip(self.own, values, strict=True)}


@dataclass(frozen=True)
class SlicedScores:
    """This rank's scores: for each layer a slice, possibly empty, and its values (L,).

    The slices of all ranks cover each layer once, in rank order.
    """

    slices: tuple[RankSlice, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def from_full(cls, scores: Mapping[str, Tensor]) -> SlicedScores:
        """Makes them of whole layers, shaped like the weights, on one rank."""
        names = sorted(scores)
        slices = tuple(
            RankSlice(name, tuple(scores[name].shape), 0, scores[name].numel()) for name in names
        )
        return cls(slices, tuple(scores[name].reshape(-1) for name in names))

    def gather(self, ranks: Ranks) -> dict[str, Tensor]:
        """Gathers all scores on every rank, for inspection. Communicates."""
        by_rank = ranks.all_gather_objects([value.cpu() for value in self.values])
        return {
            own.name: torch.cat([of_rank[number] for of_rank in by_rank]).view(own.shape)
            for number, own in enumerate(self.slices)
        }


@dataclass(frozen=True)
class Prunable:
    """A parameter whose weights compete.

    Attributes:
        name: Its first name in the model; a tied parameter has others.
        parameter: The weights.
        input_dim: The axis along which n:m groups run.
        num_groups: How many groups of a convolution lie along it.
    """

    name: str
    parameter: nn.Parameter
    input_dim: int
    num_groups: int = 1


def prunable_parameters(model: nn.Module, exclude: Iterable[str] = ()) -> list[Prunable]:
    """Lists the prunable parameters in name order, which is the order of the global flat index.

    Prunable are the non-empty weights of convolutions and linear layers; biases, norms, embeddings
    and the parameters of other modules are not. A parameter tied under several names counts once,
    under the first; a glob that matches any of its names excludes it.

    Raises:
        ConfigError: A glob of `exclude` matches no parameter, or nothing is left to prune.
        PruneError: A weight is computed from other tensors, or is not a plain tensor of floats.
    """
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    found: dict[nn.Parameter, Prunable] = {}
    computed = []
    for path, module in model.named_modules():
        if not isinstance(module, WEIGHT_LAYERS):
            continue
        # Reading a parametrized weight may change buffers, and fails when sharded.
        is_computed = is_parametrized(module, "weight")
        weight = None if is_computed else getattr(module, "weight", None)
        if is_computed or (isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)):
            computed.append(f"{path}.weight".lstrip("."))
        elif weight in names_of and weight.numel():
            is_transposed = isinstance(module, TRANSPOSED)
            num_groups = int(module.groups) if is_transposed else 1  # type: ignore[arg-type]
            if weight in found:
                num_groups = math.lcm(num_groups, found[weight].num_groups)
            name = names_of[weight][0]
            found[weight] = Prunable(name, weight, 0 if is_transposed else 1, num_groups)
    every_name = [name for names in names_of.values() for name in names]
    excluded: set[str] = set()
    for pattern in exclude:
        matched = match_names(pattern, [*every_name, *computed])
        if not matched:
            raise ConfigError(
                f"prune.exclude = '{pattern}': matches no parameter"
                f"{nearest_glob(pattern, every_name)}"
            )
        excluded.update(matched)
    for name in computed:
        own = (f"{name}_", f"{name.removesuffix('weight')}parametrizations.weight.")
        if name not in excluded and not any(other.startswith(own) for other in excluded):
            raise PruneError(
                f"'{name}': is computed from other tensors (by torch.nn.utils.prune or a "
                "parametrization); make it a plain parameter first, or name it in prune.exclude"
            )
    kept = [unit for weight, unit in found.items() if excluded.isdisjoint(names_of[weight])]
    for unit in kept:
        _check_rankable(unit)
    if not kept and found:
        raise ConfigError(
            "prune.exclude: leaves nothing to prune; the model needs a convolution or linear layer "
            "that no glob matches"
        )
    if not kept:
        raise ConfigError(f"workload.factory: the network has {_describe_unprunable(model)}")
    return sorted(kept, key=lambda unit: unit.name)


def _check_rankable(unit: Prunable) -> None:
    weight, why = unit.parameter, ""
    if not weight.is_floating_point() or weight.element_size() == 1:
        why = f"is of {weight.dtype}, and criteria rank real numbers of 16 bits or more"
    elif weight.layout is not torch.strided:
        why = f"has the layout {weight.layout}"
    elif any(step == 0 and n > 1 for n, step in zip(weight.shape, weight.stride(), strict=True)):
        why = "is expanded, so that several of its weights are one number in memory"
    if why:
        raise PruneError(
            f"'{unit.name}': {why}; make it a plain parameter or name it in prune.exclude"
        )


def _describe_unprunable(model: nn.Module) -> str:
    """Describes a network without prunable weights."""
    owners = [
        f"'{f'{path}.{name}'.lstrip('.')}' of {type(module).__name__}"
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    ]
    return (
        "nothing to prune: prunable are the weights of convolutions (nn.Conv, nn.ConvTranspose) "
        f"and linear layers (nn.Linear), and its parameters are {name_some(owners) or 'none'}"
    )


def num_to_prune(sparsity: float, num_units: int) -> int:
    """Returns the exact number of removed units: sparsity * units, rounded half up."""
    return math.floor(sparsity * num_units + 0.5)
