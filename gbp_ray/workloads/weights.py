"""Weights from elsewhere: which state dict of a file a network starts from, and whether it fits.

A file is compared with the network name by name before anything is trained.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gbp_ray.config.schema import is_matched, match_names, nearest_glob
from gbp_ray.config.workload import TransferConfig
from gbp_ray.errors import ConfigError, WorkloadError, name_some
from gbp_ray.workloads.data import seeded
from gbp_ray.workloads.weight_files import State, WeightFile, read_weights

__all__ = [
    "TEACHER",
    "find_misfits",
    "fit_state",
    "load_state",
    "pick_state",
    "save_state",
    "start_from",
    "tensor_state",
    "with_checkpoint",
]

TEACHER = "finetune.distillation.teacher"
"""The option that names a teacher's weights."""

_TRANSFER = "workload.transfer"
_CHECKPOINT = f"{_TRANSFER}.checkpoint"


# What torch puts into names where it wraps a module.
_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


# What people call the network inside something else that is saved with it.
_WRAPPER_NAMES = {
    *("module", "model", "net", "network", "backbone", "encoder", "student", "teacher"),
    *("ema", "ema_model", "model_ema", "averaged_model", "swa_model"),
}


def fit_state(file: WeightFile, expected: Mapping[str, Tensor]) -> State:
    """Picks as `pick_state` what a network can be loaded from whole.

    Args:
        expected: The network's own state.
    """
    return pick_state(file, expected, lambda state: find_misfits(state, expected))


def pick_state(
    file: WeightFile,
    expected: Mapping[str, Tensor],
    find_faults: Callable[[State], str],
    *,
    with_numbers: bool = False,
) -> State:
    """Picks the state dict of a file that suits, under the network's names.

    Wrappers may have put a prefix before all names, such as "module." or "model.", and torch its
    "_orig_mod." into them. A prefix is taken off only where the network lacks all names as they
    are, and where what has the prefix suits as a whole; what is left out then is warned of.

    Args:
        expected: The network's names, with its own tensors or others.
        find_faults: Words why a state does not suit; "" where it does.
        with_numbers: Keeps numbers that the network lacks, such as the decay of an average.

    Returns:
        The state that suits; where none does, the one of the most names that the network has.

    Raises:
        WorkloadError: Several suit, and are not equal.
    """
    readings = list(_readings(file, expected, with_numbers))
    suited = [reading for reading in readings if not find_faults(reading[1])]
    if not suited:
        return max(readings, key=lambda reading: sum(name in expected for name in reading[1]))[1]
    label, state, left_out = suited[0]
    others = [other for other in suited[1:] if not _are_equal(other[1], state)]
    if others:
        choices = ", ".join(f"'{choice}'" for choice in (label, *(other[0] for other in others)))
        raise WorkloadError(
            f"{file.named}: holds several sets of weights that fit the network: {choices}; save "
            "the one that is meant as a file of its own"
        )
    if left_out:
        warnings.warn(
            f"{file.named}: {name_some(left_out, 3)} left out, which the network lacks",
            stacklevel=2,
        )
    return state


