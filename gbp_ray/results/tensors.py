"""Stored masks and weights, without torch: the mask file, and the zeros of stored weights.

Mask file, version 1 (a safetensors file):
    - One uint8 tensor per masked parameter, under the parameter's name, of ceil(n / 8) bytes for n
      weights. Weight i of the parameter, in flat C order, is bit (i mod 8) of byte (i div 8), least
      significant bit first; 1 means kept. Padding bits of the last byte are 0.
    - Metadata (strings): `format` = "gbp_ray.masks", `version` = "1"; `shapes`, a JSON object from
      parameter name to shape; `digest`, below; `parent`, the digest of the masks of the round
      before, or ""; `round`, a decimal number; `criterion`; `sparsity`, as measured.
    - Digest: SHA-256, in hex, over the parameters in name order, of name, NUL, shape in decimal
      joined by "x", NUL, packed bytes. It depends only on the masks, not on the metadata.
    Checked on reading: the safetensors structure, format and version, byte counts against shapes,
    padding bits, and the digest. Not checked: the parent, the criterion, and the weights that the
    masks belong to.

Counting zeros needs no arithmetic, only bits, so it works for types that numpy does not have.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as save_arrays

from gbp_ray.errors import StoreError
from gbp_ray.results.records import RoundRecord
from gbp_ray.results.store import Store

__all__ = [
    "MASKS",
    "WEIGHTS",
    "MaskFile",
    "PackedMask",
    "Shared",
    "compare_masks",
    "count_nonzero",
    "digest_masks",
    "find_revived",
    "read_mask_file",
    "read_masks",
    "read_weight",
    "sum_shared",
    "write_mask_file",
]

MASKS = "masks.safetensors"
WEIGHTS = "weights.safetensors"

_FORMAT = {"format": "gbp_ray.masks", "version": "1"}

# Bytes of a number, and the bits that may be set in a zero: the sign of a float.
_ZEROS = {
    "F64": (np.uint64, 1 << 63),
    "F32": (np.uint32, 1 << 31),
    "F16": (np.uint16, 1 << 15),
    "BF16": (np.uint16, 1 << 15),
    "F8_E4M3": (np.uint8, 1 << 7),
    "F8_E5M2": (np.uint8, 1 << 7),
    "I64": (np.uint64, 0),
    "I32": (np.uint32, 0),
    "I16": (np.uint16, 0),
    "I8": (np.uint8, 0),
    "U8": (np.uint8, 0),
    "U64": (np.uint64, 0),
    "U32": (np.uint32, 0),
    "U16": (np.uint16, 0),
    "BOOL": (np.uint8, 0),
    "C64": (np.uint64, 1 << 63 | 1 << 31),
}


@dataclass(frozen=True)
class PackedMask:
    """A mask of one parameter, packed as in its file.

    Attributes:
        shape: Of the weights.
        bits: (ceil(n / 8),) uint8, 1 = kept.
    """

    shape: tuple[int, ...]
    bits: np.ndarray

    @classmethod
    def pack(cls, mask: np.ndarray, shape: Sequence[int]) -> PackedMask:
        """Pack a bool array, which may be flat."""
        return cls(tuple(shape), np.packbits(mask.reshape(-1), bitorder="little"))

    @property
    def num_kept(self) -> int:
        """Weights that are kept."""
        return int(np.bitwise_count(self.bits).sum())

    @property
    def num_weights(self) -> int:
        """Weights in all."""
        return math.prod(self.shape)

    def unpack(self) -> np.ndarray:
        """Return the mask itself: bool, shaped like the weights."""
        bits = np.unpackbits(self.bits, count=self.num_weights, bitorder="little")
        return bits.astype(bool).reshape(self.shape)


class MaskFile(NamedTuple):
    """The masks of a file by parameter name, and the round, criterion and parent it names."""

    masks: dict[str, PackedMask]
    round: int
    criterion: str
    parent: str


def write_mask_file(masks: Mapping[str, PackedMask], **facts: object) -> bytes:
    """Write a mask file; the facts are parent, round, criterion and sparsity."""
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    metadata = {**_FORMAT, "shapes": shapes, "digest": digest_masks(masks)}
    metadata |= {name: str(value) for name, value in facts.items()}
    data = save_arrays({name: mask.bits for name, mask in masks.items()}, metadata)
    # safetensors shuffles metadata, and equal masks mean equal bytes.
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read_mask_file(data: bytes, source: str) -> MaskFile:
    """Read and check a mask file.

    Raises:
        StoreError: It is cut short, altered or of another format.
    """
    tensors = _deserialize(data, source)
    try:
        # safetensors offers metadata of files only; the header is its documented first part.
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        if {name: metadata.get(name) for name in _FORMAT} != _FORMAT:
            raise StoreError(f"'{source}': is not a mask file of format gbp_ray.masks, version 1")
        masks = {
            name: _check_packed(tensors.pop(name), shape)
            for name, shape in json.loads(metadata["shapes"]).items()
        }
        if tensors:
            raise ValueError("its shapes are of other masks")
        found = MaskFile(
            masks,
            int(metadata["round"]),
            metadata.get("criterion", ""),
            metadata.get("parent", ""),
        )
        is_intact = digest_masks(masks) == metadata["digest"]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"'{source}': is damaged ({type(error).__name__}: {error})") from None
    if not is_intact:
        raise StoreError(f"'{source}': is damaged, its masks do not match its digest; restore it")
    return found


def _check_packed(tensor: Mapping[str, Any], shape: Any) -> PackedMask:
    """Check that a stored tensor is a packed mask of a shape; raise ValueError if not."""
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{str(shape)[:99]} is not a shape")
    bits, total = np.frombuffer(tensor["data"], np.uint8), math.prod(shape)
    if tensor["dtype"] != "U8" or bits.size != -(-total // 8):
        raise ValueError(f"{bits.size} bytes cannot hold {str(total)[:99]} bits")
    if total % 8 and bits[-1] >> total % 8:
        raise ValueError("padding bits are set")
    return PackedMask(tuple(shape), bits)


def read_masks(store: Store, trial_id: str, record: RoundRecord) -> dict[str, PackedMask]:
    """Read and check the masks of a committed round.

    Raises:
        StoreError: They are missing or damaged.
    """
    data = store.read_file(trial_id, record, MASKS)
    return read_mask_file(data, store.round_uri(trial_id, record.round)).masks


def digest_masks(masks: Mapping[str, PackedMask]) -> str:
    """Compute the digest of the mask file format."""
    digest = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        digest.update(name.encode() + b"\0" + "x".join(map(str, mask.shape)).encode() + b"\0")
        digest.update(mask.bits.data)
    return digest.hexdigest()


class Shared(NamedTuple):
    """Weights that both or either of two masks keep, and those expected of random masks.

    The random masks keep as many weights of each parameter: below their overlap nothing is shared
    but the sparsities.
    """

    both: int
    either: int
    chance_both: float
    chance_either: float

    @property
    def overlap(self) -> float:
        """Intersection over union of the kept weights; 1 where nothing is kept."""
        return self.both / self.either if self.either else 1.0

    @property
    def chance(self) -> float:
        """The overlap expected of random masks."""
        return self.chance_both / self.chance_either if self.chance_either else 1.0


def compare_masks(
    one: Mapping[str, PackedMask], other: Mapping[str, PackedMask]
) -> dict[str, Shared]:
    """Compare the masks of each parameter that both sides have in one shape."""
    found = {}
    for name, mask in one.items():
        match = other.get(name)
        if match is None or match.shape != mask.shape:
            continue
        both = int(np.bitwise_count(mask.bits & match.bits).sum())
        kept, kept_other = mask.num_kept, match.num_kept
        chance = kept * kept_other / max(1, mask.num_weights)
        found[name] = Shared(both, kept + kept_other - both, chance, kept + kept_other - chance)
    return found


def sum_shared(layers: Iterable[Shared]) -> Shared:
    """Sum over layers."""
    return Shared(*(sum(column) for column in zip(Shared(0, 0, 0.0, 0.0), *layers, strict=True)))


def count_nonzero(data: bytes, source: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Count the weights other than zero of each stored tensor: name to (shape, count).

    Raises:
        StoreError: It is not a safetensors file.
    """
    return {
        name: (tuple(tensor["shape"]), int(np.count_nonzero(_bits(tensor))))
        for name, tensor in _deserialize(data, source).items()
    }


