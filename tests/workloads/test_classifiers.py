"""Any torchvision classifier over CIFAR-10 or image folders, and torchvision's weights by name."""

from __future__ import annotations

import sys
import urllib.request

import pytest
import torch
from small_data import draw_images, encode, message_of

from gbp_ray.workloads import digits_resnet20, timm, torchvision_classifier
from gbp_ray.workloads.checks import check_workload
from gbp_ray.workloads.data import seeded, take_batch
from gbp_ray.workloads.images import import_vision


@pytest.fixture
def folders(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog", "owl"):
            folder = tmp_path / "folders" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw_images(1, 40, seed=i)[0][:, : 30 + i]
                (folder / f"{i}.png").write_bytes(encode(pixels))
    return tmp_path / "folders"


def test_classifier_over_cifar10_is_scaled_up(tiny):
    workload = torchvision_classifier("mobilenet_v3_small", str(tiny), image_size=64)
    model = workload.build_model()
    check_workload(workload, model, 4)
    inputs, _ = take_batch(workload, workload.train, torch.arange(4), augment_seed=1)
    assert inputs.shape == (4, 3, 64, 64)
    assert model(inputs).shape == (4, 10)


def test_classifier_over_folders_has_an_output_per_class(folders):
    workload = torchvision_classifier(
        "squeezenet1_1", str(folders), image_size=32, train_examples=3, test_examples=3
    )
    model = workload.build_model()
    check_workload(workload, model, 3)
    inputs, targets = take_batch(workload, workload.train, torch.arange(3), augment_seed=1)
    assert inputs.shape == (3, 3, 32, 32)
    assert targets.tolist() == [0, 1, 2], "the examples kept must spread over the classes"
    assert model(inputs).shape == (3, 3)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_extra_heads_are_left_out(name):
    from gbp_ray.workloads.classifiers import _build_model

    with torch.device("meta"):
        outputs = _build_model(name, 10).train()(torch.empty(2, 3, 299, 299))
    assert outputs.shape == (2, 10)


def test_bad_folders_are_refused_in_one_line(folders):
    def refused(data=folders):
        text = message_of(torchvision_classifier, "squeezenet1_1", str(data))
        assert text.startswith(f"workload.options.data = '{data}': ")
        return text

    assert "holds neither CIFAR-10" in refused(folders / "train")
    assert "no such folder" in refused(folders / "none")
    (folders / "train" / "emu").mkdir()
    assert "'train/' is not a folder of images by class" in refused()
    (folders / "train" / "emu" / "0.png").write_bytes(b"not an image")
    assert "only one of them has emu" in refused()
    (folders / "val" / "emu").mkdir()
    (folders / "val" / "emu" / "0.png").write_bytes(b"not an image")
    workload = torchvision_classifier("squeezenet1_1", str(folders), image_size=32)
    text = message_of(lambda: [workload.train[i] for i in range(len(workload.train))])
    assert "emu/0.png' cannot be decoded" in text


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


# -- timm ------------------------------------------------------------------------------------------


@pytest.fixture
def library():
    import_vision("models")
    return pytest.importorskip("timm", reason="needs the extra timm, which is not installed")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_models_of_timm_take_images_as_they_were_trained_to(library, tiny, folders, name):
    card = library.get_pretrained_cfg(name)
    for data, size, classes in ((tiny, None, 10), (folders, 48, 3)):
        workload = timm(name, str(data), image_size=size)
        model = workload.build_model()
        check_workload(workload, model, 4)
        inputs, _ = take_batch(workload, workload.test, torch.arange(2))
        raw = torch.stack([torch.tensor(example_of(workload.test, i)) for i in range(2)])
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
        torch.testing.assert_close(inputs, (raw / 255 - mean) / std)
        assert model(inputs).shape == (2, classes)
        assert len(workload.classes) == classes


def example_of(split, index):
    return split[0][index] if isinstance(split, tuple) else split[index][0].tolist()


def test_weights_of_timm_replace_all_but_the_head(library, tiny, monkeypatch):
    with seeded(7):
        trained = library.create_model("test_resnet").state_dict()
    found = library.models._builder
    monkeypatch.setattr(found, "load_state_dict_from_hf", lambda *a, **k: dict(trained))
    model = timm("test_resnet", str(tiny), weights="DEFAULT").build_model()
    for key, tensor in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(tensor, trained[key]), key
    assert model.fc.weight.shape[0] == 10


def test_timm_refuses_other_names_in_one_line(library, tiny, monkeypatch):
    def refused(model, **options):
        return message_of(timm, model, str(tiny), **options)

    assert "timm has no such model, did you mean 'resnet" in refused("resnet81")
    assert "timm has no such weights of resnet18" in refused("resnet18", weights="a1_in2k")
    assert "image_size = 0: must" in refused("test_vit", image_size=0)
    assert "give one of them" in refused("test_vit", weights="DEFAULT", checkpoint="any")

    def unreachable(*args, **options):
        raise ConnectionError("no way there")

    monkeypatch.setattr(library.models._builder, "load_state_dict_from_hf", unreachable)
    assert "cannot be fetched (" in refused("test_vit", weights="DEFAULT")


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'gbp-ray[timm]'" in message_of(timm, "resnet18", "data")
