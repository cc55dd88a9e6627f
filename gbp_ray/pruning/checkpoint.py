"""Writes and reads the files of a round: weights, masks, and the state that training goes on from.

    weights.safetensors   the state dict; what anyone loads
    masks.safetensors     see `masks`
    state.pt              of a replicated network: the optimizer's state and the movement statistic
    shards/               of a sharded one: weights and state as torch.distributed.checkpoint writes
                          them to safetensors, each rank its own file

Shards can be read back by any number of ranks and by a replicated network, and a sharded network
takes its rows from the files of a replicated one. So a trial can resume on any cluster.
"""

from __future__ import annotations

import io
import mmap
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole, is_sharded, shard_like, shard_rows
from gbp_ray.errors import StoreError
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.results.store import REMEDY
from gbp_ray.training.network import distinct_state, load_weights
from gbp_ray.workloads.weights import save_state

if TYPE_CHECKING:
    from gbp_ray.pruning.whole_units import WholeUnits

__all__ = ["SHARDS", "Checkpoint", "damaged", "restore_state", "save_round", "shard_masks"]

SHARDS = "shards/"
_SCALARS = ("step",)
"""State of Adam and AdamW that is not shaped like its parameter."""


@dataclass(frozen=True)
class Checkpoint:
    """The files of a round, as bytes.

    Attributes:
        round: Its number.
        masks: masks.safetensors.
        weights: weights.safetensors; not needed where there are shards.
        state: state.pt, of a replicated network.
        shards: Files below shards/ by name, of a sharded network; read one after another.
        dense_weights: weights.safetensors of round 0; see `JobConfig.needs_dense_weights`.
        fingerprints: Of the network and the data of round 0; see `RoundRecord`.
    """

    round: int
    masks: bytes
    weights: bytes = b""
    state: bytes = b""
    shards: Mapping[str, bytes] = field(default_factory=dict)
    dense_weights: bytes = b""
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def read_masks(self) -> MaskSet:
        """Reads the masks; raises StoreError if they are damaged."""
        return MaskSet.from_bytes(self.masks, f"round_{self.round:03d}/masks.safetensors")


