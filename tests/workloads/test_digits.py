"""The embedded digits: whole, attributed and learnable."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_data import REPOSITORY

from gbp_ray.workloads import (
    digits_convnet,
    digits_recurrent,
    digits_regression,
    digits_segmentation,
)
from gbp_ray.workloads.data import seeded, shuffled_indices, take_batch


def read_digits():
    return pq.read_table(REPOSITORY / "gbp_ray" / "workloads" / "digits.parquet")


def test_digits_asset_is_whole_stratified_and_attributed():
    table = read_digits()
    assert table.schema.field("image").type.list_size == 64
    assert Counter(table["split"].to_pylist()) == {"train": 1297, "test": 500}
    rows = [tuple(row) for row in table["image"].to_pylist()]
    assert len(set(rows)) == 1797, "an image stands in both splits"
    assert (min(map(min, rows)), max(map(max, rows))) == (0, 16)
    labels, split = table["label"].to_numpy(), np.array(table["split"].to_pylist())
    share = np.bincount(labels[split == "test"]) / np.bincount(labels)
    assert np.abs(share - 500 / 1797).max() < 0.005
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["doi"] == "10.24432/C50P49"
    assert "CC BY 4.0" in metadata["licence"]
    assert "Alpaydin" in metadata["citation"]
    assert "random_state=0" in metadata["changes"]


def test_digits_asset_equals_its_source():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is no dependency")
    source, table = datasets.load_digits(), read_digits()
    assert np.array_equal(np.array(table["image"].to_pylist()), source.data)
    assert np.array_equal(table["label"].to_numpy(), source.target)


def test_digits_splits_follow_the_asset():
    table, workload = read_digits(), digits_convnet()
    split = np.array(table["split"].to_pylist())
    for name, (images, labels) in (("train", workload.train), ("test", workload.test)):
        rows = np.array(table["image"].to_pylist())[split == name]
        assert np.array_equal(images.reshape(-1, 64).numpy(), rows)
        assert np.array_equal(labels.numpy(), table["label"].to_numpy()[split == name])
    inputs, _ = take_batch(workload, workload.test, torch.arange(500))
    assert (float(inputs.min()), float(inputs.max())) == (0.0, 1.0)


def test_digits_convnet_learns():
    workload = digits_convnet()
    with seeded(0):
        model = workload.build_model()
    assert sum(p.numel() for p in model.parameters()) == 56_554
    epochs, steps = 10, math.ceil(1297 / 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        for step, indices in enumerate(shuffled_indices(1297, epoch).split(64)):
            inputs, targets = take_batch(
                workload, workload.train, indices, augment_seed=epoch * steps + step
            )
            optimizer.zero_grad()
            workload.loss(model(inputs), targets).backward()
            optimizer.step()
            decay.step()
    model.eval()
    inputs, targets = take_batch(workload, workload.test, torch.arange(500))
    assert int(workload.count_correct(model(inputs), targets)) >= 490


def test_digits_shift_is_a_shift_drawn_per_image():
    augment = digits_convnet().augment
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    with seeded(0):
        shifted = augment(image.expand(400, 1, 8, 8))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))[0]
    allowed = {
        padded[:, y : y + 8, x : x + 8].numpy().tobytes() for y in range(3) for x in range(3)
    }
    assert {one.numpy().tobytes() for one in shifted} == allowed
    assert digits_convnet(augment=False).augment is None


@pytest.mark.parametrize("names", [["crop", "rotation"], ["randaugment"], ["trivialaugment"]])
def test_digits_take_augmentations_by_name(names):
    workload = digits_convnet(augment=names)
    images, _ = take_batch(workload, workload.train, torch.arange(200))
    drawn, _ = take_batch(workload, workload.train, torch.arange(200), augment_seed=1)
    again, _ = take_batch(workload, workload.train, torch.arange(200), augment_seed=1)
    assert drawn.shape == images.shape
    assert torch.equal(drawn, again)
    # In the range that the network knows, white being 255 / 15 / 16.
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 17 / 16
    assert float((drawn != images).flatten(1).any(dim=1).float().mean()) > 0.3
    # What stays of an image is still that image: strangers are not as much alike.
    likeness = torch.nn.functional.cosine_similarity(drawn.flatten(1), images.flatten(1))
    strangers = torch.nn.functional.cosine_similarity(
        drawn.flatten(1), images.roll(1, 0).flatten(1)
    )
    assert float(likeness.median()) > float(strangers.median())


def test_a_list_without_names_augments_nothing():
    workload = digits_convnet(augment=[])
    assert workload.augment is None


def test_batchnorm_can_be_left_out():
    with_norm, without = (digits_convnet(batchnorm=b).build_model() for b in (True, False))
    names = [name for name, _ in without.named_parameters()]
    assert not any("bn" in name for name in names)
    assert {"conv1.bias", "conv2.bias", "conv3.bias"} <= set(names)
    assert with_norm.conv1.bias is None


def test_the_recurrent_network_uses_one_kernel_in_all_steps():
    with seeded(0):
        model = digits_recurrent(width=4, steps=2).build_model().eval()
    layer, images = model.layer1, torch.rand(3, 1, 8, 8)
    driven, kernel = layer.drive(images), layer.kernels[0]
    expected = torch.relu(layer.norms[0](driven))
    expected = torch.relu(layer.norms[1](driven + kernel(expected)))
    expected = torch.relu(layer.norms[2](driven + kernel(expected)))
    torch.testing.assert_close(layer(images), expected)
    assert model(images).shape == (3, 10)


def test_scenes_hold_one_digit_in_each_quarter_and_ignore_faint_ink():
    workload = digits_segmentation(examples=40)
    for (scenes, classes), (images, labels) in zip(
        (workload.train, workload.test),
        (digits_convnet().train, digits_convnet().test),
        strict=True,
    ):
        known: dict[bytes, int] = {}
        for image, label in zip(images, labels.tolist(), strict=True):
            # Without its empty margins an image may be found wherever it lies.
            known[trimmed(image[0])] = label
        for scene, marks in zip(scenes[:, 0], classes, strict=True):
            for rows in (slice(0, 12), slice(12, 24)):
                for columns in (slice(0, 12), slice(12, 24)):
                    digit = known[trimmed(scene[rows, columns])]
                    pixels, found = scene[rows, columns], marks[rows, columns]
                    assert set(found[pixels >= 8].tolist()) == {digit + 1}
                    assert set(found[(pixels > 0) & (pixels < 8)].tolist()) <= {255}
                    assert set(found[pixels == 0].tolist()) == {0}
    assert [len(workload.train[0]), len(workload.test[0])] == [40, 8]
    assert len(workload.classes) == 11


def trimmed(image):
    rows, columns = image.nonzero().T
    part = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return bytes(part.shape) + part.contiguous().numpy().tobytes()


def test_digits_are_turned_by_their_targets():
    workload = digits_regression(examples=300)
    images, angles = workload.train
    assert images.shape == (300, 1, 12, 12)
    assert angles.shape == (300, 1)
    assert float(angles.abs().max()) <= math.pi / 4
    assert float(angles.std()) == pytest.approx(math.pi / 4 / math.sqrt(3), rel=0.1)
    # The centre of the ink turns about that of the image, and tells which digit was meant.
    original = digits_convnet().train[0]
    chosen = torch.randint(len(original), (300,), generator=torch.Generator().manual_seed(0))
    before, after = centre_of(original[chosen]), centre_of(images)
    expected = before * torch.exp(-1j * angles[:, 0])
    assert float((after - expected).abs().mean()) < 0.03
    assert float((after - before).abs().mean()) > 0.1
    assert float((after - before * torch.exp(1j * angles[:, 0])).abs().mean()) > 0.2


def centre_of(images):
    """The centre of the ink, as x + iy in pixels from the middle, y downwards."""
    ink = images[:, 0].double()
    places = torch.arange(ink.shape[-1]).double() - (ink.shape[-1] - 1) / 2
    mass = ink.sum(dim=(1, 2))
    return torch.complex((ink.sum(1) * places).sum(1) / mass, (ink.sum(2) * places).sum(1) / mass)
