"""Checks that all ranks of a trial, and all its runs, have the same network and the same data.

Ranks compare the bits of what they start from. Records hold fingerprints, to be compared when the
trial is resumed or explained, perhaps on another machine: a digest of integers, names and shapes,
and one projection of each floating-point tensor, which rounding hardly changes.

A split is compared by its size, a few fixed examples and, of a tuple, all labels, so that large
data cost no more than small data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import WorkloadError, in_one_line
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import take_batch

__all__ = [
    "check_data",
    "check_on_record",
    "check_same_start",
    "check_same_weights",
    "digest_tensor",
    "digest_weights",
    "fingerprint",
    "fingerprints_of_data",
    "fingerprints_of_network",
]

_NUM_ITEMS = 8
_WHOLE_BYTES = 2**20
"""Tensors up to this size are hashed whole; of larger ones a sample, and the sum of all."""

_LABEL_BYTES = 2**24
_TOLERANCE = 5e-3
"""Between projections: those of other draws differ by about one, of other hardware by rounding."""

_REMEDY_DATA = (
    "sets, folders and unseeded generators give another order in each process: sort them, or seed "
    "them, in workload.factory"
)


def digest_weights(model: nn.Module) -> dict[str, str]:
    """Hashes each parameter and buffer, tied ones under each of their names."""
    return {
        f"{path}.{name}".lstrip("."): digest_tensor(tensor)
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def digest_tensor(tensor: Tensor) -> str:
    """Hashes type, shape and values; of a large tensor a sample, and the sum of all."""
    digest = hashlib.sha256(f"{tensor.dtype}\0{tuple(tensor.shape)}".encode())
    if not tensor.is_meta and tensor.layout is torch.strided:
        bits = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        if len(bits) > _WHOLE_BYTES:
            whole = len(bits) // 4 * 4
            digest.update(str(int(bits[:whole].view(torch.int32).sum())).encode())
            # An odd step, so that every byte of a number is sampled.
            bits = bits[:: len(bits) // _WHOLE_BYTES * 2 + 1].contiguous()
        # A NumPy view would keep buffers of observers from growing.
        digest.update(bits.clone().numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint(*values: Any) -> str:
    """Fingerprints nests of tensors, arrays, numbers and text."""
    digest, projections = hashlib.sha256(), []

    def visit(value: Any) -> None:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            value = torch.from_numpy(
                np.ascontiguousarray(value.astype(value.dtype.newbyteorder("=")))
            )
        if isinstance(value, float | complex):
            value = torch.tensor(value, dtype=torch.complex128)
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            if value.is_floating_point() or value.is_complex():
                projections.append(f"{_project(value):.4f}")
            else:
                digest.update(digest_tensor(value).encode())
        elif isinstance(value, Mapping):
            visit(list(value.items()))
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}".encode())
            for item in value:
                visit(item)
        elif value is None or isinstance(value, int | str | bytes):
            digest.update(f"{value!r}\0".encode())
        elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
            visit(np.asarray(value))
        else:
            digest.update(type(value).__qualname__.encode())

    visit(values)
    return ":".join([digest.hexdigest()[:16], *projections])


def _project(values: Tensor) -> float:
    """Sums numbers with fixed random signs, scaled to about one whatever their number."""
    if values.is_meta or values.numel() == 0:
        return 0.0
    flat = torch.view_as_real(values.detach()) if values.is_complex() else values.detach()
    flat = flat.cpu().reshape(-1)
    # asinh lets both small and huge numbers count.
    flat = flat[:: -(-len(flat) // 2**16)].double().asinh().nan_to_num(0.5, 100, -100)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, flat.shape, generator=generator).mul_(2).sub_(1)
    return float((flat * signs).sum()) / math.sqrt(len(flat))


def _is_alike(one: str, other: str) -> bool:
    if one == other:
        return True
    (digest, *numbers), (other_digest, *others) = one.split(":"), other.split(":")
    if digest != other_digest or len(numbers) != len(others):
        return False
    return all(abs(float(a) - float(b)) <= _TOLERANCE for a, b in zip(numbers, others, strict=True))


def fingerprints_of_network(model: nn.Module, *, is_blank: bool) -> dict[str, str]:
    """Fingerprints what stored weights do not hold: the structure, and non-persistent buffers.

    Args:
        is_blank: True if it was built without weights, so that the seed decides such buffers.
    """
    lines, constants = [], []
    for path, module in model.named_modules():
        lines.append(f"{path}:{type(module).__qualname__}")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                lines.append(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}")
                if name in module._non_persistent_buffers_set and not is_blank:
                    constants.append(tensor)
    return {"the network": fingerprint(lines, constants)}


def fingerprints_of_data(workload: Workload) -> dict[str, str]:
    """Fingerprints size, targets and a few fixed examples of each split, not prepared."""
    bare = replace(workload, prepare=None)
    found = {}
    for split in ("train", "validation", "test"):
        data = getattr(workload, split)
        if data is None:
            continue
        total = num_examples(data)
        found[f"the number of examples of workload.{split}"] = str(total)
        if isinstance(data, tuple) and getattr(data[1], "nbytes", math.inf) <= _LABEL_BYTES:
            found[f"the targets of workload.{split}"] = fingerprint(data[1])
        for index in sorted({round(i * (total - 1) / (_NUM_ITEMS - 1)) for i in range(_NUM_ITEMS)}):
            found[f"item {index} of workload.{split}"] = _fingerprint_item(bare, data, index)
    return found


def _fingerprint_item(workload: Workload, data: Any, index: int) -> str:
    try:
        return fingerprint(take_batch(workload, data, torch.tensor([index])).nest)
    except Exception as error:  # noqa: BLE001 - a bug still deserves one line
        words = str(error) if isinstance(error, WorkloadError) else in_one_line(error)
        return f"({words})".replace(":", "")


def check_same_start(ranks: Ranks, found: Mapping[str, str]) -> None:
    """Checks that all ranks have the same data and build the same network. Communicates.

    Args:
        found: From `fingerprints_of_network` and `fingerprints_of_data`.

    Raises:
        WorkloadError: On every rank, naming the first difference.
    """
    everyone = ranks.all_gather_objects(dict(found))
    for rank, other in enumerate(everyone):
        name = _find_difference(everyone[0], other)
        if name is None:
            continue
        values = _describe(everyone[0], other, name)
        what = f"{name} on rank {rank} is not that on rank 0{values}"
        if name == "the network":
            raise WorkloadError(
                f"workload.build_model: workers build different networks: {what}; let nothing in "
                "it depend on the process"
            )
        raise WorkloadError(f"workers hold different data: {what}; {_REMEDY_DATA}")


def check_same_weights(ranks: Ranks, digests: Mapping[str, str]) -> None:
    """Checks that all ranks start from the same weights. Communicates.

    Args:
        digests: From `digest_weights`.

    Raises:
        WorkloadError: On every rank, naming the first tensor that differs.
    """
    if len(set(ranks.all_gather_objects(fingerprint(dict(digests))))) == 1:
        return
    everyone = ranks.all_gather_objects(dict(digests))
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            names = [n for n in {**everyone[0], **other} if everyone[0].get(n) != other.get(n)]
            raise WorkloadError(
                f"workload.build_model: workers start from different weights: "
                f"'{names[0]}' on rank {rank} is not that on rank 0; draw weights with torch, "
                "NumPy's global generator or random, which the job's seed decides, or read them "
                "from one file"
            )


def check_on_record(found: Mapping[str, str], stored: Mapping[str, str], source: str) -> None:
    """Checks that network and data are those that stored results were made with.

    Args:
        stored: As `found`; only common names are compared.
        source: Name of the results in errors.

    Raises:
        WorkloadError: Naming the first difference.
    """
    common = [name for name in stored if name in found]
    name = _find_difference({n: stored[n] for n in common}, {n: found[n] for n in common})
    if name == "the network":
        raise WorkloadError(
            f"{source}: was made with another network than workload.build_model makes now, in "
            "structure or in buffers that stored weights do not hold; restore it, or give the job "
            "another name"
        )
    if name is not None:
        raise WorkloadError(
            f"{source}: was made with other data, which differ in {name}"
            f"{_describe(stored, found, name)}; {_REMEDY_DATA}, restore the data, or give the "
            "job another name"
        )


def check_data(workload: Workload, stored: Mapping[str, str], source: str) -> None:
    """Checks that data are those that stored results were made with; see `check_on_record`."""
    if stored:
        check_on_record(fingerprints_of_data(workload), stored, source)


def _find_difference(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    for name in (*one, *(n for n in other if n not in one)):
        if name not in one or name not in other or not _is_alike(one[name], other[name]):
            return name
    return None


def _describe(one: Mapping[str, str], other: Mapping[str, str], name: str) -> str:
    """Formats two values for an error, if they are counts or errors themselves."""
    values = [found.get(name, "none") for found in (other, one)]
    if any((value.isdigit() and len(value) < 16) or value.startswith("(") for value in values):
        return f" ({values[0].strip('()')}, not {values[1].strip('()')})"
    return ""
