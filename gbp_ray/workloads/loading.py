"""Loading of workloads and of their networks.

Built-in workloads come through the same door as a user's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gbp_ray.config.schema import nearest_name
from gbp_ray.config.workload import EncodingConfig, WorkloadConfig
from gbp_ray.errors import ConfigError, GbpError, WorkloadError, in_one_line
from gbp_ray.workloads.batch import kind_of, map_tensors, tensors_in
from gbp_ray.workloads.code import import_attribute, staying
from gbp_ray.workloads.contract import (
    Portion,
    Workload,
    bounds_of_inputs,
    check_range,
    num_examples,
)
from gbp_ray.workloads.data import (
    derive_seed,
    first_example,
    seeded,
    shuffled_indices,
    without_loaders,
)
from gbp_ray.workloads.encoding import encode_network
from gbp_ray.workloads.tying import find_shared_memory, with_tied_weights, without_wrappers
from gbp_ray.workloads.weights import start_from

__all__ = [
    "build_network",
    "hold_out",
    "in_channels_last",
    "load_workload",
]


def load_workload(config: WorkloadConfig, seed: int | None = None) -> Workload:
    """Calls the factory that a job names, and holds out examples if the job asks for it.

    Args:
        seed: Of the job; seeds the factory's draws and the choice of held-out examples.

    Raises:
        ConfigError: The factory cannot be found, or does not take these options.
        WorkloadError: The factory failed, or returned something else than a `Workload`.
    """
    factory = import_attribute(config.factory, "workload.factory")
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise ConfigError(
            f"workload.factory = '{config.factory}': is not callable; it must return a Workload"
        ) from None
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in config.options:
            if name not in parameters:
                raise ConfigError(
                    f"workload.options.{name}: {config.factory} has no such option"
                    f"{nearest_name(name, list(parameters))} "
                    f"(allowed: {', '.join(parameters) or 'none'})"
                )
    for name, parameter in parameters.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and name not in config.options:
            raise ConfigError(f"workload.options.{name}: is required by {config.factory}")
    try:
        # A network that is made here, and not in build_model, is the same in every process.
        with seeded(derive_seed(seed, "factory")), staying("workload.factory"):
            workload = factory(**config.options)
    except GbpError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            raise WorkloadError(
                f"workload.factory = '{config.factory}': '{error.filename}' does not exist; "
                "check workload.options"
            ) from error
        raise WorkloadError(
            f"workload.factory = '{config.factory}' raised {in_one_line(error)}"
        ) from error
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"workload.factory = '{config.factory}' returned {type(workload).__name__}; "
            "it must return a gbp_ray.Workload"
        )
    workload = without_loaders(workload)
    workload = replace(workload, build_model=without_wrappers(workload.build_model))
    if config.transfer.checkpoint:
        start = start_from(workload.build_model, config.transfer)
        workload = replace(workload, build_model=start)
    if config.tie:
        tied = with_tied_weights(workload.build_model, config.tie)
        workload = replace(workload, build_model=tied)
    if config.encoding.kind != "none":
        workload = _encoded(workload, config.encoding)
    if config.validation:
        assert seed is not None, "the seed decides which examples are set aside"
        workload = hold_out(workload, config.validation, seed)
    return in_channels_last(workload) if config.channels_last else workload


def in_channels_last(workload: Workload) -> Workload:
    """Lays the images of every batch out pixel by pixel.

    Weights stay as they are: convolutions keep their inputs' layout for what they make, and weights
    are small beside that.
    """
    return replace(workload, prepare=partial(_to_channels_last, workload.prepare))


def _to_channels_last(prepare: Callable[[Any], Any] | None, nest: Any) -> Any:
    nest = nest if prepare is None else prepare(nest)
    if not any(tensor.ndim == 4 for tensor in tensors_in(nest)):
        raise ConfigError(
            "workload.channels_last = true: a batch of this workload holds no images of shape "
            "(B, C, H, W); leave it out"
        )
    # Unlike `contiguous`, `to` also sets the strides of images of one channel.
    return map_tensors(
        nest, lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t
    )


def _encoded(workload: Workload, config: EncodingConfig) -> Workload:
    """Puts the workload's network behind an encoding, which takes intensities."""
    example = first_example(workload).inputs
    if not isinstance(example, Tensor):
        raise ConfigError(
            f"workload.encoding.kind: encodes inputs that are one tensor, not {kind_of(example)}; "
            "leave it out"
        )
    low, high = bounds_of_inputs(workload.input_range, example, "workload.encoding.kind")
    check_range(example, low, high)
    build, prepare = workload.build_model, workload.prepare
    return replace(
        workload,
        build_model=lambda: encode_network(build(), config, low, high, example),
        prepare=partial(_to_intensities, prepare, low, high),
        input_range=(0.0, 1.0),
    )


def _to_intensities(
    prepare: Callable[[Tensor], Tensor] | None, low: Tensor, high: Tensor, inputs: Tensor
) -> Tensor:
    prepared = inputs if prepare is None else prepare(inputs)
    low, high = low.to(prepared.device), high.to(prepared.device)
    return (prepared - low) / (high - low)


def hold_out(workload: Workload, share: float, seed: int) -> Workload:
    """Makes a share of the training examples the validation split.

    Raises:
        ConfigError: The workload has a validation split of its own, or too few examples.
    """
    if workload.validation is not None:
        raise ConfigError(
            f"workload.validation = {share:g}: this workload brings a validation split of its own; "
            "leave it out"
        )
    total = num_examples(workload.train)
    num_aside = round(share * total)
    if not 0 < num_aside < total:
        raise ConfigError(
            f"workload.validation = {share:g}: sets {num_aside} of {total} training examples "
            "aside; some must be, and some must be left"
        )
    order = shuffled_indices(total, derive_seed(seed, "validation"))
    # In their own order, so that reading them goes through the data once.
    aside, kept = order[:num_aside].sort().values, order[num_aside:].sort().values
    return replace(
        workload,
        train=Portion(workload.train, kept),
        validation=Portion(workload.train, aside),
    )


def build_network(workload: Workload) -> nn.Module:
    """Calls `build_model`; raises WorkloadError unless it makes a network of separate tensors."""
    try:
        with staying("workload.build_model"):
            model = workload.build_model()
    except GbpError:
        raise
    except (Exception, SystemExit) as error:
        raise WorkloadError(f"workload.build_model raised {in_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise WorkloadError(
            f"workload.build_model returned {kind_of(model)}; it must return a torch.nn.Module"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise WorkloadError(
                f"workload.build_model: '{name}' of the network has no shape yet, its module is "
                "lazy; call the network on one batch before returning it"
            )
    if shared := find_shared_memory(model):
        one, other = shared
        raise WorkloadError(
            f"workload.build_model: '{one}' and '{other}' share memory without being one "
            "parameter, which copies, masks and workers would part; assign one parameter to both, "
            "name their layers in workload.tie, or give each its own memory by clone()"
        )
    return model
