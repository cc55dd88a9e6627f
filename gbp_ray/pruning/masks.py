"""Masks over the prunable weights, and the masks that a job starts from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gbp_ray.config.job import JobConfig
from gbp_ray.config.schema import is_matched, nearest_name
from gbp_ray.distributed.sharding import add_over_ranks, gather_bits, is_shard, local, shard_like
from gbp_ray.errors import ConfigError, GbpError, PruneError, StoreError, name_some
from gbp_ray.pruning.units import Prunable, num_to_prune
from gbp_ray.results.store import locate_round, open_objects
from gbp_ray.results.tensors import (
    MASKS,
    PackedMask,
    Shared,
    compare_masks,
    digest_masks,
    read_mask_file,
    sum_shared,
    write_mask_file,
)

__all__ = [
    "MaskSet",
    "Removal",
    "check_pruned_zero",
    "forget_pruned",
    "read_initial_masks",
    "read_masks_at",
    "read_named_masks",
]


@dataclass(frozen=True, eq=False)
class MaskSet(Mapping[str, Tensor]):
    """Masks by parameter name, in name order: bool tensors shaped like the weights, True = kept.

    Those of a sharded network are sharded like its weights; counting, hashing and writing them then
    communicates.

    Attributes:
        masks: Parameter name to mask.
        round: The round that made them.
        criterion: Name of the criterion that scored the weights.
        parent: Digest of the masks of the round before, "" for none.
        unpruned: Weight matrices that are not pruned, each with its number of weights and why;
            known where a network in memory was pruned.
    """

    masks: Mapping[str, Tensor]
    round: int = 0
    criterion: str = ""
    parent: str = ""
    unpruned: Mapping[str, tuple[int, str]] = field(default_factory=dict)

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

    def __repr__(self) -> str:
        # Counting the masks of a sharded network would communicate.
        is_counted = not any(is_shard(mask) for mask in self.values())
        share = f"{self.sparsity:.2%} of " if is_counted and self.num_units else ""
        text = f"{share}{self.num_units:,} weights in {len(self)} tensors pruned"
        if self.criterion:
            text += f" by {self.criterion}"
        if self.unpruned:
            left = [f"'{n}' ({size:,}, {why})" for n, (size, why) in self.unpruned.items()]
            text += f"; left alone: {name_some(left, 3)}"
        return f"<MaskSet {text}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskSet) and self.digest == other.digest

    @property
    def num_units(self) -> int:
        """Counts the prunable weights."""
        return sum(mask.numel() for mask in self.values())

    @property
    def num_pruned(self) -> int:
        """Counts the removed weights."""
        kept = [_count(local(mask)) for mask in self.values()]
        return self.num_units - sum(add_over_ranks(kept, self.values()))

    @property
    def sparsity(self) -> float:
        """Returns removed / prunable weights."""
        return self.num_pruned / self.num_units

    @cached_property
    def digest(self) -> str:
        """Returns the SHA-256 of the masks in hex, as the file format specifies."""
        return digest_masks(self.pack())

    def flat(self) -> Tensor:
        """Concatenates the masks to shape (N,), in the order of the global flat index."""
        return torch.cat([mask.reshape(-1) for mask in self.values()])

    def to(self, device: torch.device) -> MaskSet:
        """Copies the masks to a device."""
        return replace(self, masks={name: mask.to(device) for name, mask in self.items()})

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
        return sum_shared(self.compare(other).values()).overlap

    def compare(self, other: MaskSet) -> dict[str, Shared]:
        """Counts for each parameter the weights that both keep, or either."""
        self.check_alike(other)
        return compare_masks(self.pack(), other.pack())

    def _combine(self, other: MaskSet, operation: Callable[[Tensor, Tensor], Tensor]) -> MaskSet:
        self.check_alike(other)
        return MaskSet({name: operation(mask, other[name]) for name, mask in self.items()})

    def check_alike(self, other: MaskSet) -> None:
        """Raises PruneError unless both have masks of the same names and shapes."""
        _check_shapes(other, self, "the other masks")
        _check_shapes(self, other, "these masks")

    @torch.no_grad()
    def apply_(self, target: nn.Module | dict[str, Tensor]) -> None:
        """Sets the pruned weights of a model or a state dict to exactly zero, in place.

        Of a sharded model each rank sets its rows, by masks that are sharded like it or whole.

        Raises:
            PruneError: A masked parameter is missing or has another shape; nothing is changed.
        """
        weights = _weights_of(target)
        _check_shapes(weights, self, "target")
        for name, mask in self.items():
            weight = local(weights[name].detach())
            weight.masked_fill_(~local(shard_like(mask, weights[name])).to(weight.device), 0)

    def find_revived(self, target: nn.Module | dict[str, Tensor]) -> str | None:
        """Returns the name of the first parameter with a pruned weight other than 0, or None."""
        weights = _weights_of(target)
        revived = []
        for name, mask in self.items():
            weight = local(weights[name].detach())
            revived.append(int(torch.any(weight[~local(mask).to(weight.device)] != 0)))
        everywhere = add_over_ranks(revived, self.values())
        return next((name for name, n in zip(self, everywhere, strict=True) if n), None)

    def to_torch_prune(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts a state dict to the form of `torch.nn.utils.prune`.

        Each masked `weight` becomes `weight_orig` (the weight as given) and `weight_mask` (float,
        1 = kept), as a model that this library reparametrized loads it.
        """
        _check_shapes(state, self, "state")
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
        """Converts a state dict from that form; returns the masks and a plain, masked state dict.

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
                    raise PruneError(f"'{base}_mask': must hold only 0 and 1")
                masks[base] = mask.bool()
                plain[base] = value.masked_fill(~masks[base], 0)
            elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
                plain[name] = value
        if not masks:
            raise PruneError(
                "state: holds no pair of *_orig and *_mask; it was not pruned by torch"
            )
        return cls(masks), plain

    def to_bytes(self) -> bytes:
        """Writes a mask file, see `results.tensors`."""
        return write_mask_file(
            self.pack(),
            parent=self.parent,
            round=self.round,
            criterion=self.criterion,
            sparsity=self.sparsity,
        )

    def pack(self) -> dict[str, PackedMask]:
        """Packs the masks. Communicates where they are sharded."""
        bits = gather_bits(self.values())
        return {
            name: PackedMask.pack(flat, mask.shape)
            for (name, mask), flat in zip(self.items(), bits, strict=True)
        }

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "masks") -> MaskSet:
        """Reads masks back.

        Args:
            source: Name of the file in errors.

        Raises:
            StoreError: The file is cut short, altered or of another format.
        """
        file = read_mask_file(data, source)
        masks = {name: torch.from_numpy(mask.unpack()) for name, mask in file.masks.items()}
        return cls(masks, file.round, file.criterion, file.parent)


@dataclass(frozen=True)
class Removal:
    """A decision: masks and, where wanted, new values for the kept weights.

    Attributes:
        updates: Weights by parameter name; None keeps the values.
        capped_layers: Layers that only their ceiling kept from losing more weights.
    """

    masks: MaskSet
    updates: Mapping[str, Tensor] | None = None
    capped_layers: tuple[str, ...] = ()


def _count(mask: Tensor) -> int:
    # On the host torch takes ten times as long, as it adds the bools one by one.
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.detach().numpy()))
    return int(mask.count_nonzero())


def _weights_of(target: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(target, nn.Module):
        return dict(target.named_parameters(remove_duplicate=False))
    return target


def _check_shapes(found: Mapping[str, Tensor], masks: Mapping[str, Tensor], what: str) -> None:
    for name, mask in masks.items():
        if name not in found:
            raise PruneError(f"{what}: has no '{name}'{nearest_name(name, list(found))}")
        if found[name].shape != mask.shape:
            shapes = tuple(found[name].shape), tuple(mask.shape)
            raise PruneError(f"{what}: '{name}' has shape {shapes[0]}, the mask has {shapes[1]}")


_KEY = "prune.initial_masks"


def read_masks_at(source: str) -> MaskSet:
    """Reads masks from a file, or from the round or trial at an address.

    Args:
        source: Path or s3:// address of a mask file, of a round's folder, or of a trial's, which
            stands for its chosen round.

    Raises:
        StoreError: There is no such thing, or it is damaged.
    """
    is_s3 = source.startswith("s3://")
    path = Path(source.removeprefix("file://")).expanduser()
    if is_s3 and source.partition("?")[0].endswith(".safetensors"):
        address, mark, query = source.partition("?")
        folder, _, name = address.rpartition("/")
        data = open_objects(f"{folder}{mark}{query}").get(name)
        if data is None:
            raise StoreError(f"'{source}': there is no such file")
        return MaskSet.from_bytes(data, source)
    if not is_s3 and path.is_file():
        try:
            return MaskSet.from_bytes(path.read_bytes(), source)
        except OSError as error:
            raise StoreError(f"'{source}': cannot be read: {error.strerror}") from None
    store, trial, record = locate_round(source)
    return MaskSet.from_bytes(store.read_file(trial, record, MASKS), source)


def read_initial_masks(
    job: JobConfig, units: Iterable[Prunable], left_out: Collection[str] = ()
) -> MaskSet | None:
    """Reads the masks that a job starts from and fits them to its network; None without any.

    Args:
        left_out: Names that the masks may hold beside those of the units.

    Raises:
        ConfigError: They cannot be read, have another digest than the job names, do not fit, or
            remove more than the job asks for.
    """
    if not job.prune.initial_masks:
        return None
    source = job.prune.initial_masks
    found, named = read_named_masks(source), f"{_KEY} = '{source}'"
    if job.prune.initial_masks_digest not in ("", found.digest):
        raise ConfigError(
            f"{named}: holds other masks than when the job was made (digest {found.digest[:12]}, "
            f"not {job.prune.initial_masks_digest[:12]}); restore them, or unset "
            "prune.initial_masks_digest, which makes it another job"
        )
    shapes = {unit.name: tuple(unit.parameter.shape) for unit in units}
    masks = _fit(found, shapes, (*job.prune.exclude, *left_out), named)
    # Of whole units the budget says more.
    is_beyond = num_to_prune(job.prune.sparsity, masks.num_units) < masks.num_pruned
    if is_beyond and not job.prune.unit_kinds:
        raise ConfigError(
            f"prune.sparsity = {job.prune.sparsity:g}: is below the {masks.sparsity:.4f} of "
            f"{_KEY}, and masks only ever remove; raise it"
        )
    return masks


def read_named_masks(source: str) -> MaskSet:
    """Reads the masks that a job names as `read_masks_at`; raises ConfigError with its field."""
    try:
        return read_masks_at(source)
    except GbpError as error:
        raise ConfigError(f"{_KEY} = '{source}': {error}") from error


def _fit(
    found: MaskSet, shapes: Mapping[str, tuple[int, ...]], exclude: tuple[str, ...], named: str
) -> MaskSet:
    for name, mask in found.items():
        if name not in shapes:
            if is_matched(name, exclude):
                continue
            raise ConfigError(
                f"{named}: masks '{name}', which is no prunable parameter of this network"
                f"{nearest_name(name, list(shapes))}; give masks of the same network, or name it "
                "in prune.include or prune.exclude"
            )
        if tuple(mask.shape) != shapes[name]:
            raise ConfigError(
                f"{named}: the mask of '{name}' has shape {tuple(mask.shape)}, the weights have "
                f"{shapes[name]}; give masks of the same network, or name it in prune.exclude"
            )
    own = {
        name: found.get(name, torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items()
    }
    return MaskSet(own, 0, found.criterion, found.digest)


@torch.no_grad()
def forget_pruned(model: nn.Module, optimizer: Optimizer | None, masks: MaskSet) -> None:
    """Zeroes the optimizer's state (momentum, second moments) of pruned weights."""
    for name, parameter in model.named_parameters():
        if name in masks and optimizer is not None:
            for value in _state_like(optimizer, parameter).values():
                local(value).masked_fill_(~local(masks[name]), 0)


def check_pruned_zero(model: nn.Module, optimizer: Optimizer | None, masks: MaskSet) -> None:
    """Checks that pruned weights, and the optimizer's state for them, are exactly zero.

    Raises:
        PruneError: Naming the first parameter that is not.
    """
    revived = masks.find_revived(model)
    if revived is not None:
        raise PruneError(f"'{revived}': a pruned weight came back to life during training")
    if optimizer is None:
        return
    found = {
        (name, key): int(torch.any(local(value)[~local(masks[name])] != 0))
        for name, parameter in model.named_parameters()
        if name in masks
        for key, value in _state_like(optimizer, parameter).items()
    }
    everywhere = add_over_ranks(list(found.values()), masks.values())
    for (name, key), number in zip(found, everywhere, strict=True):
        if number:
            raise PruneError(f"'{name}': optimizer state '{key}' of a pruned weight is not 0")


def _state_like(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }
