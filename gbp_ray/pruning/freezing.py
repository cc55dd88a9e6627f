"""What a training leaves alone: parameters and running statistics by name.

A recipe's globs name parameters and buffers. Named parameters get no gradient and no update, and
keep their bits; they are scored and pruned like all others. A BatchNorm whose running statistics
are named is in eval mode while the others train: it normalises by its statistics, and they do not
move. "layer1.*" names both, "layer1.*.weight" leaves statistics on the move.

Freezing is the training's alone. BatchNorm's re-estimation after a prune covers frozen statistics,
too: what pruning shifts is no matter of learning; `prune.batchnorm_examples = 0` keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gbp_ray.config import is_matched, match_names, nearest_glob
from gbp_ray.errors import ConfigError
from gbp_ray.pruning.sharding import only_requiring

__all__ = ["refuse_unfreezable", "trainable_parameters", "training_mode"]


def trainable_parameters(model: nn.Module, freeze: Sequence[str]) -> dict[str, nn.Parameter]:
    """Lists what a training moves, by first name; a glob may match any name of a tied one."""
    frozen = {
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if is_matched(name, freeze)
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in frozen
    }


def refuse_unfreezable(model: nn.Module, freeze: Sequence[str], section: str) -> None:
    """Refuses globs that match nothing, or leave nothing to train.

    Raises:
        ConfigError: Naming the glob.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    for pattern in freeze:
        if not match_names(pattern, names):
            raise ConfigError(
                f"{section}.freeze = '{pattern}': matches no parameter or buffer"
                f"{nearest_glob(pattern, names)}"
            )
    if freeze and not trainable_parameters(model, freeze):
        raise ConfigError(
            f"{section}.freeze: leaves nothing to train; name less, or set {section}.epochs to 0"
        )


@contextmanager
def training_mode(model: nn.Module, freeze: Sequence[str]) -> Iterator[None]:
    """Puts a model into training mode but for what is frozen, which takes no gradient in the block.

    Afterwards it is left in training mode.
    """
    model.train()
    if not freeze:
        yield
        return
    held = [
        module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and is_matched(f"{path}.running_mean".lstrip("."), freeze)
    ]
    for module in held:
        module.eval()
    try:
        with only_requiring(model, trainable_parameters(model, freeze)):
            yield
    finally:
        for module in held:
            module.train()
