"""Prunable parameters, their slices by rank, their scores, and what a network costs.

Multiply-adds are those of convolutions and matrix products, counted operation by operation and
attributed to the parameter that takes part, whichever module calls it. Where an operation hides its
products, or the pass fails, nothing is counted and the record says why: a partial sum would look
like a saving.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from gbp_ray.config.schema import match_names, nearest_glob
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import RankSlice, add_over_ranks, cut_rows, is_shard, local
from gbp_ray.errors import ConfigError, PruneError, name_some
from gbp_ray.results.records import CostRecord, LayerRecord
from gbp_ray.training.passes import Macs
from gbp_ray.workloads.contract import TRANSPOSED, WEIGHT_LAYERS, in_mode

__all__ = [
    "Layout",
    "Prunable",
    "SlicedScores",
    "Survey",
    "excluded_parameters",
    "measure",
    "num_to_prune",
    "prunable_parameters",
    "survey",
]


@torch.no_grad()
def measure(
    model: nn.Module,
    units: list[Prunable],
    macs: Macs,
    unpruned: Mapping[str, tuple[int, str]] = MappingProxyType({}),
) -> CostRecord:
    """Measures size, sparsity and multiply-adds. Communicates where the network is sharded.

    Args:
        units: The prunable parameters.
        macs: From `count_macs`, which pruning does not change.
        unpruned: Other matrices, from `survey`.

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
    unknown = [f"'{unit.name}'" for unit in units if unit.name in macs.unattributed]
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
        macs_fault=macs.fault or (unknown and f"{_UNKNOWN} {name_some(unknown, 3)}") or "",
        num_bytes=num_bytes,
        num_bytes_sparse=num_bytes - spared_bytes + mask_bytes,
        layers=tuple(layers),
        unpruned=dict(unpruned),
    )


_UNKNOWN = "weights multiplied by weights, or changed first, so that none is counted as saved in"


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
        input_dim: The axis along which n:m groups run; None where the layer's kind does not say.
        num_groups: How many groups of a convolution lie along it.
    """

    name: str
    parameter: nn.Parameter
    input_dim: int | None
    num_groups: int = 1


UNUSED = "no pass reaches it"
"""The reason of `Survey.unpruned` for layers that the network does not use."""


@dataclass(frozen=True)
class Survey:
    """The prunable parameters of a network, and the reasons why others are not.

    Attributes:
        units: In name order, which is the order of the global flat index.
        unpruned: Of each other parameter of two axes or more its weights, and the reason.
    """

    units: list[Prunable]
    unpruned: dict[str, tuple[int, str]]


def prunable_parameters(
    model: nn.Module,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    unused: Collection[str] = (),
) -> list[Prunable]:
    """Lists the prunable parameters in name order; see `survey`."""
    return survey(model, exclude, include, unused).units


def survey(
    model: nn.Module,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    unused: Collection[str] = (),
) -> Survey:
    """Finds the prunable parameters, and says of other matrices why they are not prunable.

    Prunable are the non-empty weights of convolutions and linear layers, and what `include` names:
    any parameter of floating point with two axes or more. A parameter tied under several names
    counts once, under the first; a glob that matches any of its names includes or excludes it.
    `exclude` wins over `include`, and `include` over `unused`.

    Args:
        unused: First names of parameters that no pass reaches. Their removal would be free, so
            they are left out.

    Raises:
        ConfigError: A glob matches no parameter, one of `include` matches none that can be pruned,
            nothing is left to prune, or the network is a program of TorchScript.
        PruneError: A weight is computed from other tensors, so that zeros in it would not stay, or
            is not a plain tensor of floats.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            f"workload.factory: the network is a {_kind_of(model)} of TorchScript, which hides its "
            "layers; give the nn.Module that was scripted or traced"
        )
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    found, computed = _find_layers(model, names_of)
    excluded = _find_excluded(exclude, names_of, computed)
    included = _find_included(model, include, names_of, excluded)
    found = included | found
    for name in computed:
        own = (f"{name}_", f"{name.removesuffix('weight')}parametrizations.weight.")
        named = (*excluded, *(unit.name for unit in included.values()))
        if name not in excluded and not any(other.startswith(own) for other in named):
            sizes = {n[0]: p.numel() for p, n in names_of.items() if n[0].startswith(own)}
            raise PruneError(
                f"'{name}': is computed from other tensors (by torch.nn.utils.prune or a "
                f"parametrization); name '{max(sizes, key=lambda n: sizes[n], default=name)}' in "
                "prune.include to prune that, or name it in prune.exclude"
            )
    left_out = set(unused) - {unit.name for unit in included.values()}
    kept = [
        unit
        for weight, unit in found.items()
        if unit.name not in left_out and excluded.isdisjoint(names_of[weight])
    ]
    for unit in kept:
        _check_rankable(unit)
        _check_zeros_stay(model, unit)
    if not kept and found:
        raise ConfigError(
            "prune.exclude: leaves nothing to prune; the model needs a convolution or linear layer "
            "that no glob matches and a pass reaches"
        )
    if not kept:
        raise ConfigError(f"workload.factory: the network has {_describe_unprunable(model)}")
    pruned = {unit.parameter for unit in kept}
    unpruned = {
        names[0]: (
            parameter.numel(),
            "prune.exclude"
            if not excluded.isdisjoint(names)
            else UNUSED
            if names[0] in left_out
            else _say_why_unpruned(model, names[0], parameter),
        )
        for parameter, names in names_of.items()
        if parameter.ndim > 1 and parameter.numel() and parameter not in pruned
    }
    return Survey(sorted(kept, key=lambda unit: unit.name), unpruned)


