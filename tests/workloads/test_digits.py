"""The embedded digits: whole, attributed and learnable."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_data import REPOSITORY

from gbp_ray.workloads import digits_convnet, digits_recurrent
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
