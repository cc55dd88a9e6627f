"""Arguments of the functions that prune a network in memory, checked as the fields of a job are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from gbp_ray.config.prune import PruneConfig
from gbp_ray.config.schema import explain_faults, nearest_name
from gbp_ray.distributed.agreement import digest_tensor, fingerprint
from gbp_ray.distributed.ranks import Ranks, fixed_kernels
from gbp_ray.distributed.sharding import adopt_sharded, is_sharded
from gbp_ray.errors import ConfigError, GbpError, PruneError, WorkloadError
from gbp_ray.pruning.units import Prunable
from gbp_ray.workloads.batch import kind_of
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import without_loaders
from gbp_ray.workloads.loading import build_network
from gbp_ray.workloads.metrics import Metric
from gbp_ray.workloads.tying import unwrapped

__all__ = [
    "Loss",
    "as_in_a_job",
    "buffers_of_first",
    "check_reached",
    "check_same_replicas",
    "check_whole",
    "check_whole_network",
    "config_of",
    "keeping_gradients",
    "make_workload",
    "network_in",
    "optimizer_in",
    "reword_reasons",
]

Loss = Callable[[Any, Any], Tensor]

_OF_UNITS = ("round_to", "min_width", "unit_score", "compact")
_OF_REFIT = ("reconstruct_damping", "reconstruct_positions", "reconstruct_relu_steps")
_OTHERS = ("layer_min_sparsity", "layer_max_sparsity", "hutchinson_probes")
_FIELDS = (*_OTHERS, *_OF_UNITS, *_OF_REFIT)
"""Fields of a job's [prune] that are taken beside those in the signatures."""

_UNJUDGED = Metric("unjudged", lambda outputs, targets: torch.zeros(1), lambda sums: 0.0)


@contextmanager
def as_in_a_job(num_threads: int, split: str = "data") -> Iterator[None]:
    """Computes in the block as a job does, whatever surrounds it, and names arguments in errors.

    Gradients are on and autocast is off.

    Args:
        num_threads: See `fixed_kernels`.
        split: The argument that stands for a job's data.
    """
    check_whole("num_threads", num_threads, 1)
    with ExitStack() as stack:
        stack.enter_context(_naming_arguments(split))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(fixed_kernels(num_threads))
        yield


def check_whole(name: str, value: object, least: int, why: str = "") -> None:
    """Raises ConfigError for an argument that is no whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} = {value!r}: must be a whole number from {least} on{why}")


_ARGUMENTS = (
    (r"^workload: ", "data: "),
    (r",? in workload\.factory\b", ""),
    (r"\bworkload\.(?:build_model|factory)\b", "model"),
    (r"\bprune\.initial_masks\b", "masks"),
    (r"\b(?:prune|workload)\.(\w+)", r"\1"),
    (r"^prune: ", "model: "),
    (r"\b(give|to) Workload a\b", r"\1 a"),
)
"""Fields of a job, as its checks name them, and the arguments that take their place."""


def _reword(text: str, split: str = "data") -> str:
    text = re.sub(r"\bworkload\.(?:train|test)\b", split, text)
    for pattern, argument in _ARGUMENTS:
        text = re.sub(pattern, argument, text)
    return text


@contextmanager
def _naming_arguments(split: str) -> Iterator[None]:
    """Makes the errors and warnings of a job's checks name arguments."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except GbpError as error:
        error.args = (_reword(str(error), split),)
        raise
    finally:
        for warning in caught:
            # Where the caller of the public function is: above the generator and its block.
            warnings.warn(_reword(str(warning.message), split), warning.category, stacklevel=7)


def config_of(fields: Mapping[str, Any], **given: Any) -> PruneConfig:
    """Checks arguments as a job's [prune] is checked.

    Args:
        fields: Those beside the signature, of `_FIELDS`.

    Raises:
        ConfigError: One line that lists every fault.
    """
    for name in fields:
        if name == "reconstruct":
            raise ConfigError(
                "reconstruct: refits weights right after a decision, which only prune_model does; "
                "leave it out, or call prune_model"
            )
        if name not in _FIELDS:
            raise ConfigError(
                f"{name}: is no argument{nearest_name(name, [*given, *_FIELDS])} "
                f"(allowed: {', '.join([*given, *_FIELDS])})"
            )
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("exclude", "include"):
        if isinstance(globs := given.get(name, ()), str):
            given[name] = (globs,)
        elif isinstance(globs, Iterable):
            given[name] = tuple(globs)
    try:
        config = PruneConfig(**given, **fields)
    except ValidationError as error:
        raise ConfigError("; ".join(explain_faults(error, PruneConfig))) from None
    if not config.unit_kinds and (idle := [name for name in fields if name in _OF_UNITS]):
        raise ConfigError(
            f"{idle[0]}: is of whole units, and granularity = '{config.granularity}' has none; "
            "leave it out, or set granularity to channel, head or channel+head"
        )
    if config.reconstruct == "none" and (
        idle := [n for n in fields if n in _OF_REFIT and n not in config.spec.options]
    ):
        raise ConfigError(
            f"{idle[0]}: is of reconstruct, which is none; leave it out, or call prune_model with "
            'reconstruct = "least_squares"'
        )
    if config.unit_kinds and config.include:
        raise ConfigError(
            f"include: is of single weights, and granularity = '{config.granularity}' finds whole "
            "units in all layers; leave it out"
        )
    return config


