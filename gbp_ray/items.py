"""Reads examples of a split one by one or as rows, and names the one that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from gbp_ray.errors import GbpError, WorkloadError, in_one_line

__all__ = ["collate", "kind_of", "read_item", "take_rows"]

_MAY_PASS = (MemoryError, ConnectionError, TimeoutError)
"""Failures that another attempt may not meet; all others are taken to come again."""


def kind_of(value: object) -> str:
    """Describes a value for a message: dtype and shape of a tensor, else the type."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return f"a dict with keys {', '.join(repr(key) for key in list(value)[:5])}"
    return type(value).__name__


def read_item(data: Any, index: int, split: str) -> Sequence[Any]:
    """Reads one item of a data set.

    Returns:
        The input and the target.

    Raises:
        WorkloadError: The data set fails, or the item is not a pair of tensors or numbers.
    """
    where = f"workload.{split}: example {index}"
    try:
        item = data[index]
    except (GbpError, *_MAY_PASS):
        raise
    except Exception as error:
        if isinstance(data, DataLoader | IterableDataset):
            raise WorkloadError(
                f"workload.{split}: a {type(data).__name__} has no examples by index; give "
                "(inputs, targets) or a map-style data set, such as a DataLoader's dataset"
            ) from error
        raise WorkloadError(
            f"{where} cannot be read, its data set raised {in_one_line(error)}; mend the example "
            "or leave it out"
        ) from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise WorkloadError(f"{where} is {kind_of(item)}; items must be (input, target)")
    for what, value in zip(("input", "target"), item, strict=True):
        if not _is_numeric(value):
            raise WorkloadError(
                f"{where}: its {what} is {kind_of(value)}; {what}s must be one tensor, array or "
                "number each; convert it in the data set"
            )
    return item


def collate(items: Sequence[Sequence[Any]], indices: Sequence[int], split: str) -> list[Tensor]:
    """Puts items together.

    Args:
        items: From `read_item`.
        indices: Of the items.

    Returns:
        Inputs (B, ...) and targets (B, ...).

    Raises:
        WorkloadError: Shapes or dtypes differ, naming two examples.
    """
    for what, column in zip(("input", "target"), zip(*items, strict=True), strict=True):
        kinds = [_shape_and_dtype(value) for value in column]
        for index, kind in zip(indices, kinds, strict=True):
            if kind != kinds[0]:
                raise WorkloadError(
                    f"workload.{split}: the {what}s of examples {indices[0]} and {index} cannot be "
                    f"put into one batch: {_words(kinds[0])} and {_words(kind)}; give all one "
                    "shape and one dtype"
                )
    columns: list[Tensor] = default_collate(list(items))
    return columns


def take_rows(column: Any, indices: Tensor, split: str) -> Tensor:
    """Takes rows of a column of a pair of tensors or arrays.

    Raises:
        WorkloadError: It is no tensor and no array of numbers.
    """
    if isinstance(column, Tensor):
        return column[indices]
    dtype = getattr(column, "dtype", None)
    # A table of pandas has labels in place of positions.
    if dtype is None or not hasattr(column, "shape") or hasattr(column, "iloc"):
        raise WorkloadError(
            f"workload.{split}: (inputs, targets) must be tensors or arrays, not "
            f"{kind_of(column)}; convert it, as by torch.tensor or numpy.asarray"
        )
    if getattr(dtype, "kind", "f") not in "biufc":
        raise WorkloadError(
            f"workload.{split}: has an array of {dtype}, which is no dtype of a tensor; give "
            "numbers of one shape"
        )
    return torch.as_tensor(column[indices.numpy()])


def _is_numeric(value: object) -> bool:
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biufc"
    return isinstance(value, Tensor | bool | int | float)


def _shape_and_dtype(value: Any) -> tuple[tuple[int, ...], str]:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return (), {bool: "bool", int: "int64"}.get(type(value), "float64")


def _words(kind: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = kind
    return f"{dtype} of shape {shape}" if shape else dtype