def _readings(
    file: WeightFile, expected: Mapping[str, Tensor], with_numbers: bool
) -> Iterator[tuple[str, State, list[str]]]:
    """Lists what a file may mean: (where, the state by the network's names, what it leaves out)."""
    # A network may be wrapped as well.
    wrapper = "module." if all(name.startswith("module.") for name in expected) else ""
    own = {_unwrap(name).removeprefix(wrapper): name for name in expected}
    for place, found in file.states.items():
        state = {_unwrap(name): tensor for name, tensor in found.items()}
        if len(state) < len(found):
            state = found
        prefixes = [""]
        if not any(name in own for name in state):
            prefixes = _find_prefixes(state, own) or [""]
        for prefix in prefixes:
            under = {
                own.get(name.removeprefix(prefix), name.removeprefix(prefix)): tensor
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
            rest = [name for name in state if not name.startswith(prefix)]
            if not with_numbers:
                rest += [name for name, t in under.items() if name not in expected and t.ndim == 0]
                under = {name: tensor for name, tensor in under.items() if name not in rest}
            label = ".".join(part for part in (place, prefix and f"{prefix}*") if part)
            yield label or "the file itself", under, [f"'{name}'" for name in rest]


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def _find_prefixes(state: Iterable[str], own: Container[str]) -> list[str]:
    """Lists what may be taken off names: what all have, and what wrappers are often called."""
    names = list(state)
    prefixes = {
        name[: dot.end()]: None
        for name in names
        for dot in re.finditer(r"\.", name)
        if name[dot.end() :] in own
    }
    return [
        prefix
        for prefix in prefixes
        if set(prefix.split(".")[:-1]) <= _WRAPPER_NAMES
        or all(name.startswith(prefix) for name in names)
    ]


def _are_equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def tensor_state(model: nn.Module) -> dict[str, Tensor]:
    """Lists the tensors of a state dict; a module may add other things to it (`get_extra_state`).

    Parameters are listed themselves.
    """
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def save_state(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Writes a state as safetensors; tensors that share memory are copied, as the format asks."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        memory = tensor.untyped_storage()
        is_alone = memory.nbytes() == tensor.nbytes and memory.data_ptr() not in seen
        if not (is_alone and tensor.is_contiguous()):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
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
    recast = [
        f"'{name}' is {_short(tensor.dtype)} where the model has {_short(expected[name].dtype)}"
        for name, tensor in state.items()
        if name in expected and not _keeps_values(tensor, expected[name].dtype)
    ]
    reshaped = [
        f"'{name}' has shape {tuple(tensor.shape)} where the model has "
        f"{tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    faults = []
    if missing:
        faults.append(f"it lacks {name_some(missing, 3)}")
    if unexpected:
        faults.append(f"it has the unexpected {name_some(unexpected, 3)}")
    faults += [name_some(items, 3) for items in (reshaped, recast) if items]
    return "; ".join(faults)


def _keeps_values(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Checks whether a tensor can be loaded into another type with no loss but rounding."""
    if dtype.is_floating_point:
        # Whole numbers in place of weights are quantized ones, whose scale is elsewhere.
        return tensor.is_floating_point()
    # Whoever halves a checkpoint halves its counters, too.
    is_whole = tensor.is_floating_point() and torch.equal(tensor, tensor.round())
    return is_whole or torch.can_cast(tensor.dtype, dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place_of(tensor: Tensor) -> int:
    rows = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(rows.data_ptr())


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
        WorkloadError: As `read_weights`; or, when a model is built, names or shapes differ outside
            the new head.
        ConfigError: When a model is built: a glob matches no weight of it.
    """
    file = read_weights(config.checkpoint, _CHECKPOINT, config.checkpoint_digest)
    return partial(_build_from, build_model, config, file)


def _build_from(
    build_model: Callable[[], nn.Module], config: TransferConfig, file: WeightFile
) -> nn.Module:
    model = build_model()
    own = tensor_state(model)
    if any(tensor.is_meta for tensor in own.values()):
        raise WorkloadError(
            f"{_CHECKPOINT}: the network is built on the meta device, layer by layer, and "
            "a checkpoint comes in one piece; build it with its weights"
        )
    for pattern in config.new_head:
        if not match_names(pattern, own):
            raise ConfigError(
                f"{_TRANSFER}.new_head = '{pattern}': matches no weight of the network"
                f"{nearest_glob(pattern, own)}"
            )

    def without_head(state: Mapping[str, Tensor]) -> State:
        return {name: t for name, t in state.items() if not is_matched(name, config.new_head)}

    wanted = without_head(own)
    taken = without_head(
        pick_state(file, own, lambda state: find_misfits(without_head(state), wanted))
    )
    if faults := find_misfits(taken, wanted):
        raise WorkloadError(
            f"{_CHECKPOINT} = '{config.checkpoint}': does not fit the network: {faults}; "
            f"name what is to be drawn anew in {_TRANSFER}.new_head, or give weights of this very "
            "network"
        )
    return load_state(model, taken)


_KEY = "workload.options.checkpoint"


def with_checkpoint(
    build_model: Callable[[], nn.Module], checkpoint: str | None
) -> Callable[[], nn.Module]:
    """Returns a builder whose every model starts from the checkpoint's weights.

    The file is read and checked now, so that its faults show before any training.

    Args:
        build_model: Makes the model with fresh weights.
        checkpoint: Path or s3:// address of a file as `weight_files.read_weights` takes it; None
            leaves `build_model` as it is.

    Raises:
        WorkloadError: The file is missing or damaged, or its names or shapes are not the model's.
    """
    if checkpoint is None:
        return build_model
    file = read_weights(checkpoint, _KEY)
    with seeded(0):  # the check's own draws must not shift those of the job
        expected = build_model().state_dict()
    state = fit_state(file, expected)
    if faults := find_misfits(state, expected):
        raise WorkloadError(
            f"{_KEY} = '{checkpoint}': does not fit the model: {faults}; give a checkpoint of this "
            "very model, another workload.factory, or workload.transfer with a new_head"
        )
    return partial(_build_loaded, build_model, state)


def _build_loaded(build_model: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    return load_state(build_model(), state)