def save_round(
    model: nn.Module,
    masks: MaskSet,
    optimizer: Optimizer | None,
    movement: dict[str, Tensor] | None,
    units: WholeUnits | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Yields name and bytes of this rank's files of a round, of which each may be as large as it.

    Communicates where the network is sharded, before the first; then each rank yields its shards,
    and rank 0 the other files as well.

    Args:
        units: Those that have left the network. All files have the dense network's shapes.
    """
    if not is_sharded(model):
        kept = distinct_state(model)
        yield "weights.safetensors", save_state(units.expand(kept) if units else kept)
        yield "masks.safetensors", masks.to_bytes()
        yield "state.pt", _save_training(model, optimizer, movement, units)
        return
    state_by_name = _state_by_name(model, optimizer, movement)
    if units is not None:
        state_by_name = _expand_shards(state_by_name, units)
    files = {f"{SHARDS}{name}": data for name, data in _save_shards(state_by_name).items()}
    is_first = Ranks.current().is_first
    packed = masks.to_bytes()
    weights = _stream_weights(model, units, is_kept=is_first)
    if is_first:
        files |= {"weights.safetensors": weights, "masks.safetensors": packed}
    yield from files.items()


def _save_training(
    model: nn.Module,
    optimizer: Optimizer | None,
    movement: dict[str, Tensor] | None,
    units: WholeUnits | None,
) -> bytes:
    state = optimizer.state_dict() if optimizer else None
    if units is not None:
        movement = None if movement is None else units.expand(movement)
        state = None if optimizer is None else units.expand_optimizer(model, optimizer)
    buffer = io.BytesIO()
    torch.save({"optimizer": state, "movement": movement}, buffer)
    return buffer.getvalue()


def restore_state(
    saved: Checkpoint,
    model: nn.Module,
    make_optimizer: Callable[[], Optimizer],
    device: torch.device,
) -> tuple[Optimizer | None, dict[str, Tensor] | None]:
    """Restores the weights in place; returns the optimizer and the movement statistic.

    Args:
        make_optimizer: () -> a fresh optimizer over the network.

    Raises:
        StoreError: A file is damaged or does not fit the network.
    """
    folder = f"round_{saved.round:03d}"
    if saved.shards:
        return _load_shards(saved, model, make_optimizer)
    load_weights(model, saved.weights, f"{folder}/weights.safetensors")
    try:
        # The optimizer moves its tensors itself; a step count on a GPU would stall each step.
        state = torch.load(io.BytesIO(saved.state), map_location="cpu", weights_only=True)
        movement = state["movement"]
        if movement is not None:
            movement = {name: value.to(device) for name, value in movement.items()}
        optimizer: Optimizer | None = None
        if state["optimizer"] is not None:
            optimizer = make_optimizer()
            optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        # torch raises half a dozen types for bytes that it did not write.
        raise damaged(f"{folder}/state.pt", error) from error
    if is_sharded(model):
        by_name = dict(model.named_parameters())
        for parameter, own in optimizer.state.items() if optimizer else ():
            for key, value in own.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    own[key] = shard_like(value, parameter)
        if movement is not None:
            movement = {name: shard_like(value, by_name[name]) for name, value in movement.items()}
    return optimizer, movement


def shard_masks(masks: MaskSet, model: nn.Module) -> MaskSet:
    """Shards masks like the weights of a network, each rank keeping its rows."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    return replace(masks, masks={n: shard_like(mask, by_name[n]) for n, mask in masks.items()})


def damaged(what: str, error: BaseException) -> StoreError:
    """Returns the error for a file that cannot be used."""
    return StoreError(f"{what}: is damaged ({type(error).__name__}); {REMEDY}")


# -- sharded networks ------------------------------------------------------------------------------


def _expand_shards(state: Mapping[str, Tensor], units: WholeUnits) -> dict[str, Tensor]:
    """Lays the tensors of `_state_by_name` out in dense shapes, one after another."""
    expanded = {}
    for key, tensor in state.items():
        kind, _, name = key.partition(".")
        name = name.rpartition(".")[0] if kind == "optimizer" else name
        is_like_weights = kind != "optimizer" or not key.endswith(tuple(f".{k}" for k in _SCALARS))
        if is_like_weights and (whole := gather_whole(tensor)) is not tensor:
            wide = units.expand({name: whole})[name]
            tensor = tensor if wide is whole else shard_rows(wide, tensor)
        elif is_like_weights:
            tensor = units.expand({name: tensor})[name]
        expanded[key] = tensor
    return expanded


def _stream_weights(model: nn.Module, units: WholeUnits | None, *, is_kept: bool) -> bytes:
    """Assembles weights.safetensors on disk, tensor by tensor, so that no rank holds all of it.

    Returns:
        A memory map of the file, which is deleted already; b"" where it is not kept.
    """
    with tempfile.TemporaryDirectory(prefix="gbp-ray-weights-") as folder:
        on_disk: dict[str, Tensor] = {}
        for number, (name, tensor) in enumerate(distinct_state(model).items()):
            gathered = gather_whole(tensor)
            if units is not None:
                gathered = units.expand({name: gathered})[name]
            if is_kept:
                place = Path(folder) / str(number)
                on_disk[name] = _tensor_on_disk(place, gathered).copy_(gathered)
            del gathered
        if not is_kept:
            return b""
        target = Path(folder) / "weights.safetensors"
        save_file(on_disk, target, {"format": "pt"})
        with target.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # type: ignore[return-value]


def _tensor_on_disk(place: Path, like: Tensor) -> Tensor:
    if like.numel() == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    flat = torch.from_file(str(place), shared=True, size=like.numel(), dtype=like.dtype)
    return flat.view(like.shape)


def _save_shards(state: dict[str, Tensor]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="gbp-ray-shards-") as folder:
        # Ranks share no folder, so each writes into one of its own.
        with warnings.catch_warnings(action="ignore"):  # advice to the authors of torch's callers
            writer = HuggingFaceStorageWriter(folder, save_distributed=True)
            save_shards(state, storage_writer=writer)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _load_shards(
    saved: Checkpoint, model: nn.Module, make_optimizer: Callable[[], Optimizer]
) -> tuple[Optimizer | None, dict[str, Tensor] | None]:
    try:
        with tempfile.TemporaryDirectory(prefix="gbp-ray-shards-") as folder:
            for name in saved.shards:
                (Path(folder) / name).write_bytes(saved.shards[name])
            reader = HuggingFaceStorageReader(folder)
            known = reader.read_metadata().state_dict_metadata
            optimizer = _blank_optimizer(model, make_optimizer, known)
            movement = _blank_movement(model, known)
            state = _state_by_name(model, optimizer, movement)
            _check_fit(state, known, f"round_{saved.round:03d}/shards")
            with warnings.catch_warnings(action="ignore"):
                load_shards(state, storage_reader=reader)
    except StoreError:
        raise
    except (Exception, CheckpointException) as error:
        # CheckpointException does not derive from Exception.
        raise damaged(f"round_{saved.round:03d}/shards", error) from error
    return optimizer, movement


def _check_fit(state: Mapping[str, Tensor], known: Mapping[str, Any], source: str) -> None:
    """Checks names and shapes: torch would only say that something went wrong on some rank."""
    for name in (*known, *state):
        shapes = {
            tuple(state[name].shape) if name in state else None,
            tuple(known[name].size) if name in known else None,
        }
        if len(shapes) > 1:
            raise StoreError(
                f"{source}: does not fit the model at '{name.removeprefix('model.')}'; was the "
                "workload changed?"
            )


def _state_by_name(
    model: nn.Module, optimizer: Optimizer | None, movement: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Returns the tensors of the weights, the optimizer and the movement statistic, by name."""
    state = {f"model.{name}": tensor for name, tensor in distinct_state(model).items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = value
    state |= {f"movement.{name}": value for name, value in (movement or {}).items()}
    # The format of the shards has no 0-dimensional tensors.
    return {name: value.view(1) if value.ndim == 0 else value for name, value in state.items()}


def _blank_optimizer(
    model: nn.Module, make_optimizer: Callable[[], Optimizer], known: Mapping[str, Any]
) -> Optimizer | None:
    """Makes an optimizer with zeros for the state that the shards hold."""
    if not any(name.startswith("optimizer.") for name in known):
        return None
    optimizer = make_optimizer()
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        for full, metadata in known.items():
            key = full.removeprefix(prefix)
            if key == full or "." in key:
                continue
            dtype = metadata.properties.dtype
            optimizer.state[parameter][key] = (
                torch.zeros((), dtype=dtype)
                if key in _SCALARS
                else torch.zeros_like(parameter.detach(), dtype=dtype)
            )
    return optimizer


def _blank_movement(model: nn.Module, known: Mapping[str, Any]) -> dict[str, Tensor] | None:
    movement = {
        name: torch.zeros_like(parameter.detach(), dtype=torch.float64)
        for name, parameter in model.named_parameters()
        if f"movement.{name}" in known
    }
    return movement or None
