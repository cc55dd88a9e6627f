"""The built-in workloads: their data as it is read, their networks, and what they refuse."""

from __future__ import annotations

import io
import math
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.func import functional_call, grad, vmap

from gbp_ray.config import WorkloadConfig, load_job
from gbp_ray.errors import ConfigError, WorkloadError
from gbp_ray.workload import (
    check_workload,
    load_workload,
    seeded,
    shuffled_indices,
    take_batch,
)
from gbp_ray.zoo import (
    array_cache,
    cifar10_convnet,
    cifar10_files,
    cifar10_resnet20,
    cifar10_resnet32,
    cifar10_resnet56,
    digits_convnet,
    location,
    torchvision_classifier,
    vision,
)
from gbp_ray.zoo.images import AUGMENTATIONS, build_augment, normalise
from gbp_ray.zoo.resnet import build_cifar_resnet

REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("GBP_RAY_DATA", REPOSITORY.parent / "shared" / "data"))


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


def draw_images(count, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def write_shard(path, files, labels):
    img = [{"bytes": file, "path": None} for file in files]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array(labels, pa.int64())
    pq.write_table(pa.table({"img": pa.array(img, kind), "label": labels}), path)


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


def message_of(call, *args, **options):
    with pytest.raises(WorkloadError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    return text


# -- digits ----------------------------------------------------------------------------------------


def read_digits():
    return pq.read_table(REPOSITORY / "gbp_ray" / "zoo" / "digits.parquet")


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


# -- torchvision's door ----------------------------------------------------------------------------


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torchvision_is_imported_only_when_needed():
    run_python(
        "import sys, torch, gbp_ray.zoo as zoo\n"
        "from gbp_ray.workload import take_batch\n"
        "w = zoo.digits_convnet()\n"
        "take_batch(w, w.train, torch.arange(4), augment_seed=1)\n"
        "assert not [m for m in sys.modules if m.startswith('torchvision')]"
    )


def test_torchvision_imports_after_somebody_elses_import_failed():
    run_python(
        "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"
        "from gbp_ray.zoo.vision import import_vision\n"
        "models = import_vision('models')\n"
        "assert 'resnet18' in models.list_models(module=models)\n"
        "import torchvision.transforms.v2"
    )


def test_operators_are_declared_only_without_the_extension(monkeypatch):
    vision.import_vision("models")
    before, loaded = vision._declared, []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert vision._load_extension()
    assert "_C" in Path(loaded[0]).name

    def fail(path):
        raise OSError("libtorch_cuda.so: cannot open shared object file")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    assert not vision._load_extension()
    vision._declare_operators()
    assert vision._declared is before, "what exists must not be declared again"


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [*([name] for name in AUGMENTATIONS), list(AUGMENTATIONS)])
def test_augmentation_draws_for_each_image(names):
    augment = build_augment(names, 32)
    images = torch.as_tensor(draw_images(1)).expand(24, 3, 32, 32)
    with seeded(1):
        first = augment(images)
    with seeded(1):
        again = augment(images)
    with seeded(2):
        other = augment(images)
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) > 1


def test_crop_pads_with_black_by_at_most_four_pixels():
    with seeded(0):
        cropped = build_augment(["crop"], 32)(torch.full((64, 3, 32, 32), 255, dtype=torch.uint8))
    assert set(cropped.unique().tolist()) == {0, 255}
    assert bool((cropped[:, :, 4:28, 4:28] == 255).all())
    assert build_augment([], 32) is None


def test_normalise_matches_its_definition_and_resizes():
    images = torch.as_tensor(draw_images(2))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images.permute(0, 2, 3, 1) / 255 - mean) / std
    torch.testing.assert_close(normalise(images).permute(0, 2, 3, 1), expected)
    assert normalise(images, 64).shape == (2, 3, 64, 64)
    constant = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    torch.testing.assert_close(normalise(constant, 48)[..., :32, :32], normalise(constant))


# -- CIFAR-10 files --------------------------------------------------------------------------------


