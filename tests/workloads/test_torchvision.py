"""Any torchvision classifier over CIFAR-10 or image folders."""

from __future__ import annotations

import pytest
import torch
from small_data import draw_images, encode, message_of

from gbp_ray.workloads import torchvision_classifier
from gbp_ray.workloads.checks import check_workload
from gbp_ray.workloads.data import take_batch


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
    from gbp_ray.workloads.torchvision import _build_model

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
