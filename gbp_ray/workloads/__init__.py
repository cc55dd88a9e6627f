"""Networks, data and metrics that are pruned: the user's or built in, checked and read alike.

A workload from elsewhere and a built-in one enter by the same contract. Every worker calls the
factory, so what it builds is compared between workers and with round 0, and a difference is refused
by name. A job names a built-in workload as "gbp_ray.zoo:digits_convnet", which is part of the id of
its trial.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "cifar10_convnet": "cifar10",
    "cifar10_resnet20": "cifar10",
    "cifar10_resnet32": "cifar10",
    "cifar10_resnet56": "cifar10",
    "digits_convnet": "digits",
    "digits_recurrent": "digits",
    "digits_regression": "digits",
    "digits_resnet20": "digits",
    "digits_segmentation": "digits",
    "huggingface": "transformers",
    "text_lm": "text",
    "timm": "classifiers",
    "torchvision_classifier": "classifiers",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gbp_ray.workloads' has no attribute {name!r}")
    value = getattr(import_module(f"gbp_ray.workloads.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
