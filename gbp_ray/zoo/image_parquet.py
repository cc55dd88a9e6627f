"""Encoded images in Parquet shards, decoded into one array.

The layout is that of image data sets on the Hugging Face hub: column `img` is a struct with the
encoded file in `bytes`, column `label` an integer. A row that cannot be used is named by its file
and number, counted from 0.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from pyarrow.fs import FileInfo, FileSystem

from gbp_ray.errors import WorkloadError
from gbp_ray.location import describe_fault

__all__ = ["decode_shards"]

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
