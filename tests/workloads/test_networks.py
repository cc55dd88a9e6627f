"""The networks: published sizes, shortcuts and derivatives."""

from __future__ import annotations

import pytest
import torch
from small_data import message_of
from torch.func import functional_call, grad, vmap

from gbp_ray.workloads import cifar10_convnet, cifar10_resnet20, cifar10_resnet32, cifar10_resnet56
from gbp_ray.workloads.checks import check_workload
from gbp_ray.workloads.networks import build_cifar_resnet


@pytest.mark.parametrize(
    ("factory", "count"),
    [
        (cifar10_resnet20, 269_722),
        (cifar10_resnet32, 464_154),
        (cifar10_resnet56, 853_018),
        (cifar10_convnet, 2_141_514),
    ],
)
def test_networks_have_their_published_size_and_take_a_batch(tiny, factory, count):
    workload = factory(str(tiny))
    model = workload.build_model()
    assert sum(p.numel() for p in model.parameters()) == count
    check_workload(workload, model, 4)


def test_convnet_has_batchnorm_on_request(tiny):
    model = cifar10_convnet(str(tiny), batchnorm=True).build_model()
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model) == 2
    check_workload(cifar10_convnet(str(tiny), batchnorm=True), model, 4)


def test_depth_must_fit_the_family():
    assert "6n + 2" in message_of(build_cifar_resnet, 21)


def test_option_a_shortcut_subsamples_and_adds_zero_channels():
    block = build_cifar_resnet(20).layer2[0]
    hidden = torch.randn(2, 16, 8, 8)
    shortcut = block._shortcut(hidden)
    assert shortcut.shape == (2, 32, 4, 4)
    assert torch.equal(shortcut[:, 8:24], hidden[:, :, ::2, ::2])
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()
    assert list(build_cifar_resnet(20).layer1[0]._shortcut(hidden).shape) == [2, 16, 8, 8]


def test_gradients_per_example_equal_a_loop():
    torch.manual_seed(0)
    model = build_cifar_resnet(20).double().eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    images, targets = torch.randn(3, 3, 32, 32).double(), torch.tensor([1, 2, 3])

    def loss(weights, image, target):
        logits = functional_call(model, weights, (image[None],))
        return torch.nn.functional.cross_entropy(logits, target[None])

    together = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, targets)
    for i in range(3):
        alone = grad(loss)(weights, images[i], targets[i])
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name][i], gradient)


def test_second_derivatives_go_through():
    torch.manual_seed(0)
    model = build_cifar_resnet(20).eval()
    loss = model(torch.randn(2, 3, 32, 32)).square().mean()
    weights = list(model.parameters())
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    products = torch.autograd.grad(sum((g * g).sum() for g in gradients), weights)
    assert all(bool(product.isfinite().all()) for product in products)
