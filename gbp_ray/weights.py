"""Files of weights: how a state dict is read, compared with a network, and made its start.

A file is compared with the network name by name before anything is trained. Nothing in it is run:
safetensors holds tensors alone, and the other format is read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePath

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gbp_ray.config import JobConfig, TransferConfig, nearest_name
from gbp_ray.errors import ConfigError, WorkloadError
from gbp_ray.location import describe_fault, read_bytes

__all__ = [
    "TEACHER",
    "find_misfits",
    "load_state",
    "pin_weights",
    "read_state",
    "save_state",
    "start_from",
]

TEACHER = "finetune.distillation.teacher"
"""The option that names a teacher's weights."""

_TRANSFER = "workload.transfer"
_CHECKPOINT = f"{_TRANSFER}.checkpoint"
_PICKLED = (".pt", ".pth", ".th")
_NUM_NAMED = 3


def pin_weights(job: JobConfig, known: dict[str, str]) -> JobConfig:
    """Notes the digests of the files of weights that a job names, which then are part of its id.

    Args:
        known: Digests by address, which grow; jobs of one sweep share them.

    Raises:
        WorkloadError: A file cannot be read.
    """

    def digest(address: str, key: str) -> str:
        if address not in known:
            known[address] = hashlib.sha256(read_bytes(address, key)).hexdigest()
        return known[address]

    transfer, distillation = job.workload.transfer, job.finetune.distillation
    if transfer.checkpoint and not transfer.checkpoint_digest:
        found = digest(transfer.checkpoint, _CHECKPOINT)
        transfer = transfer.model_copy(update={"checkpoint_digest": found})
        workload = job.workload.model_copy(update={"transfer": transfer})
        job = job.model_copy(update={"workload": workload})
    if distillation.teacher and not distillation.teacher_digest:
        found = digest(distillation.teacher, TEACHER)
        distillation = distillation.model_copy(update={"teacher_digest": found})
        finetune = job.finetune.model_copy(update={"distillation": distillation})
        job = job.model_copy(update={"finetune": finetune})
    return job


def read_state(address: str, key: str, digest: str = "") -> dict[str, Tensor]:
    """Reads a file of weights.

    Args:
        address: Path or s3:// address of a `.safetensors` file or of a `.pt`, `.pth` or `.th`
            state dict, which may lie under "state_dict" and have "module." before each name.
        key: Dotted name of the option that holds the address, for messages.
        digest: What the SHA-256 of the file was when the job was made; "" for whatever it is.

    Raises:
        WorkloadError: The file is missing, damaged, another one, or holds more than tensors.
    """
    content = read_bytes(address, key)
    found = hashlib.sha256(content).hexdigest()
    if digest not in ("", found):
        raise WorkloadError(
            f"{key} = '{address}': holds other weights than when the job was made (SHA-256 "
            f"{found[:12]}, not {digest[:12]}); restore them, or unset {key}_digest, which makes "
            "it another job"
        )
    suffix = PurePath(address.partition("?")[0]).suffix
    if suffix == ".safetensors":
        try:
            return load_tensors(content)
        except (SafetensorError, ValueError) as error:
            raise WorkloadError(
                f"{key} = '{address}': is truncated or not a safetensors file "
                f"({describe_fault(error)}); copy it again"
            ) from error
    if suffix not in _PICKLED:
        raise WorkloadError(
            f"{key} = '{address}': unknown kind of file '{suffix}' (allowed: .safetensors, "
            f"{', '.join(_PICKLED)}); save the state dict as .safetensors"
        )
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise WorkloadError(
            f"{key} = '{address}': is truncated or holds more than tensors "
            f"({describe_fault(error)}); save the state dict as .safetensors"
        ) from error
    return _unwrap(loaded, address, key)


def _unwrap(loaded: object, address: str, key: str) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise WorkloadError(
            f"{key} = '{address}': holds no state dict; save model.state_dict() itself, or "
            "under 'state_dict'"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


def save_state(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Writes a state as safetensors; every tensor gets memory of its own, as the format asks."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    return save_tensors(plain, {"format": "pt", **(metadata or {})})


def find_misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Words how a state differs from what a network wants, naming a few; "" where it fits.

    Counts of BatchNorm batches may be absent, and all but one of a tied tensor's names.
    """
    present = {_place_of(expected[name]) for name in state if name in expected}
    missing = [
        f"'{name}'"
        for name, tensor in expected.items()
        if name not in state
        and not name.endswith(".num_batches_tracked")
        and (_place_of(tensor) == 0 or _place_of(tensor) not in present)
    ]
    unexpected = [f"'{name}'" for name in state if name not in expected]
    reshaped = [
        f"'{name}' has shape {tuple(tensor.shape)} where the model has "
        f"{tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    faults = []
    if missing:
        faults.append(f"it lacks {_name_some(missing)}")
    if unexpected:
        faults.append(f"it has the unexpected {_name_some(unexpected)}")
    if reshaped:
        faults.append(_name_some(reshaped))
    return "; ".join(faults)


def _place_of(tensor: Tensor) -> int:
    rows = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(rows.data_ptr())


def _name_some(items: list[str]) -> str:
    rest = len(items) - _NUM_NAMED
    return ", ".join(items[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Loads a state that `find_misfits` has found to fit, in place."""
    model.load_state_dict(dict(state), strict=False)
    return model


def start_from(
    build_model: Callable[[], nn.Module], config: TransferConfig
) -> Callable[[], nn.Module]:
    """Returns a builder whose every model starts from a checkpoint, but for its new head.

    The file is read now; whether it fits is seen when a model is built.

    Args:
        build_model: Makes the model with fresh weights, which the new head keeps.

    Raises:
        WorkloadError: As `read_state`; or, when a model is built, names or shapes differ outside
            the new head.
        ConfigError: When a model is built: a glob matches no weight of it.
    """
    state = read_state(config.checkpoint, _CHECKPOINT, config.checkpoint_digest)
    return partial(_build_from, build_model, config, state)


def _build_from(
    build_model: Callable[[], nn.Module], config: TransferConfig, state: dict[str, Tensor]
) -> nn.Module:
    model = build_model()
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise WorkloadError(
            f"{_CHECKPOINT}: the network is built on the meta device, layer by layer, and "
            "a checkpoint comes in one piece; build it with its weights"
        )
    new: set[str] = set()
    for pattern in config.new_head:
        found = fnmatch.filter(own, pattern)
        if not found:
            raise ConfigError(
                f"{_TRANSFER}.new_head = '{pattern}': matches no weight of the network"
                f"{nearest_name(pattern, list(own))}"
            )
        new.update(found)
    taken = {
        name: tensor
        for name, tensor in state.items()
        if name not in new and not any(fnmatch.fnmatch(name, p) for p in config.new_head)
    }
    wanted = {name: tensor for name, tensor in own.items() if name not in new}
    if faults := find_misfits(taken, wanted):
        raise WorkloadError(
            f"{_CHECKPOINT} = '{config.checkpoint}': does not fit the network: {faults}; "
            f"name what is to be drawn anew in {_TRANSFER}.new_head, or give weights of this very "
            "network"
        )
    return load_state(model, taken)