def network_in(model: nn.Module) -> nn.Module:
    """Returns the network inside wrappers, fit to be scored where it is. Communicates if sharded.

    Raises:
        WorkloadError: It is none, is spread over devices or has no weights yet, or would be
            trained by a backward pass.
    """
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"model: must be a torch.nn.Module, not {kind_of(model)}")
    # Refuses what no job could prune, too.
    plain = build_network(Workload(lambda: unwrapped(model), None, None))
    devices = {str(tensor.device) for tensor in plain.parameters()}
    if len(devices) > 1 or "meta" in devices:
        where = " and ".join(sorted(devices))
        raise WorkloadError(
            f"model: its parameters are on {where}; move the network to one device, with weights"
        )
    for name, parameter in plain.named_parameters():
        if parameter.is_inference():
            raise WorkloadError(
                f"model: '{name}' was made under torch.inference_mode and has no gradients; make "
                "the network outside"
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise WorkloadError(
                f"model: '{name}' has a hook that runs when its gradient is there, such as an "
                "optimizer inside the backward pass, which scoring would set off; prune before the "
                "hook is registered"
            )
    adopt_sharded(plain)
    return plain


def optimizer_in(optimizer: Any) -> Optimizer:
    """Returns torch's own optimizer inside those of Lightning and accelerate.

    Raises:
        ConfigError: It is none.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer: must be a torch.optim.Optimizer, not {kind_of(optimizer)}")
    return optimizer


def check_whole_network(model: nn.Module, why: str) -> None:
    """Raises WorkloadError for a network in shards, of which whole units cannot be found."""
    if is_sharded(model):
        raise WorkloadError(
            f"model: is sharded by fully_shard, and {why} needs it in one piece; do it before the "
            'network is sharded, or run a job with cluster.strategy = "fsdp"'
        )


def make_workload(
    model: nn.Module,
    data: Any,
    loss: Loss,
    forward: Callable[[nn.Module, Any], Any] | None,
    collate: Callable[[list[Any]], Any] | None,
    count: Callable[[Any], float | Tensor] | None,
) -> Workload:
    """Makes a workload of the arguments, which nothing judges."""
    functions = {"loss": loss, "forward": forward, "collate": collate, "count": count}
    for name, function in functions.items():
        if not callable(function) and (function is not None or name == "loss"):
            raise ConfigError(f"{name}: must be a function, not {kind_of(function)}")
    workload = Workload(
        lambda: model, data, data, loss, forward=forward, collate=collate, count=count
    )
    workload = replace(workload, metrics=(_UNJUDGED,))
    if not isinstance(data, DataLoader):
        return workload
    usual = (SequentialSampler, RandomSampler, DistributedSampler)
    own = data.sampler if type(data.batch_sampler) is BatchSampler else data.batch_sampler
    with warnings.catch_warnings(action="ignore"):
        workload = without_loaders(workload)
    if own is not None and type(own) not in usual:
        warnings.warn(
            f"data: the DataLoader's {type(own).__name__} is not used, all examples of its dataset "
            "may be drawn; give a torch.utils.data.Subset to draw from some only",
            stacklevel=2,
        )
    # One split, which is checked and fingerprinted once.
    return replace(workload, test=workload.train)


def reword_reasons(unpruned: Mapping[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Makes the reasons of a `Survey` name arguments."""
    return {name: (number, _reword(why)) for name, (number, why) in unpruned.items()}


def check_reached(units: Iterable[Prunable], unreached: Iterable[str]) -> None:
    """Raises WorkloadError if a loss depends on none of the weights."""
    if {unit.name for unit in units} <= set(unreached):
        raise WorkloadError(
            "loss: depends on no prunable weight, so that all scores would be 0; let model, "
            "forward and loss keep the graph (no detach, no torch.no_grad)"
        )


def check_same_replicas(model: nn.Module, ranks: Ranks) -> None:
    """Checks that all ranks of a replicated network have the same weights. Communicates.

    Raises:
        PruneError: On every rank, naming those that differ from rank 0.
    """
    if ranks.world_size == 1 or is_sharded(model):
        return
    digests = {name: digest_tensor(parameter) for name, parameter in model.named_parameters()}
    everyone = ranks.all_gather_objects(fingerprint(digests))
    if strays := [rank for rank, other in enumerate(everyone) if other != everyone[0]]:
        raise PruneError(
            f"model: its weights on ranks {strays} are not those on rank 0; wrap it in "
            "DistributedDataParallel or shard it, so that all train one network"
        )


@contextmanager
def keeping_gradients(model: nn.Module) -> Iterator[None]:
    """Puts `grad` of each parameter back after the block."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def buffers_of_first(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Makes every rank compute with the buffers of rank 0 in the block. Communicates."""
    buffers = list(model.buffers())
    if ranks.world_size == 1 or not buffers:
        yield
        return
    kept = [buffer.clone() for buffer in buffers]
    _fill(buffers, ranks.broadcast_object([buffer.cpu() for buffer in buffers]))
    try:
        yield
    finally:
        _fill(buffers, kept)


@torch.no_grad()
def _fill(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
