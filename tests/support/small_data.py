"""Made-up CIFAR-10 data, and where the repository and real data lie."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gbp_ray.errors import WorkloadError

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("GBP_RAY_DATA", REPOSITORY.parent / "shared" / "data"))


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


def message_of(call, *args, **options):
    with pytest.raises(WorkloadError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    return text


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])
