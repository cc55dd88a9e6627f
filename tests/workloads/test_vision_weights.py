"""Torchvision's weights by name, from torch.hub's folder; nothing here goes to the network."""

from __future__ import annotations

import urllib.request

import pytest
import torch
from small_data import message_of

from gbp_ray.workloads import digits_resnet20, torchvision_classifier
from gbp_ray.workloads.data import seeded
from gbp_ray.workloads.images import import_vision


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of torch.hub's, on a machine that reaches nothing."""

    def refuse(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def store(hub, name="resnet18", num_classes=1000):
    """Puts weights under the name that torchvision looks for."""
    models = import_vision("models")
    weights = models.get_model_weights(name).DEFAULT
    with seeded(7):
        model = models.get_model(name, weights=None, num_classes=num_classes)
    torch.save(model.state_dict(), hub / weights.url.rpartition("/")[2])
    return model.state_dict()


def test_weights_by_name_with_a_head_for_these_classes(hub, tiny):
    stored = store(hub)
    workload = torchvision_classifier("resnet18", str(tiny), weights="DEFAULT")
    state = workload.build_model().state_dict()
    assert state["fc.weight"].shape == (10, 512)
    for name, value in state.items():
        if not name.startswith("fc."):
            assert torch.equal(value, stored[name]), name


def test_weights_that_cannot_be_fetched_say_where_to_put_them(hub, tiny):
    text = message_of(torchvision_classifier, "resnet18", str(tiny), weights="IMAGENET1K_V1")
    assert "cannot be fetched from https://download.pytorch.org/models/resnet18-" in text
    assert f".pth into {hub}, or leave workload.options.weights out" in text


def test_other_names_and_other_networks_are_refused(hub, tiny):
    text = message_of(torchvision_classifier, "resnet18", str(tiny), weights="IMAGENET1K_V9")
    assert "no such weights of resnet18, did you mean 'IMAGENET1K_V1'?" in text
    store(hub)
    file = next(hub.iterdir())
    state = torch.load(file)
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:7]
    torch.save(state, file)
    text = message_of(torchvision_classifier, "resnet18", str(tiny), weights="DEFAULT")
    assert "does not fit resnet18: 'layer1.0.conv1.weight' has shape (7, 64, 3, 3)" in text
    text = message_of(
        torchvision_classifier, "resnet18", str(tiny), weights="DEFAULT", checkpoint="x.pt"
    )
    assert "give one of them" in text


@pytest.mark.parametrize("size", [16, 32])
def test_digits_become_what_a_network_of_cifar10_takes(size):
    workload = digits_resnet20(size, augment=False)
    inputs = workload.prepare(workload.train[0][:4])
    assert inputs.shape == (4, 3, size, size)
    low, high = (torch.tensor(bound).view(3, 1, 1) for bound in workload.input_range)
    grey = (inputs - low) / (high - low)
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-5)
    assert float(grey.min()) > -1e-5
    assert float(grey.max()) < 1 + 1e-5
    means = workload.train[0][:4].float().mean(dim=(1, 2, 3)) / 16
    assert torch.allclose(grey.mean(dim=(1, 2, 3)), means, atol=0.02)
    assert workload.build_model()(inputs).shape == (4, 10)


def test_digits_resnet20_refuses_odd_options():
    assert "at least 8" in message_of(digits_resnet20, 4)
    assert "must be true or false" in message_of(digits_resnet20, augment="yes")
