"""Reading CIFAR-10 from Parquet and from torchvision's folder."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file
from small_data import draw_images, encode, message_of, write_shard

from gbp_ray.workloads import cifar10, cifar10_resnet20, location
from gbp_ray.workloads import images as images_module
from gbp_ray.workloads.networks import build_cifar_resnet


def test_parquet_is_read_pixel_for_pixel_in_order(tiny):
    train, test = cifar10.read_cifar10(str(tiny))
    images = draw_images(18)
    assert np.array_equal(train[0], images[:12])
    assert np.array_equal(test[0], images[12:])
    assert train[1].tolist() == [*range(7), 9, 8, 7, 6, 5]
    assert (train[0].dtype, train[1].dtype) == (np.uint8, np.int64)


def test_object_store_is_read_like_a_folder(tiny, monkeypatch):
    # A folder stands in for the bucket; pyarrow's S3 client itself is not tested here.
    bucket = pa.fs.SubTreeFileSystem(str(tiny.parent), pa.fs.LocalFileSystem())

    class Fake:
        @staticmethod
        def from_uri(address):
            return bucket, address.removeprefix("s3://bucket/")

    monkeypatch.setattr(location, "FileSystem", Fake)
    save_file(build_cifar_resnet(20).state_dict(), tiny / "dense.safetensors")
    workload = cifar10_resnet20("s3://bucket/tiny", checkpoint="s3://bucket/tiny/dense.safetensors")
    assert np.array_equal(workload.test[0], draw_images(18)[12:])
    assert "no such folder" in message_of(cifar10_resnet20, "s3://bucket/none")
    refused = message_of(cifar10_resnet20, "s3://bucket/tiny", download=True)
    assert "can fill a folder only" in refused
    refused = message_of(cifar10_resnet20, "s3://me:hunter2@bucket/tiny")
    assert "holds credentials" in refused
    assert "hunter2" not in refused


def write_batches(folder, images, labels, monkeypatch):
    datasets = images_module.import_vision("datasets")
    # Made-up batches cannot have the published MD5 sums; None turns that comparison off.
    names = [f"data_batch_{i}" for i in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, None] for name in names])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for i, name in enumerate([*names, "test_batch"]):
        rows = {
            "data": images[2 * i : 2 * i + 2].reshape(2, -1),
            "labels": labels[2 * i : 2 * i + 2],
        }
        (batches / name).write_bytes(pickle.dumps(rows))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return batches


def test_torchvision_folder_is_read(tmp_path, monkeypatch):
    images, labels = draw_images(12), [*range(10), 3, 4]
    batches = write_batches(tmp_path, images, labels, monkeypatch)
    train, test = cifar10.read_cifar10(str(tmp_path))
    assert np.array_equal(train[0], images[:10])
    assert np.array_equal(test[0], images[10:])
    assert (train[1].tolist(), test[1].tolist()) == (labels[:10], labels[10:])
    assert "give the folder that holds it" in message_of(cifar10.read_cifar10, str(batches))


def test_damaged_torchvision_folder_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        write_batches(tmp_path, draw_images(12), [0] * 12, patch)
    text = message_of(cifar10.read_cifar10, str(tmp_path))
    assert "incomplete or damaged" in text
    assert "workload.options.download=true" in text


def test_download_moves_whole_data_into_place(tmp_path, monkeypatch):
    source = write_batches(tmp_path / "source", draw_images(12), [0] * 12, monkeypatch)
    datasets, asked = images_module.import_vision("datasets"), []

    def fetch(dataset):
        asked.append(dataset.root)
        Path(dataset.root, source.name).mkdir()
        for file in source.iterdir():
            Path(dataset.root, source.name, file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    goal = tmp_path / "new" / "folder"
    for _ in range(2):
        train, _ = cifar10.read_cifar10(str(goal), download=True)
    assert len(train[1]) == 10
    assert len(asked) == 1, "data that is there must not be fetched again"
    assert [path.name for path in goal.iterdir()] == ["cifar-10-batches-py"]

    def fail(dataset):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    text = message_of(cifar10.read_cifar10, str(tmp_path / "other"), download=True)
    assert "cannot be downloaded (no route to host)" in text
    assert not list((tmp_path / "other").iterdir())


def replace_row(row, file=None, label=0):
    def damage(folder):
        files = [encode(image) for image in draw_images(3)]
        labels = [0, 1, 2]
        if file is not None:
            files[row] = None if file == b"" else file
        labels[row] = label
        write_shard(folder / "test-00000-of-00001.parquet", files, labels)

    return damage


def cut_short(folder):
    shard = folder / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_bytes(folder):
    shard = folder / "test-00000-of-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[10:4000] = bytes(3990)
    shard.write_bytes(content)


def rename_column(folder):
    shard = folder / "test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(shard).rename_columns(["image", "label"]), shard)


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove("*"), "neither train*.parquet and test*.parquet nor torchvision's"),
        (remove("test*"), "has train*.parquet but no test*.parquet"),
        (remove("train*"), "has test*.parquet but no train*.parquet"),
        (cut_short, "'train-00001-of-00002.parquet' is damaged or not Parquet"),
        (flip_bytes, "'test-00000-of-00001.parquet'"),
        (rename_column, "must have img: struct<bytes, path> and label"),
        (replace_row(2, b"GIF87a nonsense"), "row 2: is no image file"),
        (replace_row(1, encode(draw_images(1)[0])[:-900]), "row 1: cannot be decoded"),
        (replace_row(1, encode(draw_images(1, 28)[0])), "row 1: is 28x28 pixels; must be 32x32"),
        (replace_row(0, b""), "row 0: holds no image"),
        (replace_row(1, label=10), "row 1: label 10; must be 0 to 9"),
        (replace_row(2, label=None), "row 2: label None; must be 0 to 9"),
        (lambda folder: write_shard(folder / "test-00000-of-00001.parquet", [], []), "no rows"),
    ],
)
def test_bad_parquet_is_refused_in_one_line(tiny, cache, damage, expected):
    damage(tiny)
    text = message_of(cifar10_resnet20, str(tiny))
    assert text.startswith(f"workload.options.data = '{tiny}': ")
    assert expected in text
    assert not list(cache.iterdir()), "a fault must not leave a cache behind"