def read_weight(data: bytes, name: str, source: str) -> np.ndarray | None:
    """Read one stored tensor as float32; None where it is not there, or of a type unknown here.

    Raises:
        StoreError: It is not a safetensors file.
    """
    tensor = _deserialize(data, source).get(name)
    if tensor is None:
        return None
    if tensor["dtype"] == "BF16":
        # The upper half of a float32.
        halves = np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16
        return halves.view(np.float32).reshape(tensor["shape"])
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16}.get(tensor["dtype"])
    if kind is None:
        return None
    return np.frombuffer(tensor["data"], kind).astype(np.float32).reshape(tensor["shape"])


def find_revived(data: bytes, masks: Mapping[str, PackedMask], source: str) -> str | None:
    """Name a parameter that has a weight other than zero where its mask removes it, or None.

    Raises:
        StoreError: The weights are not a safetensors file.
    """
    tensors = _deserialize(data, source)
    for name, mask in masks.items():
        if name in tensors:
            alive = np.packbits(_bits(tensors[name]) != 0, bitorder="little")
            if alive.shape != mask.bits.shape or (alive & ~mask.bits).any():
                return name
    return None


def _bits(tensor: dict[str, Any]) -> np.ndarray:
    if tensor["dtype"] not in _ZEROS:
        raise StoreError(f"holds numbers of type {tensor['dtype']}, whose zeros are not known here")
    kind, sign = _ZEROS[tensor["dtype"]]
    values = np.frombuffer(tensor["data"], kind)
    return values & kind(~sign & (2 ** (8 * values.itemsize) - 1)) if sign else values


def _deserialize(data: bytes, source: str) -> dict[str, dict[str, Any]]:
    try:
        return dict(deserialize(data))
    except (SafetensorError, ValueError, OverflowError) as error:
        raise StoreError(f"'{source}': is not a readable safetensors file: {error}") from None
