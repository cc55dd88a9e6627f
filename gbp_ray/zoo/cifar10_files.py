"""CIFAR-10 from its files: Parquet shards or torchvision's folder, decoded once.

Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images": 50,000 training and
10,000 test images of 32x32 pixels, ten classes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from functools import partial
from pathlib import Path

import numpy as np
from pyarrow.fs import FileInfo, FileSystem, FileType, LocalFileSystem

from gbp_ray.errors import WorkloadError
from gbp_ray.location import describe_fault, list_files, open_location
from gbp_ray.zoo.array_cache import cached_arrays
from gbp_ray.zoo.image_parquet import decode_shards
from gbp_ray.zoo.vision import import_vision

__all__ = ["CLASSES", "IMAGE_SIZE", "NUM_CLASSES", "Split", "has_cifar10", "read_cifar10"]

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
    """Reads the training and the test split; images are decoded on the first call alone.

    The first decoding takes about 20 s of one core; later calls map the arrays from
    `array_cache.cache_folder()`, which holds 184 MB for each version of the data, known by the
    names, sizes and times of its files.

    Args:
        data: Folder or s3:// prefix with `train*.parquet` and `test*.parquet` (columns `img` and
            `label`), or a folder that holds torchvision's `cifar-10-batches-py`.
        download: Fetches torchvision's copy into the folder where neither is there.

    Raises:
        WorkloadError: There is no such folder, it has neither layout, or the data is damaged.
    """
    if not isinstance(download, bool):
        raise WorkloadError(f"workload.options.download = {download!r}: must be true or false")
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
    """Tells whether a folder holds CIFAR-10 in one of the two layouts.

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
    # torchvision reads folders of this machine alone.
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
