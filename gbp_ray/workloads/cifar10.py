"""Networks over CIFAR-10: a plain ConvNet and the residual networks made for it.

All take the same options; each is a factory that a job names, such as
`gbp_ray.zoo:cifar10_resnet20`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from pyarrow.fs import FileInfo, FileSystem, FileType, LocalFileSystem
from torch import nn

from gbp_ray.errors import WorkloadError
from gbp_ray.workloads.cache import cached_arrays
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.images import (
    INPUT_RANGE,
    Augmentation,
    build_augment,
    import_vision,
    normalise,
    take_examples,
)
from gbp_ray.workloads.location import describe_fault, list_files, open_location
from gbp_ray.workloads.networks import build_cifar_resnet
from gbp_ray.workloads.options import check_flag
from gbp_ray.workloads.weights import with_checkpoint

__all__ = [
    "CLASSES",
    "IMAGE_SIZE",
    "NUM_CLASSES",
    "Split",
    "cifar10_convnet",
    "cifar10_resnet",
    "cifar10_resnet20",
    "cifar10_resnet32",
    "cifar10_resnet56",
    "decode_shards",
    "has_cifar10",
    "read_cifar10",
]


def cifar10_resnet(
    depth: int,
    data: str,
    download: bool = False,
    augment: Sequence[Augmentation] = ("crop", "flip"),
    checkpoint: str | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> Workload:
    """Makes a ResNet of He et al. 2015 (arXiv 1512.03385, section 4.2) over CIFAR-10.

    Args:
        depth: Weighted layers: 20 (269,722 parameters), 32 (464,154), 56 (853,018), ...
        data: Folder or s3:// prefix of the data; see `read_cifar10`.
        download: Fetches torchvision's copy of the data into a folder that holds none.
        augment: Some of "crop" (4 black pixels of padding), "flip", "rotation" (15 degrees),
            "randaugment", "trivialaugment"; with parameters as a table, such as
            { name = "randaugment", num_ops = 2, magnitude = 9 }.
        checkpoint: File with dense weights to start from; None starts from random ones.
        train_examples: Takes only the first so many training examples.
        test_examples: Takes only the first so many test examples.

    Raises:
        WorkloadError: An option, the data or the checkpoint cannot be used.
    """
    return _make_workload(
        partial(build_cifar_resnet, depth, NUM_CLASSES),
        data,
        download,
        augment,
        checkpoint,
        train_examples,
        test_examples,
    )


# Partials keep the signature, from which a job's options are checked and listed.
cifar10_resnet20 = partial(cifar10_resnet, 20)
cifar10_resnet32 = partial(cifar10_resnet, 32)
cifar10_resnet56 = partial(cifar10_resnet, 56)


def cifar10_convnet(
    data: str,
    download: bool = False,
    augment: Sequence[Augmentation] = ("crop", "flip"),
    checkpoint: str | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    batchnorm: bool = False,
) -> Workload:
    """Makes a ConvNet over CIFAR-10: two 3x3 convolutions of 64 channels, then 512 and 10 units.

    Each convolution is followed by ReLU and 2x2 max pooling; 2,141,514 parameters, of which 98 %
    sit in the first linear layer.

    Args:
        data: See `cifar10_resnet`, as for the other options not listed here.
        download: See there.
        augment: See there.
        checkpoint: See there.
        train_examples: See there.
        test_examples: See there.
        batchnorm: Puts BatchNorm between each convolution and its ReLU.

    Raises:
        WorkloadError: An option, the data or the checkpoint cannot be used.
    """
    check_flag("batchnorm", batchnorm)
    return _make_workload(
        partial(_build_convnet, batchnorm),
        data,
        download,
        augment,
        checkpoint,
        train_examples,
        test_examples,
    )


def _make_workload(
    build_model: Callable[[], nn.Module],
    data: str,
    download: bool,
    augment: Sequence[Augmentation],
    checkpoint: str | None,
    train_examples: int | None,
    test_examples: int | None,
) -> Workload:
    # Cheap checks first: decoding takes a while.
    transform = build_augment(augment, IMAGE_SIZE)
    build_model = with_checkpoint(build_model, checkpoint)
    train, test = read_cifar10(data, download)
    return Workload(
        build_model=build_model,
        train=take_examples(train, train_examples, "train_examples"),
        test=take_examples(test, test_examples, "test_examples"),
        prepare=normalise,
        augment=transform,
        input_range=INPUT_RANGE,
        classes=CLASSES,
    )


def _build_convnet(batchnorm: bool) -> nn.Module:
    def normalisation() -> nn.Module:
        return nn.BatchNorm2d(64) if batchnorm else nn.Identity()

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 64, 3, padding=1),
            bn1=normalisation(),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(64, 64, 3, padding=1),
            bn2=normalisation(),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(64 * 8 * 8, 512),
            relu3=nn.ReLU(),
            linear2=nn.Linear(512, NUM_CLASSES),
        )
    )


IMAGE_SIZE = 32

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

NUM_CLASSES = len(CLASSES)
Split = tuple[np.ndarray, np.ndarray]
"""Images, uint8 (N, 3, 32, 32), and labels, int64 (N,)."""

_KEY = "workload.options.data"
_SPLITS = ("train", "test")
_BATCHES_FOLDER = "cifar-10-batches-py"


# Part of a cache's name: raised when the same files come to mean other arrays.
_DECODER_VERSION = 1


def read_cifar10(data: str, download: bool = False) -> tuple[Split, Split]:
    """Reads the training and the test split; images are decoded on the first call only.

    The first decoding takes about 20 s of one core; later calls map the arrays from
    `cache.cache_folder()`, which holds 184 MB for each version of the data, known by the
    names, sizes and times of its files.

    Args:
        data: Folder or s3:// prefix with `train*.parquet` and `test*.parquet` (columns `img` and
            `label`), or a folder that holds torchvision's `cifar-10-batches-py`.
        download: Fetches torchvision's copy into the folder where neither is there.

    Raises:
        WorkloadError: There is no such folder, it has neither layout, or the data is damaged.
    """
    check_flag("download", download)
    if download:
        _download(data)
    filesystem, entries = list_files(data, _KEY)
    shards = _find_shards(entries)
    where = f"{_KEY} = '{data}'"
    if all(shards.values()):
        used = [shard for split in _SPLITS for shard in shards[split]]
        make = partial(_decode_parquet, filesystem, shards, where)
    elif _has_batches(filesystem, entries):
        folder = next(entry for entry in entries if entry.base_name == _BATCHES_FOLDER).path
        used = list_files(folder, _KEY)[1]
        make = partial(_decode_batches, folder, where)
    else:
        raise WorkloadError(f"{where}: {_explain_layout(shards, entries)}")
    arrays = cached_arrays(f"cifar10-{_identify(used)}", make)
    train, test = ((arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in _SPLITS)
    return train, test


def has_cifar10(data: str) -> bool:
    """Checks whether a folder holds CIFAR-10 in one of the two layouts.

    Raises:
        WorkloadError: There is no such folder.
    """
    filesystem, entries = list_files(data, _KEY)
    return all(_find_shards(entries).values()) or _has_batches(filesystem, entries)


def _find_shards(entries: list[FileInfo]) -> dict[str, list[FileInfo]]:
    files = [entry for entry in entries if entry.type is FileType.File]
    return {
        split: [
            file
            for file in files
            if file.base_name.startswith(split) and file.base_name.endswith(".parquet")
        ]
        for split in _SPLITS
    }


def _has_batches(filesystem: FileSystem, entries: list[FileInfo]) -> bool:
    # torchvision reads only folders of this machine.
    is_local = isinstance(filesystem, LocalFileSystem)
    return is_local and any(entry.base_name == _BATCHES_FOLDER for entry in entries)


def _explain_layout(shards: dict[str, list[FileInfo]], entries: list[FileInfo]) -> str:
    if any(entry.base_name == "data_batch_1" for entry in entries):
        return f"is the folder '{_BATCHES_FOLDER}' itself; give the folder that holds it"
    for split, other in (_SPLITS, _SPLITS[::-1]):
        if shards[split] and not shards[other]:
            return f"has {split}*.parquet but no {other}*.parquet; add the missing split"
    return (
        f"holds neither train*.parquet and test*.parquet nor torchvision's '{_BATCHES_FOLDER}'; "
        "give a folder that does, or set workload.options.download=true"
    )


def _identify(files: list[FileInfo]) -> str:
    facts = [[file.base_name, file.size, file.mtime_ns] for file in files]
    text = json.dumps([_DECODER_VERSION, facts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _decode_parquet(
    filesystem: FileSystem, shards: dict[str, list[FileInfo]], where: str
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for split in _SPLITS:
        images, labels = decode_shards(filesystem, shards[split], IMAGE_SIZE, NUM_CLASSES, where)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    return arrays


def _decode_batches(folder: str, where: str) -> dict[str, np.ndarray]:
    datasets = import_vision("datasets")
    arrays = {}
    for split in _SPLITS:
        try:
            # These files are pickles: torchvision compares their MD5 sums before it opens them.
            dataset = datasets.CIFAR10(str(Path(folder).parent), train=split == "train")
        except (RuntimeError, OSError) as error:
            raise WorkloadError(
                f"{where}: '{_BATCHES_FOLDER}' is incomplete or damaged "
                f"({describe_fault(error)}); delete it and set workload.options.download=true"
            ) from error
        arrays[f"{split}_images"] = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
        arrays[f"{split}_labels"] = np.array(dataset.targets, dtype=np.int64)
    return arrays


def _download(data: str) -> None:
    filesystem, path = open_location(data, _KEY)
    if not isinstance(filesystem, LocalFileSystem):
        raise WorkloadError(
            f"workload.options.download = true: can fill a folder only, not '{data}'; set {_KEY} "
            "to a folder"
        )
    folder = Path(path)
    if folder.is_dir() and has_cifar10(data):
        return
    # Moved into place whole, because several workers may fetch at once.
    staging = folder / f".download-{uuid.uuid4().hex}"
    target = folder / _BATCHES_FOLDER
    try:
        staging.mkdir(parents=True)
        import_vision("datasets").CIFAR10(str(staging), download=True)
        if not target.is_dir():
            (staging / _BATCHES_FOLDER).rename(target)
    except (OSError, RuntimeError) as error:
        if target.is_dir():
            return
        raise WorkloadError(
            f"{_KEY} = '{data}': CIFAR-10 cannot be downloaded ({describe_fault(error)}); fetch it "
            f"by hand so that '{target}' exists"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


_ROWS_AT_ONCE = 1024


def decode_shards(
    filesystem: FileSystem, shards: Sequence[FileInfo], size: int, num_classes: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes shards, one after another, in the order of their rows.

    Args:
        filesystem: Holds the shards.
        shards: Parquet files of one split.
        size: Height and width that each image must have, in pixels.
        num_classes: Labels must lie in 0..num_classes - 1.
        where: The option that names the data, with its value, for messages.

    Returns:
        Images, uint8 (N, 3, size, size), and labels, int64 (N,).

    Raises:
        WorkloadError: A shard is damaged, lacks a column or holds a row that cannot be used, or
            there are no rows at all.
    """
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    # Decoders release the interpreter lock, so threads share the cores this process may use.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for shard in shards:
            shard_where = f"{where}: file '{shard.base_name}'"
            try:
                with pq.ParquetFile(shard.path, filesystem=filesystem) as parquet:
                    _check_columns(parquet.schema_arrow, shard_where)
                    first_row = 0
                    for batch in parquet.iter_batches(
                        _ROWS_AT_ONCE, columns=["img", "label"], use_threads=False
                    ):
                        labels.append(_check_labels(batch, first_row, num_classes, shard_where))
                        images.append(_decode_batch(batch, first_row, size, pool, shard_where))
                        first_row += len(batch)
            except (pa.ArrowException, OSError) as error:
                raise WorkloadError(
                    f"{shard_where} is damaged or not Parquet ({describe_fault(error)}); "
                    "fetch it again"
                ) from error
    if not images:
        names = ", ".join(f"'{shard.base_name}'" for shard in shards)
        raise WorkloadError(f"{where}: {names} hold no rows; give at least one example")
    return np.concatenate(images), np.concatenate(labels)