def test_parquet_is_read_pixel_for_pixel_in_order(tiny):
    train, test = cifar10_files.read_cifar10(str(tiny))
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
    datasets = vision.import_vision("datasets")
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
    train, test = cifar10_files.read_cifar10(str(tmp_path))
    assert np.array_equal(train[0], images[:10])
    assert np.array_equal(test[0], images[10:])
    assert (train[1].tolist(), test[1].tolist()) == (labels[:10], labels[10:])
    assert "give the folder that holds it" in message_of(cifar10_files.read_cifar10, str(batches))


def test_damaged_torchvision_folder_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        write_batches(tmp_path, draw_images(12), [0] * 12, patch)
    text = message_of(cifar10_files.read_cifar10, str(tmp_path))
    assert "incomplete or damaged" in text
    assert "workload.options.download=true" in text


def test_download_moves_whole_data_into_place(tmp_path, monkeypatch):
    source = write_batches(tmp_path / "source", draw_images(12), [0] * 12, monkeypatch)
    datasets, asked = vision.import_vision("datasets"), []

    def fetch(dataset):
        asked.append(dataset.root)
        Path(dataset.root, source.name).mkdir()
        for file in source.iterdir():
            Path(dataset.root, source.name, file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    goal = tmp_path / "new" / "folder"
    for _ in range(2):
        train, _ = cifar10_files.read_cifar10(str(goal), download=True)
    assert len(train[1]) == 10
    assert len(asked) == 1, "data that is there must not be fetched again"
    assert [path.name for path in goal.iterdir()] == ["cifar-10-batches-py"]

    def fail(dataset):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    text = message_of(cifar10_files.read_cifar10, str(tmp_path / "other"), download=True)
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


def test_cache_spares_the_second_decoding(tiny, monkeypatch):
    first, _ = cifar10_files.read_cifar10(str(tiny))
    monkeypatch.setattr(cifar10_files, "decode_shards", None)
    second, _ = cifar10_files.read_cifar10(str(tiny))
    assert np.array_equal(first[0], second[0])
    assert not second[0].flags.writeable
    inputs, _ = take_batch(cifar10_resnet20(str(tiny)), second, torch.tensor([3, 1]))
    torch.testing.assert_close(inputs, normalise(torch.as_tensor(draw_images(18)[[3, 1]])))


def test_changed_files_are_decoded_anew(tiny):
    cifar10_files.read_cifar10(str(tiny))
    write_shard(tiny / "test-00000-of-00001.parquet", [encode(draw_images(1, seed=5)[0])], [4])
    _, test = cifar10_files.read_cifar10(str(tiny))
    assert np.array_equal(test[0], draw_images(1, seed=5))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_last_byte, Path.unlink])
def test_damaged_cache_is_made_again(tiny, cache, name, damage):
    cifar10_files.read_cifar10(str(tiny))
    (folder,) = cache.iterdir()
    damage(folder / name)
    train, test = cifar10_files.read_cifar10(str(tiny))
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


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "options", "expected"),
    [
        ("digits_convnet", {"width": 0}, "options.width = 0: must be a whole number"),
        ("digits_convnet", {"augment": "yes"}, "options.augment = 'yes': must be true or false"),
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
    needs_data = factory != "digits_convnet" and "data" not in options
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


# -- networks --------------------------------------------------------------------------------------


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


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def state():
    with seeded(7):
        return build_cifar_resnet(20).state_dict()


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("dense.safetensors", save_file),
        ("dense.pt", torch.save),
        (
            "dense.th",
            lambda state, path: torch.save(
                {"state_dict": {f"module.{k}": v for k, v in state.items()}, "best": 91.7}, path
            ),
        ),
    ],
)
def test_checkpoint_is_loaded_into_every_fresh_model(tiny, tmp_path, state, name, save):
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save(kept, tmp_path / name)
    before = torch.random.get_rng_state()
    workload = cifar10_resnet20(str(tiny), checkpoint=str(tmp_path / name))
    assert torch.equal(torch.random.get_rng_state(), before)
    first, second = workload.build_model(), workload.build_model()
    first.conv1.weight.data.zero_()
    for key, value in kept.items():
        assert torch.equal(second.state_dict()[key], value), key


