"""Built-in workloads; a job names them as "gbp_ray.zoo:digits_convnet", like a user's own."""

from gbp_ray.zoo.cifar10 import (
    cifar10_convnet,
    cifar10_resnet20,
    cifar10_resnet32,
    cifar10_resnet56,
)
from gbp_ray.zoo.classifier import torchvision_classifier
from gbp_ray.zoo.digits import digits_convnet, digits_recurrent, digits_resnet20

__all__ = [
    "cifar10_convnet",
    "cifar10_resnet20",
    "cifar10_resnet32",
    "cifar10_resnet56",
    "digits_convnet",
    "digits_recurrent",
    "digits_resnet20",
    "torchvision_classifier",
]
