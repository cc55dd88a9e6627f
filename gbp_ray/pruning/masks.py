"""Which weights are prunable, the masks over them, and the file a mask travels in.

File format, version 1 (a safetensors file):
    - One uint8 tensor per masked parameter, under the parameter's name, of ceil(n / 8) bytes for n
      weights. Weight i of the parameter, in flat C order, is bit (i mod 8) of byte (i div 8), least
      significant bit first; 1 means kept. Padding bits of the last byte are 0.
    - Metadata (strings): `format` = "gbp_ray.masks", `version` = "1"; `shapes`, a JSON object from
      parameter name to shape; `digest`, below; `parent`, the digest of the masks of the round
      before, or ""; `round`, a decimal number; `criterion`; `sparsity`, as measured.
    - Digest: SHA-256, in hex, over the parameters in name order, of name, NUL, shape in decimal
      joined by "x", NUL, packed bytes. It depends on the masks alone, not on the metadata.
    Checked on reading: the safetensors structure, format and version, byte counts against shapes,
    padding bits, and the digest. Not checked: that a parent is known, that the masks belong to some
    set of weights (`MaskSet.apply_` checks names and shapes), that the criterion exists.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gbp_ray.config import match_names, nearest_glob, nearest_name
from gbp_ray.errors import ConfigError, PruneError, StoreError, name_some
from gbp_ray.pruning.sharding import add_over_ranks, gather_bits, local
from gbp_ray.tensors import check_packed

__all__ = ["PRUNABLE_LAYERS", "MaskSet", "Prunable", "prunable_parameters"]

_FORMAT = "gbp_ray.masks"
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


@dataclass(frozen=True, eq=False)
class MaskSet(Mapping[str, Tensor]):
    """Masks by parameter name, in name order: bool tensors shaped like the weights, True = kept.

    Those of a sharded network lie on the ranks as its weights do. Counting, hashing and writing
    them then communicates.

    Attributes:
        masks: Parameter name to mask.
        round: The round that made them.
        criterion: The rule that scored the weights.
        parent: Digest of the masks of the round before, "" for none.
    """

    masks: Mapping[str, Tensor]
    round: int = 0
    criterion: str = ""
    parent: str = ""

    def __post_init__(self) -> None:
        for name, mask in self.masks.items():
            if mask.dtype is not torch.bool:
                raise PruneError(f"mask of '{name}': must be bool (True = kept), not {mask.dtype}")
        ordered = {name: self.masks[name] for name in sorted(self.masks)}
        object.__setattr__(self, "masks", ordered)

    @classmethod
    def dense(cls, units: Iterable[Prunable]) -> MaskSet:
        """Keeps every weight."""
        return cls({u.name: torch.ones_like(u.parameter.detach(), dtype=torch.bool) for u in units})

    def __getitem__(self, name: str) -> Tensor:
        return self.masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskSet) and self.digest == other.digest

    @property
    def num_units(self) -> int:
        """Prunable weights."""
        return sum(mask.numel() for mask in self.values())

    @property
    def num_pruned(self) -> int:
        """Removed weights."""
        kept = [_count(local(mask)) for mask in self.values()]
        return self.num_units - sum(add_over_ranks(kept, self.values()))

    @property
    def sparsity(self) -> float:
        """Removed weights / prunable weights."""
        return self.num_pruned / self.num_units

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the masks alone, as the format specifies; in hex."""
        packed = zip(self.items(), self._packed(), strict=True)
        return _digest_of((name, tuple(mask.shape), data) for (name, mask), data in packed)

    def flat(self) -> Tensor:
        """Concatenates the masks to shape (N,), in the order of the global flat index."""
        return torch.cat([mask.reshape(-1) for mask in self.values()])

    def to(self, device: torch.device) -> MaskSet:
        """Copies the masks to a device."""
        return self._with({name: mask.to(device) for name, mask in self.items()})

    # -- algebra ---------------------------------------------------------------------------------

    def union(self, other: MaskSet) -> MaskSet:
        """Keeps what either keeps."""
        return self._combine(other, torch.logical_or)

    def intersection(self, other: MaskSet) -> MaskSet:
        """Keeps what both keep."""
        return self._combine(other, torch.logical_and)

    def difference(self, other: MaskSet) -> MaskSet:
        """Keeps what this keeps and `other` does not."""
        return self._combine(other, lambda a, b: a & ~b)

    def overlap(self, other: MaskSet) -> float:
        """Measures intersection over union of the kept weights (IoU); 1.0 where both are empty."""
        kept_by_either = sum(map(_count, self.union(other).values()))
        kept_by_both = sum(map(_count, self.intersection(other).values()))
        return kept_by_both / kept_by_either if kept_by_either else 1.0

    def _combine(self, other: MaskSet, operation: object) -> MaskSet:
        _require_same_shapes(_shapes(other), _shapes(self), "the other masks")
        _require_same_shapes(_shapes(self), _shapes(other), "these masks")
        assert callable(operation)
        return MaskSet({name: operation(mask, other[name]) for name, mask in self.items()})

    def _with(self, masks: Mapping[str, Tensor]) -> MaskSet:
        return MaskSet(masks, self.round, self.criterion, self.parent)

    # -- applying --------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_(self, target: nn.Module | dict[str, Tensor]) -> None:
        """Sets the pruned weights of a model or a state dict to exactly zero, in place.

        Raises:
            PruneError: A masked parameter is missing or has another shape; nothing is changed.
        """
        weights = _weights_of(target)
        _require_same_shapes(
            {n: tuple(w.shape) for n, w in weights.items()}, _shapes(self), "target"
        )
        for name, mask in self.items():
            weight = local(weights[name].detach())
            weight.masked_fill_(~local(mask).to(weight.device), 0)

    def find_revived(self, target: nn.Module | dict[str, Tensor]) -> str | None:
        """Names the first parameter that has a pruned weight other than zero, or None."""
        weights = _weights_of(target)
        revived = []
        for name, mask in self.items():
            weight = local(weights[name].detach())
            revived.append(int(torch.any(weight[~local(mask).to(weight.device)] != 0)))
        everywhere = add_over_ranks(revived, self.values())
        return next((name for name, n in zip(self, everywhere, strict=True) if n), None)

    def to_torch_prune(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rewrites a state dict in the form of `torch.nn.utils.prune`.

        Each masked `weight` becomes `weight_orig` (the weight as given) and `weight_mask` (float, 1
        = kept), which a model that was reparametrised by that library loads.
        """
        _require_same_shapes({n: tuple(w.shape) for n, w in state.items()}, _shapes(self), "state")
        rewritten: dict[str, Tensor] = {}
        for name, value in state.items():
            if name in self:
                rewritten[f"{name}_orig"] = value
                rewritten[f"{name}_mask"] = self[name].to(value.dtype)
            else:
                rewritten[name] = value
        return rewritten

    @classmethod
    def from_torch_prune(cls, state: Mapping[str, Tensor]) -> tuple[MaskSet, dict[str, Tensor]]:
        """Reads the form of `torch.nn.utils.prune`; returns the masks and a plain, masked state.

        Raises:
            PruneError: There is no `*_orig` with its `*_mask`, or a mask is not 0 and 1.
        """
        masks: dict[str, Tensor] = {}
        plain: dict[str, Tensor] = {}
        for name, value in state.items():
            base = name.removesuffix("_orig")
            if base != name and f"{base}_mask" in state:
                mask = state[f"{base}_mask"]
                if not bool(((mask == 0) | (mask == 1)).all()):
                    raise PruneError(f"'{base}_mask': must hold 0 and 1 alone")
                masks[base] = mask.bool()
                plain[base] = value.masked_fill(~masks[base], 0)
            elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
                plain[name] = value
        if not masks:
            raise PruneError(
                "state: holds no pair of *_orig and *_mask; it was not pruned by torch"
            )
        return cls(masks), plain

    # -- the artifact ----------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Writes the file format described in the module's docstring."""
        metadata = {
            "format": _FORMAT,
            "version": "1",
            "shapes": json.dumps({name: list(mask.shape) for name, mask in self.items()}),
            "digest": self.digest,
            "parent": self.parent,
            "round": str(self.round),
            "criterion": self.criterion,
            "sparsity": repr(self.sparsity),
        }
        packed = {
            name: torch.from_numpy(data) for name, data in zip(self, self._packed(), strict=True)
        }
        return _sort_header(save_tensors(packed, metadata))

    def _packed(self) -> Iterator[np.ndarray]:
        """Packs the masks, one after another. Communicates where they are sharded."""
        return (np.packbits(bits, bitorder="little") for bits in gather_bits(self.values()))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "masks") -> MaskSet:
        """Reads masks back.

        Args:
            source: What to call the file in an error.

        Raises:
            StoreError: The file is cut short, altered or of another format.
        """
        try:
            packed = load_tensors(data)
            metadata = _read_metadata(data)
        except (SafetensorError, ValueError, KeyError) as error:
            # KeyError: a dtype that torch does not have.
            raise StoreError(f"{source}: is not a readable safetensors file: {error}") from None
        if metadata.get("format") != _FORMAT or metadata.get("version") != "1":
            raise StoreError(f"{source}: is not a mask file of format {_FORMAT}, version 1")
        try:
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            masks = {name: _unpack(packed[name].numpy(), shape) for name, shape in shapes.items()}
            if set(masks) != set(packed):
                raise ValueError("its shapes are of other masks")
            found = _digest_of((n, shapes[n], packed[n].numpy()) for n in sorted(packed))
            is_intact = found == metadata["digest"]
            round_number = int(metadata["round"])
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{source}: is damaged ({type(error).__name__}: {error})") from None
        if not is_intact:
            raise StoreError(f"{source}: is damaged, its masks do not match its digest; restore it")
        return cls(masks, round_number, metadata.get("criterion", ""), metadata.get("parent", ""))