def drop(*names):
    return lambda state: {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop("linear.weight", "linear.bias"), "it lacks 'linear.weight', 'linear.bias'"),
        (lambda s: s | {"fc.weight": torch.ones(1)}, "it has the unexpected 'fc.weight'"),
        (
            lambda s: s | {"linear.weight": torch.ones(100, 64)},
            "'linear.weight' has shape (100, 64) where the model has (10, 64)",
        ),
        (lambda s: {"w": torch.ones(1)}, "and 94 more; it has the unexpected 'w'"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tiny, tmp_path, state, change, expected):
    path = tmp_path / "other.safetensors"
    save_file(change(state), path)
    text = message_of(cifar10_resnet20, str(tiny), checkpoint=str(path))
    assert text.startswith(f"workload.options.checkpoint = '{path}': does not fit the model: ")
    assert expected in text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.safetensors", None, "no such file"),
        ("x.safetensors", b"", "is truncated or not a safetensors file"),
        ("x.safetensors", b"half", "is truncated or not a safetensors file"),
        ("x.pt", b"half", "is truncated or holds more than tensors"),
        ("x.pt", pickle.dumps(Path("a"), protocol=2), "is truncated or holds more than tensors"),
        ("x.onnx", b"half", "unknown kind of file '.onnx' (allowed: .safetensors, .pt"),
    ],
)
def test_unreadable_checkpoint_is_refused(tiny, tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = message_of(cifar10_resnet20, str(tiny), checkpoint=str(tmp_path / name))
    assert text.startswith("workload.options.checkpoint = ")
    assert expected in text


def test_truncated_and_foreign_checkpoints_are_refused(tiny, tmp_path, state):
    path = tmp_path / "dense.safetensors"
    save_file(state, path)
    truncate(path)
    assert "is truncated" in message_of(cifar10_resnet20, str(tiny), checkpoint=str(path))
    torch.save([1, 2], tmp_path / "list.pt")
    text = message_of(cifar10_resnet20, str(tiny), checkpoint=str(tmp_path / "list.pt"))
    assert "holds no state dict" in text


@pytest.mark.slow
def test_published_resnet20_reaches_its_accuracy(real_data, tmp_path):
    (shard,) = (real_data / "cifar10").glob("test-*.parquet")
    # The test shard stands in for both splits, which spares decoding 50,000 images.
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").symlink_to(shard)
    checkpoint = str(real_data / "checkpoints" / "resnet20.safetensors")
    workload = cifar10_resnet20(str(tmp_path), checkpoint=checkpoint)
    model = workload.build_model().eval()
    right = 0
    with torch.no_grad():
        for indices in torch.arange(10_000).split(500):
            inputs, targets = take_batch(workload, workload.test, indices)
            right += int(workload.count_correct(model(inputs), targets))
    # A few images lie on an edge that another kernel's rounding may cross.
    assert abs(right - 9173) <= 3


def test_published_resnet56_fits(real_data, tiny):
    checkpoint = str(real_data / "checkpoints" / "resnet56.safetensors")
    workload = cifar10_resnet56(str(tiny), checkpoint=checkpoint)
    check_workload(workload, workload.build_model(), 2)


# -- any torchvision classifier --------------------------------------------------------------------


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
    from gbp_ray.zoo.classifier import _build_model

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


# -- a user's own ----------------------------------------------------------------------------------


def test_byo_job_meets_the_contract(monkeypatch):
    folder = REPOSITORY / "jobs" / "byo"
    monkeypatch.syspath_prepend(str(folder))
    job = load_job(folder / "job.toml")
    workload = load_workload(job.workload)
    model = workload.build_model()
    check_workload(workload, model, 64)
    inputs, targets = take_batch(workload, workload.train, torch.arange(64), augment_seed=0)
    import my_workload

    scores = my_workload.my_criterion(model, inputs, targets, workload.loss(model(inputs), targets))
    assert {name: s.shape for name, s in scores.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    again = load_workload(job.workload)
    assert torch.equal(again.train[0], workload.train[0])


@pytest.mark.parametrize("path", ["cifar10_resnet20.toml", "cifar10_convnet.toml"])
def test_cifar_jobs_need_only_their_data(tiny, path):
    overrides = {"workload.options.data": str(tiny)}
    job = load_job(REPOSITORY / "jobs" / path, overrides)
    options = {k: v for k, v in job.workload.options.items() if k != "checkpoint"}
    workload = load_workload(WorkloadConfig(factory=job.workload.factory, options=options))
    check_workload(workload, workload.build_model(), 4)