def excluded_parameters(model: nn.Module, exclude: Iterable[str]) -> set[str]:
    """Returns the first names of the parameters that globs match by any of their names.

    Raises:
        ConfigError: A glob matches no parameter.
    """
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    _, computed = _find_layers(model, names_of)
    excluded = _find_excluded(exclude, names_of, computed)
    return {names[0] for names in names_of.values() if not excluded.isdisjoint(names)}


def _find_layers(
    model: nn.Module, names_of: Mapping[nn.Parameter, list[str]]
) -> tuple[dict[nn.Parameter, Prunable], list[str]]:
    """Returns the weights of convolutions and linear layers, and the names of computed ones."""
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
        elif isinstance(weight, nn.Parameter) and weight in names_of and weight.numel():
            axis, num_groups = _find_inputs(module, "weight")
            if weight in found:
                num_groups = math.lcm(num_groups, found[weight].num_groups)
            found[weight] = Prunable(names_of[weight][0], weight, axis, num_groups)
    return found, computed


def _find_excluded(
    exclude: Iterable[str], names_of: Mapping[nn.Parameter, list[str]], computed: list[str]
) -> set[str]:
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
    return excluded


def _find_included(
    model: nn.Module,
    include: Iterable[str],
    names_of: Mapping[nn.Parameter, list[str]],
    excluded: set[str],
) -> dict[nn.Parameter, Prunable]:
    """Returns what the globs of `include` name and those of `exclude` do not."""
    found: dict[nn.Parameter, Prunable] = {}
    every_name = [name for names in names_of.values() for name in names]
    matrices = {
        name
        for parameter, names in names_of.items()
        for name in names
        if parameter.ndim > 1 and parameter.numel()
    }
    for pattern in include:
        matched = match_names(pattern, every_name)
        if not matched:
            raise ConfigError(
                f"prune.include = '{pattern}': matches no parameter"
                f"{nearest_glob(pattern, sorted(matrices))}"
            )
        if matrices.isdisjoint(matched):
            raise ConfigError(
                f"prune.include = '{pattern}': matches only what has no two axes "
                f"({name_some(matched, 3)}), and biases and norms are not pruned; name matrices, "
                f"such as {name_some(sorted(matrices), 3) or 'none, which this network has'}"
            )
        chosen = {p: names for p, names in names_of.items() if not matrices.isdisjoint(names)}
        chosen = {p: names for p, names in chosen.items() if not set(matched).isdisjoint(names)}
        left = {p: names for p, names in chosen.items() if excluded.isdisjoint(names)}
        if not left:
            raise ConfigError(
                f"prune.include = '{pattern}': prune.exclude names all that it matches, and wins; "
                "take it out of one of them"
            )
        for parameter, names in left.items():
            axis, num_groups = _find_inputs(*_find_layer(model, names[0]))
            found[parameter] = Prunable(names[0], parameter, axis, num_groups)
    return found