def _count(mask: Tensor) -> int:
    # On the host torch adds bools up one by one, in ten times as long.
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.detach().numpy()))
    return int(mask.count_nonzero())


def _shapes(masks: MaskSet) -> dict[str, tuple[int, ...]]:
    return {name: tuple(mask.shape) for name, mask in masks.items()}


def _weights_of(target: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(target, nn.Module):
        return dict(target.named_parameters(remove_duplicate=False))
    return target


def _require_same_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], what: str
) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise PruneError(f"{what}: has no '{name}'{nearest_name(name, list(found))}")
        if found[name] != shape:
            raise PruneError(f"{what}: '{name}' has shape {found[name]}, the mask has {shape}")


def _unpack(packed: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    shape = check_packed(packed, shape)
    bits = np.unpackbits(packed, count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits.astype(bool).reshape(shape))


def _digest_of(packed: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    """Hashes (name, shape, packed bits) of each layer, given in name order."""
    digest = hashlib.sha256()
    for name, shape, data in packed:
        digest.update(name.encode() + b"\0" + "x".join(map(str, shape)).encode() + b"\0")
        digest.update(np.ascontiguousarray(data).data)
    return digest.hexdigest()


def _sort_header(data: bytes) -> bytes:
    """Orders the header's keys: safetensors shuffles metadata, and equal masks mean equal bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _read_metadata(data: bytes) -> dict[str, str]:
    # safetensors offers metadata for files alone; the header is its documented first part.
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__") or {}
    return {str(key): str(value) for key, value in metadata.items()}
