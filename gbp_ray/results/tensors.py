"""Stored weights and masks, as far as they are read without torch.

Counting zeros needs no arithmetic, only bits, so it works for types that numpy does not have. The
mask format is specified in `pruning/masks.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from gbp_ray.errors import StoreError

__all__ = [
    "PackedMask",
    "check_packed",
    "count_nonzero",
    "digest_masks",
    "find_revived",
    "read_masks",
    "read_weight",
]

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
    """A mask of one parameter, packed as the format says.

    Attributes:
        shape: Of the weights.
        bits: (ceil(n / 8),) uint8, 1 = kept.
    """

    shape: tuple[int, ...]
    bits: np.ndarray

    @property
    def num_kept(self) -> int:
        """Weights that are kept."""
        return int(np.bitwise_count(self.bits).sum())

    @property
    def num_weights(self) -> int:
        """Weights in all."""
        return math.prod(self.shape)

    def unpack(self) -> np.ndarray:
        """Gives the mask itself: bool, shaped like the weights."""
        bits = np.unpackbits(self.bits, count=self.num_weights, bitorder="little")
        return bits.astype(bool).reshape(self.shape)


def check_packed(bits: np.ndarray, shape: Any) -> tuple[int, ...]:
    """Returns the shape of a packed mask if the bits are those of one.

    Raises:
        ValueError: They are not, or the shape is none.
    """
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{str(shape)[:99]} is not a shape")
    total = math.prod(shape)
    if bits.dtype != np.uint8 or bits.size != -(-total // 8):
        raise ValueError(f"{bits.size} bytes cannot hold {str(total)[:99]} bits")
    if total % 8 and bits[-1] >> total % 8:
        raise ValueError("padding bits are set")
    return tuple(shape)


def read_masks(data: bytes, source: str) -> dict[str, PackedMask]:
    """Reads a mask file by parameter name.

    Raises:
        StoreError: It is none.
    """
    tensors = _deserialize(data, source)
    try:
        length = int.from_bytes(data[:8], "little")
        shapes = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["shapes"])
        masks = {}
        for name, shape in shapes.items():
            bits = np.frombuffer(tensors[name]["data"], np.uint8)
            masks[name] = PackedMask(check_packed(bits, shape), bits)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"'{source}': is no mask file ({type(error).__name__})") from None
    return masks


def digest_masks(masks: dict[str, PackedMask]) -> str:
    """Computes the digest that the format specifies."""
    digest = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        digest.update(name.encode() + b"\0" + "x".join(map(str, mask.shape)).encode() + b"\0")
        digest.update(mask.bits.tobytes())
    return digest.hexdigest()


def count_nonzero(data: bytes, source: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Counts the weights other than zero of each stored tensor: name to (shape, count).

    Raises:
        StoreError: It is not a safetensors file.
    """
    return {
        name: (tuple(tensor["shape"]), int(np.count_nonzero(_bits(tensor))))
        for name, tensor in _deserialize(data, source).items()
    }


def read_weight(data: bytes, name: str, source: str) -> np.ndarray | None:
    """Reads one stored tensor as float32; None where it is not there, or of a type unknown here.

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


def find_revived(data: bytes, masks: dict[str, PackedMask], source: str) -> str | None:
    """Names a parameter that has a weight other than zero where its mask removes it, or None.

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
        raise StoreError(f"'{source}': is not a safetensors file: {error}") from None
