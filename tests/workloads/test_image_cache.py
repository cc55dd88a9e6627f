"""The cache of decoded images: made once, and made again when it is stale or damaged."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import draw_images, encode, message_of, truncate, write_shard

from gbp_ray.workloads import cache as array_cache
from gbp_ray.workloads import cifar10, cifar10_resnet20
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.images import normalise


def test_cache_spares_the_second_decoding(tiny, monkeypatch):
    first, _ = cifar10.read_cifar10(str(tiny))
    monkeypatch.setattr(cifar10, "decode_shards", None)
    second, _ = cifar10.read_cifar10(str(tiny))
    assert np.array_equal(first[0], second[0])
    assert not second[0].flags.writeable
    inputs, _ = take_batch(cifar10_resnet20(str(tiny)), second, torch.tensor([3, 1]))
    torch.testing.assert_close(inputs, normalise(torch.as_tensor(draw_images(18)[[3, 1]])))


def test_changed_files_are_decoded_anew(tiny):
    cifar10.read_cifar10(str(tiny))
    write_shard(tiny / "test-00000-of-00001.parquet", [encode(draw_images(1, seed=5)[0])], [4])
    _, test = cifar10.read_cifar10(str(tiny))
    assert np.array_equal(test[0], draw_images(1, seed=5))


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_last_byte, Path.unlink])
def test_damaged_cache_is_made_again(tiny, cache, name, damage):
    cifar10.read_cifar10(str(tiny))
    (folder,) = cache.iterdir()
    damage(folder / name)
    train, test = cifar10.read_cifar10(str(tiny))
    assert np.array_equal(train[0], draw_images(18)[:12])
    assert test[1].tolist() == [0] * 6
    assert list(cache.iterdir()) == [folder]


def test_racing_caches_agree(cache):
    barrier, results = threading.Barrier(2), []

    def make():
        barrier.wait(10)  # both are past the look into the empty cache
        return {"numbers": np.arange(1000)}

    def open_cache():
        results.append(array_cache.cached_arrays("race", make)["numbers"])

    threads = [threading.Thread(target=open_cache) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [numbers.sum() for numbers in results] == [499500, 499500]
    assert [path.name for path in cache.iterdir()] == ["race"]


def test_of_racing_caches_the_first_to_finish_is_kept(cache):
    def make_late():
        """Has another process finish between the look into the empty cache and the end of this."""
        array_cache.cached_arrays("race", lambda: {"numbers": np.arange(3)})
        return {"numbers": np.arange(5)}

    late = array_cache.cached_arrays("race", make_late)["numbers"]
    assert late.tolist() == [0, 1, 2]


def test_cache_folder_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("GBP_RAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert array_cache.cache_folder() == tmp_path / "gbp_ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert array_cache.cache_folder() == tmp_path / ".cache" / "gbp_ray"


def test_unwritable_cache_is_named(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GBP_RAY_CACHE", str(tmp_path / "file"))
    assert "set GBP_RAY_CACHE to a folder" in message_of(cifar10_resnet20, str(tiny))
