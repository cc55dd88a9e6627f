"""What a network costs, measured from its weights as they are.

Multiply-adds are those of convolutions and matrix products. They are counted operation by
operation, and each is put down to the parameter that takes part in it, whichever module calls it.
Where an operation hides its products, or the pass fails, nothing is counted, and the record says
why: a part of the sum would look like a saving.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from gbp_ray.config.schema import match_names, nearest_glob
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import (
    RankSlice,
    add_over_ranks,
    cut_rows,
    is_shard,
    local,
)
from gbp_ray.errors import ConfigError, PruneError, name_some
from gbp_ray.results.records import CostRecord, LayerRecord
from gbp_ray.training.network import Macs

__all__ = [
    "PRUNABLE_LAYERS",
    "Layout",
    "Prunable",
    "SlicedScores",
    "measure",
    "num_to_prune",
    "prunable_parameters",
]


@torch.no_grad()
def measure(model: nn.Module, units: list[Prunable], macs: Macs) -> CostRecord:
    """Measures size, sparsity and multiply-adds. Communicates where the network is sharded.

    Args:
        units: The prunable parameters.
        macs: From `count_macs`, which pruning does not change.

    Returns:
        Counts over the whole model and by prunable layer. Multiply-adds of the pruned network leave
        out those with a zero weight; each weight of a parameter is taken to take part equally
        often. Bytes are those of the dense tensors; `num_bytes_sparse` is what non-zero weights and
        one bit per prunable weight would take.
    """
    # parameters() yields a tied parameter once.
    parameters = list(model.parameters())
    counted = [int(torch.count_nonzero(local(p))) for p in parameters]
    nonzero = dict(zip(parameters, add_over_ranks(counted, parameters), strict=True))
    layers = []
    spared = 0
    for unit in units:
        num_weights = unit.parameter.numel()
        num_nonzero = nonzero[unit.parameter]
        layer_macs = macs.by_parameter.get(unit.name, 0)
        macs_nonzero = layer_macs * num_nonzero // num_weights
        spared += layer_macs - macs_nonzero
        layers.append(
            LayerRecord(
                name=unit.name,
                shape=tuple(unit.parameter.shape),
                num_weights=num_weights,
                num_nonzero=num_nonzero,
                macs=layer_macs,
                macs_nonzero=macs_nonzero,
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
        macs_nonzero=macs.total - spared,
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
            is_layer = isinstance(owner, (*PRUNABLE_LAYERS, ParametrizationList))
            kind = type(owner).__name__.removeprefix("FSDP")
            found[name] = (parameter.numel(), "prune.exclude" if is_layer else kind)
    return found


class Layout:
    """Who owns what of all prunable weights.

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
        """This rank's slices."""
        return self.by_rank[self._rank]

    @property
    def num_weights(self) -> int:
        """N, over all ranks."""
        return sum(self._sizes)

    @property
    def bounds(self) -> list[int]:
        """W + 1 positions: where each rank's weights begin in a vector that goes rank by rank."""
        ends = [0]
        for pieces in self.by_rank:
            ends.append(ends[-1] + sum(piece.size for piece in pieces))
        return ends

    def by_owner(self, vector_N: Tensor) -> Tensor:
        """Puts a flat vector into rank order: all that rank 0 owns, then rank 1, and so on."""
        if len(self.by_rank) == 1:
            return vector_N
        layers = vector_N.split(self._sizes)
        return torch.cat(
            [
                layer[piece.start : piece.stop]
                for pieces in self.by_rank
                for layer, piece in zip(layers, pieces, strict=True)
            ]
        )

    def by_layer(self, vector_N: Tensor) -> Tensor:
        """Undoes `by_owner`."""
        if len(self.by_rank) == 1:
            return vector_N
        parts = [
            stretch.split([piece.size for piece in pieces])
            for stretch, pieces in zip(
                vector_N.split([sum(p.size for p in pieces) for pieces in self.by_rank]),
                self.by_rank,
                strict=True,
            )
        ]
        return torch.cat([part[layer] for layer in range(len(self._sizes)) for part in parts])

    def split_own(self, vector_S: Tensor) -> dict[str, Tensor]:
        """Cuts what this rank owns into layers, by name."""
        pieces = vector_S.split([piece.size for piece in self.own])
        return {piece.name: values for piece, values in zip(self.own, pieces, strict=True)}


@dataclass(frozen=True)
class SlicedScores:
    """This rank's share of the scores: for each layer a slice, possibly empty, and its values (L,).

    Over all ranks the slices of a layer cover it once, in rank order.
    """

    slices: tuple[RankSlice, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def from_full(cls, scores: Mapping[str, Tensor]) -> SlicedScores:
        """Takes scores of all layers, shaped like the weights, as one rank's share."""
        names = sorted(scores)
        slices = tuple(
            RankSlice(name, tuple(scores[name].shape), 0, scores[name].numel()) for name in names
        )
        return cls(slices, tuple(scores[name].reshape(-1) for name in names))

    def gather(self, ranks: Ranks) -> dict[str, Tensor]:
        """Puts all scores together on every rank, for looking at them. Communicates."""
        parts = ranks.all_gather_objects([value.cpu() for value in self.values])
        return {
            piece.name: torch.cat([part[number] for part in parts]).view(piece.shape)
            for number, piece in enumerate(self.slices)
        }


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRUNABLE_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)


@dataclass(frozen=True)
class Prunable:
    """A parameter whose weights compete.

    Attributes:
        name: Its first name in the model; a tied parameter has others.
        parameter: The weights.
        input_dim: The axis along which n:m groups run.
        num_groups: How many groups of a convolution lie along it one after another.
    """

    name: str
    parameter: nn.Parameter
    input_dim: int
    num_groups: int = 1


def prunable_parameters(model: nn.Module, exclude: Iterable[str] = ()) -> list[Prunable]:
    """Lists the prunable parameters in name order, which is the order of the global flat index.

    Prunable are the weights of convolutions and linear layers; biases, norms, embeddings, and what
    other modules hold are not, nor is a weight without elements. A parameter tied under several
    names counts once, under the first; a glob that matches any of its names excludes it.

    Raises:
        ConfigError: A glob of `exclude` matches no parameter, or nothing is left to prune.
        PruneError: A weight is not a parameter but computed from others, or no tensor of real
            numbers that each have their place.
    """
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    found: dict[nn.Parameter, Prunable] = {}
    computed = []
    for path, module in model.named_modules():
        if not isinstance(module, PRUNABLE_LAYERS):
            continue
        # To read what a parametrization computes may move its buffers, and fails in shards.
        is_computed = is_parametrized(module, "weight")
        weight = None if is_computed else getattr(module, "weight", None)
        if is_computed or (isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)):
            computed.append(f"{path}.weight".lstrip("."))
        elif weight in names_of and weight.numel():
            is_turned = isinstance(module, _TRANSPOSED)
            num_groups = int(module.groups) if is_turned else 1  # type: ignore[arg-type]
            if weight in found:
                num_groups = math.lcm(num_groups, found[weight].num_groups)
            name = names_of[weight][0]
            found[weight] = Prunable(name, weight, 0 if is_turned else 1, num_groups)
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
    """Words what a network has in place of prunable weights."""
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
    """Rounds sparsity * units half up: the exact number of removed units."""
    return math.floor(sparsity * num_units + 0.5)
