"""Reading of weight files in the formats people have, and of the state dicts in them.

Nothing in a file is run. safetensors holds only tensors. The other formats are read by
`torch.load(weights_only=True)`, where the few classes that are often met beside the weights, such
as NumPy's numbers, are put in as an object that does nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from gbp_ray.errors import WorkloadError
from gbp_ray.workloads.location import describe_fault, read_bytes

__all__ = [
    "SUFFIXES",
    "State",
    "WeightFile",
    "hash_weights",
    "name_of",
    "read_weights",
    "suffix_of",
]

State = dict[str, Tensor]
_PICKLED = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar", ".pkl")
_SHARDED = ".index.json"
SUFFIXES = (".safetensors", *_PICKLED, _SHARDED)
"""Suffixes of files of weights."""

_MOST_DEPTH = 5  # of dictionaries in dictionaries

_MAKE_SAFE = (
    "import sys, torch; x = torch.load(sys.argv[1], 'cpu', weights_only=False); "
    "x = x if isinstance(x, dict) else {'model': x}; "
    "torch.save({k: getattr(v, 'state_dict', lambda: v)() for k, v in x.items() if "
    "hasattr(v, 'state_dict') or torch.is_tensor(v) or isinstance(v, dict) and "
    "any(map(torch.is_tensor, v.values()))}, sys.argv[2])"
)
"""Keeps of a checkpoint, which it trusts, only the weights."""


class _Inert:
    """Stands for an object beside the weights: takes whatever the file says, and does nothing."""

    def __init__(self, *content: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Not the classes themselves: NumPy's would build what the file says, and no number is needed here.
_INERT: list[Any] = [
    (_Inert, name)
    for name in (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("scalar", "_reconstruct")
        ),
    )
]


@dataclass(frozen=True)
class WeightFile:
    """The content of a file of weights.

    Attributes:
        named: Option and address, for messages.
        states: Its state dicts by their place: "" for the file itself, else the keys that lead
            there, such as "model" or "ema.module".
    """

    named: str
    states: Mapping[str, State]


def name_of(address: str) -> str:
    """Finds the name of a file or folder by its path or address."""
    # Only in an address is a "?" not part of the name.
    return PurePath(address.partition("?")[0] if "://" in address else address).name


def suffix_of(address: str) -> str:
    """Finds how the name of a file of weights ends; another name's own last suffix."""
    name = name_of(address).lower()
    return _SHARDED if name.endswith(_SHARDED) else PurePath(name).suffix


def hash_weights(address: str, key: str) -> str:
    """Computes the SHA-256 of a file of weights, its shards included.

    Raises:
        WorkloadError: It cannot be read.
    """
    return _hash(_read_parts(address, key))


def read_weights(address: str, key: str, digest: str = "") -> WeightFile:
    """Reads a file of weights.

    Args:
        address: Path or s3:// address of a `.safetensors` file, of the index of several, or of
            what `torch.save` has written.
        key: Dotted name of the option that holds the address, for messages.
        digest: What the SHA-256 of the file was when the job was made; "" for whatever it is.

    Raises:
        WorkloadError: The file is missing, damaged, another one, or holds more than tensors.
    """
    named, suffix = f"{key} = '{address}'", suffix_of(address)
    parts = _read_parts(address, key)
    if digest not in ("", found := _hash(parts)):
        raise WorkloadError(
            f"{named}: holds other weights than when the job was made (SHA-256 {found[:12]}, not "
            f"{digest[:12]}); restore them, or unset {key}_digest, which makes it another job"
        )
    if suffix not in SUFFIXES:
        raise WorkloadError(
            f"{named}: unknown kind of file '{suffix}' (allowed: {', '.join(SUFFIXES)}); save the "
            "state dict as .safetensors"
        )
    states: dict[str, State] = {}
    if suffix in _PICKLED:
        states.update(_find_states(_unpickle(parts[0], address, named)))
    else:
        state: State = {}
        for part in parts[suffix == _SHARDED :]:
            state |= _load_safetensors(part, named)
        states[""] = state
    if not any(states.values()):
        raise WorkloadError(
            f"{named}: holds no state dict; save model.state_dict() itself, or under 'state_dict'"
        )
    for state in states.values():
        for name, tensor in state.items():
            if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
                raise WorkloadError(
                    f"{named}: '{name}' is no ordinary tensor with values (it is quantized, sparse "
                    "or on the meta device); save the weights as plain floating-point tensors"
                )
    return WeightFile(named, states)