def _find_layer(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the layer that a parameter works in, and the name there of the weight in use.

    That of a parametrization is the weight that is computed from the parameter.
    """
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, ParametrizationList):
        outer, _, computed = path.rpartition(".")
        return model.get_submodule(outer.removesuffix("parametrizations").rstrip(".")), computed
    for hook in owner._forward_pre_hooks.values():
        # Of torch.nn.utils: prune, and weight_norm and spectral_norm as they were before 2.0.
        target = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
        if target and own in (f"{target}_orig", f"{target}_v", f"{target}_g"):
            return owner, str(target)
    return owner, own


def _find_inputs(layer: nn.Module, weight: str) -> tuple[int | None, int]:
    """Returns the axis of a layer's weight along which its inputs lie, and the groups along it."""
    if isinstance(layer, TRANSPOSED) and weight == "weight":
        return 0, int(layer.groups)
    # Of transformers, a linear layer with its inputs first.
    if _kind_of(layer) == "Conv1D" and hasattr(layer, "nf"):
        return 0, 1
    is_known = isinstance(layer, (*WEIGHT_LAYERS, *_OUTPUTS_FIRST)) and "bias" not in weight
    return (1 if is_known else None), 1


def _kind_of(layer: nn.Module) -> str:
    # FSDP2 and parametrizations make classes of their own.
    return type(layer).__name__.removeprefix("FSDP").removeprefix("Parametrized")


_OUTPUTS_FIRST = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    # Each row is one entry, as of the output layer that it is often tied to.
    nn.Embedding,
    nn.EmbeddingBag,
)


def _say_why_unpruned(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    layer, weight = _find_layer(model, name)
    kind = _kind_of(layer)
    if name.rpartition(".")[2] != weight:
        return f"from which '{weight}' of {kind} is computed"
    if why := _find_unrankable(parameter):
        return f"{kind}, {why}"
    return f"{kind}, not in prune.include"


@torch.no_grad()
def _check_zeros_stay(model: nn.Module, unit: Prunable) -> None:
    """Refuses a parameter from which a weight is computed that is not zero wherever it is.

    Tries it: some of its weights are set to zero, and then restored. One that is sharded cannot be
    tried, nor one on the meta device; the network was tried before it was spread.
    """
    layer, weight = _find_layer(model, unit.name)
    parameter = unit.parameter
    if unit.name.rpartition(".")[2] == weight or is_shard(parameter) or parameter.is_meta:
        return
    before = parameter.detach().clone()
    generator = torch.Generator().manual_seed(0)
    is_removed = torch.rand(parameter.shape, generator=generator) < 0.5
    # A norm of a whole row of zeros divides by zero.
    rows = is_removed.view(len(is_removed), -1)
    longest = torch.arange(max(rows.shape))
    rows[longest % len(rows), longest % rows.shape[1]] = False
    is_removed = is_removed.to(parameter.device)
    set_by_hook = vars(layer).get(weight)
    try:
        parameter.masked_fill_(is_removed, 0)
        with in_mode(layer, is_training=False), isolated(layer, 0):
            if set_by_hook is not None:
                for hook in layer._forward_pre_hooks.values():
                    hook(layer, ())
            computed = getattr(layer, weight)
        stays = computed.shape == parameter.shape and not computed[is_removed].any()
    finally:
        parameter.copy_(before)
        if set_by_hook is not None:
            vars(layer)[weight] = set_by_hook
    if not stays or not bool(is_removed.any()):
        raise PruneError(
            f"'{unit.name}': a zero in it is no zero in '{weight}', which "
            f"{_kind_of(layer)} computes from it; name it in prune.exclude"
        )


def _check_rankable(unit: Prunable) -> None:
    if why := _find_unrankable(unit.parameter):
        raise PruneError(
            f"'{unit.name}': {why}; make it a plain parameter or name it in prune.exclude"
        )


def _find_unrankable(weight: nn.Parameter) -> str:
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"is of {weight.dtype}, and criteria rank real numbers of 16 bits or more"
    if weight.layout is not torch.strided:
        return f"has the layout {weight.layout}"
    if any(step == 0 and n > 1 for n, step in zip(weight.shape, weight.stride(), strict=True)):
        return "is expanded, so that several of its weights are one number in memory"
    return ""


def _describe_unprunable(model: nn.Module) -> str:
    """Describes a network without prunable weights."""
    owners = [
        f"'{f'{path}.{name}'.lstrip('.')}' of {type(module).__name__}"
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    ]
    return (
        "nothing to prune: prunable are the weights of convolutions (nn.Conv, nn.ConvTranspose) "
        f"and linear layers (nn.Linear), and its parameters are {name_some(owners) or 'none'}; "
        "name matrices among them in prune.include"
    )


def num_to_prune(sparsity: float, num_units: int) -> int:
    """Returns the exact number of removed units: sparsity * units, rounded half up."""
    return math.floor(sparsity * num_units + 0.5)
