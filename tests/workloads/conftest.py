"""Each test of the zoo reads made-up images and keeps its cache to itself."""

from __future__ import annotations

import pytest
from small_data import DATA, draw_images, encode, write_shard


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GBP_RAY_CACHE", str(folder))
    return folder


@pytest.fixture
def real_data():
    if not (DATA / "cifar10").is_dir():
        pytest.skip(f"no CIFAR-10 and checkpoints under '{DATA}'; set GBP_RAY_DATA to their folder")
    return DATA


@pytest.fixture
def tiny(tmp_path):
    """A folder of 12 training images in two shards and 6 test images, lossless."""
    images = draw_images(18)
    folder = tmp_path / "tiny"
    folder.mkdir()
    files = [encode(image, kind) for image, kind in zip(images, ["PNG", "WEBP"] * 9, strict=True)]
    write_shard(folder / "train-00000-of-00002.parquet", files[:7], range(7))
    write_shard(folder / "train-00001-of-00002.parquet", files[7:12], [9, 8, 7, 6, 5])
    write_shard(folder / "test-00000-of-00001.parquet", files[12:], [0] * 6)
    return folder