def _read_parts(address: str, key: str) -> list[bytes]:
    """Reads a file; of an index, its shards after it."""
    content = read_bytes(address, key)
    if suffix_of(address) != _SHARDED:
        return [content]
    path, mark, query = address.partition("?") if "://" in address else (address, "", "")
    folder = path[: len(path) - len(re.split(r"[/\\]", path)[-1])]
    names = _shard_names(content, f"{key} = '{address}'")
    return [content, *(read_bytes(f"{folder}{name}{mark}{query}", key) for name in names)]


def _shard_names(content: bytes, named: str) -> list[str]:
    try:
        names = sorted(set(json.loads(content)["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise WorkloadError(
            f'{named}: is no index of shards; it must read {{"weight_map": {{"name": "file"}}}}'
        ) from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w .-]*\.safetensors", name):
            raise WorkloadError(
                f"{named}: names the shard {name!r}; it must be a .safetensors file of the same "
                "folder"
            )
    return names


def _hash(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _load_safetensors(content: bytes, named: str) -> State:
    try:
        return load_tensors(content)
    except Exception as error:  # a damaged header may raise anything
        raise WorkloadError(
            f"{named}: is truncated or not a safetensors file "
            f"({_describe_content(content) or describe_fault(error)}); copy it again"
        ) from error


def _unpickle(content: bytes, address: str, named: str) -> object:
    try:
        # What it warns of, such as other protocols, it either reads or refuses.
        with torch.serialization.safe_globals(_INERT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise WorkloadError(f"{named}: {_describe_refusal(error, content, address)}") from error


def _describe_refusal(error: Exception, content: bytes, address: str) -> str:
    """Words why torch has not read a file, and what to do."""
    text = str(error)
    code = re.search(r"GLOBAL (\S+)", text)
    if code and "is blocked" in text:
        return (
            f"names {code[1]}, which no weights need and which could do anything; nothing of the "
            "file was run; take weights from a source that you trust"
        )
    if code or "weights_only=True`` with" in text:
        what = code[1] if code else "a TorchScript program or files of the legacy .tar format"
        name = name_of(address)
        old = name if "://" in address else address
        files = shlex.join([old, f"{PurePath(name).stem}-weights.pt"])
        return (
            f"holds more than tensors: {what}, which would have to be run to be read; nothing of "
            "the file was run. If you trust where it comes from, this runs it once and keeps only "
            f'the weights, in a safe file: python -c "{_MAKE_SAFE}" {files}'
        )
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    why = _describe_content(content) or (reason[1] if reason else describe_fault(error))
    return (
        f"is truncated or holds more than tensors ({why}); copy it again, or save the state dict "
        "as .safetensors"
    )


def _describe_content(content: bytes) -> str:
    """Words what a file is that is often met in the place of weights; "" for others."""
    start = content[:100].lstrip().lower()
    if not content:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is Git LFS's pointer to the file; git lfs pull fetches the file"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    return ""


def _find_states(loaded: object) -> Iterator[tuple[str, State]]:
    """Finds the dictionaries that hold tensors by name, the outer ones first.

    What lies beside the tensors of a dictionary, such as the number of the epoch, is no weight.
    """
    seen: set[int] = set()
    level: list[tuple[str, object]] = [("", loaded)]
    for _ in range(_MOST_DEPTH):
        deeper: list[tuple[str, object]] = []
        for place, value in level:
            if not isinstance(value, Mapping) or id(value) in seen:
                continue
            seen.add(id(value))
            named = {key: item for key, item in value.items() if isinstance(key, str)}
            state = {name: t.detach() for name, t in named.items() if isinstance(t, Tensor)}
            if state:
                yield place, state
            deeper += [
                (f"{place}.{name}" if place else name, item)
                for name, item in named.items()
                if isinstance(item, Mapping) and not name.startswith("optim")
            ]
        level = deeper