def _check_columns(schema: pa.Schema, shard_where: str) -> None:
    img = schema.field("img").type if "img" in schema.names else pa.null()
    label = schema.field("label").type if "label" in schema.names else pa.null()
    has_bytes = pa.types.is_struct(img) and img.get_field_index("bytes") >= 0
    if not has_bytes or not pa.types.is_integer(label):
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise WorkloadError(
            f"{shard_where} has the columns {found}; it must have img: struct<bytes, path> and "
            "label: an integer"
        )


def _check_labels(
    batch: pa.RecordBatch, first_row: int, num_classes: int, shard_where: str
) -> np.ndarray:
    labels = batch.column("label").cast(pa.int64()).fill_null(-1).to_numpy()
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        row = int(wrong[0])
        raise WorkloadError(
            f"{shard_where}, row {first_row + row}: label {batch.column('label')[row]}; "
            f"must be 0 to {num_classes - 1}"
        )
    return labels


def _decode_batch(
    batch: pa.RecordBatch, first_row: int, size: int, pool: Executor, shard_where: str
) -> np.ndarray:
    files = batch.column("img").field("bytes").to_pylist()

    def decode(row: int) -> np.ndarray:
        try:
            return _decode(files[row], size)
        except WorkloadError as error:
            raise WorkloadError(f"{shard_where}, row {first_row + row}: {error}") from error

    pixels = np.stack(list(pool.map(decode, range(len(files)))))
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _decode(file: bytes | None, size: int) -> np.ndarray:
    if file is None:
        raise WorkloadError("holds no image; remove the row")
    try:
        with Image.open(io.BytesIO(file)) as image:
            # The size is known from the header, before any memory is spent on pixels.
            if image.size != (size, size):
                width, height = image.size
                raise WorkloadError(
                    f"is {width}x{height} pixels; must be {size}x{size}, so resize it"
                )
            return np.asarray(image.convert("RGB"))
    except WorkloadError:
        raise
    except UnidentifiedImageError:
        raise WorkloadError("is no image file that Pillow knows; remove or mend the row") from None
    except Exception as error:  # damaged images raise whatever their decoder does
        raise WorkloadError(
            f"cannot be decoded ({describe_fault(error)}); remove or mend the row"
        ) from error
