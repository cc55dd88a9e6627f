"""What modules inside a network put out, and how far two networks' outputs are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config import nearest_name
from gbp_ray.errors import ConfigError

__all__ = ["feature_distance", "refuse_untappable", "tapped"]


@contextmanager
def tapped(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of modules by name; of a module called several times, the last one."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            outputs[name] = output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def feature_distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Computes the mean over modules of the mean squared difference of their outputs.

    Source:
        Romero et al. 2015 (1412.6550), eq. 3, between networks of one shape, without a regressor.
    """
    return torch.stack(
        [functional.mse_loss(found[name].float(), wanted[name].float()) for name in wanted]
    ).mean()


def refuse_untappable(model: nn.Module, names: Sequence[str], inputs: Tensor, key: str) -> None:
    """Refuses names of modules that the network does not have, or whose outputs are no tensors.

    Args:
        inputs: A small batch.

    Raises:
        ConfigError: Naming the first one.
    """
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        if name not in paths:
            raise ConfigError(
                f"{key} = '{name}': the network has no such module{nearest_name(name, paths)}"
            )
    with torch.no_grad(), tapped(model, names) as outputs:
        model(inputs)
    for name in names:
        if not isinstance(outputs.get(name), Tensor):
            raise ConfigError(
                f"{key} = '{name}': this module is not called, or gives something else than one "
                "tensor; name another"
            )
