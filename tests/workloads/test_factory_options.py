"""Options of the built-in workloads."""

from __future__ import annotations

import numpy as np
import pytest
from small_data import draw_images, message_of

from gbp_ray.config.workload import WorkloadConfig
from gbp_ray.errors import ConfigError
from gbp_ray.workloads import cifar10_convnet
from gbp_ray.workloads.loading import load_workload


@pytest.mark.parametrize(
    ("factory", "options", "expected"),
    [
        ("digits_convnet", {"width": 0}, "options.width = 0: must be a whole number"),
        ("digits_convnet", {"batchnorm": 1}, "options.batchnorm = 1: must be true or false"),
        ("digits_recurrent", {"steps": 0}, "options.steps = 0: must be a whole number"),
        ("digits_recurrent", {"shared": "no"}, "options.shared = 'no': must be true or false"),
        ("digits_segmentation", {"examples": 0}, "options.examples = 0: must be a whole number"),
        ("digits_regression", {"width": 2.5}, "options.width = 2.5: must be a whole number"),
        ("text_lm", {"context": "long"}, "options.context = 'long': must be a whole number"),
        ("text_lm", {"heads": 5}, "options.heads = 5: must divide workload.options.width = 96"),
        ("text_lm", {"context": 10**6}, "less than a window of 1000000; give a longer text"),
        ("text_lm", {"data": "/none.txt"}, "'/none.txt' cannot be read as text in UTF-8 ("),
        ("digits_convnet", {"augment": "yes"}, "options.augment = 'yes': must be a list such as"),
        ("cifar10_resnet20", {"data": "/none"}, "options.data = '/none': no such folder; set"),
        ("cifar10_resnet20", {"data": 3}, "options.data = 3: must be the path"),
        ("cifar10_resnet20", {"data": "what://x"}, "options.data = 'what://x': "),
        ("cifar10_resnet20", {"augment": ["crop", "flop"]}, "did you mean 'flip'? (allowed: crop"),
        ("cifar10_resnet20", {"augment": "crop"}, "options.augment = 'crop': must be a list"),
        ("cifar10_resnet20", {"download": 1}, "options.download = 1: must be true or false"),
        ("cifar10_resnet20", {"train_examples": 0}, "options.train_examples = 0: must be a whole"),
        ("cifar10_resnet20", {"test_examples": 7}, "options.test_examples = 7: must be a whole"),
        ("cifar10_convnet", {"batchnorm": "on"}, "options.batchnorm = 'on': must be true"),
        ("torchvision_classifier", {"model": "resnet81"}, "did you mean 'resnet"),
        ("torchvision_classifier", {"model": "resnet18", "image_size": 0}, "image_size = 0: must"),
    ],
)
def test_bad_options_are_refused_in_one_line(tiny, factory, options, expected):
    needs_data = not factory.startswith(("digits", "text")) and "data" not in options
    options = ({"data": str(tiny)} if needs_data else {}) | options
    config = WorkloadConfig(factory=f"gbp_ray.zoo:{factory}", options=options)
    text = message_of(load_workload, config)
    assert text.startswith("workload.options.")
    assert expected in text


def test_options_are_known_by_name(tiny):
    config = WorkloadConfig(factory="gbp_ray.zoo:cifar10_resnet56", options={"dat": str(tiny)})
    with pytest.raises(ConfigError, match="did you mean 'data'"):
        load_workload(config)


def test_first_examples_are_taken(tiny):
    workload = cifar10_convnet(str(tiny), train_examples=4, test_examples=2, augment=[])
    assert (len(workload.train[1]), len(workload.test[1])) == (4, 2)
    assert np.array_equal(workload.train[0], draw_images(4))
    assert workload.augment is None
