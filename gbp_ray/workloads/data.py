"""Batches of examples: read by index, under seeds, and each fault named by its example."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from gbp_ray.errors import GbpError, WorkloadError, in_one_line
from gbp_ray.workloads.contract import Portion, Workload, num_examples

__all__ = [
    "collate",
    "compare_readings",
    "cut_batches",
    "derive_seed",
    "first_example",
    "is_alike",
    "kind_of",
    "plant_seed",
    "read_item",
    "seeded",
    "shuffled_indices",
    "take_batch",
    "take_rows",
]

_NUM_COMPARED = 8
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
    """Reads (input, target); raises WorkloadError if the data set fails, or gives no such pair."""
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
    """Joins items of `read_item` into inputs and targets, (B, ...) each.

    Raises:
        WorkloadError: Shapes or dtypes differ, naming two examples.
    """
    for what, column in zip(("input", "target"), zip(*items, strict=True), strict=True):
        kinds = [_describe(value) for value in column]
        for index, kind in zip(indices, kinds, strict=True):
            if kind != kinds[0]:
                raise WorkloadError(
                    f"workload.{split}: the {what}s of examples {indices[0]} and {index} cannot be "
                    f"put into one batch: {kinds[0]} and {kind}; give all one shape and one dtype"
                )
    columns: list[Tensor] = default_collate(list(items))
    return columns


def take_rows(column: Any, indices: Tensor, split: str) -> Tensor:
    """Takes rows of a tensor or an array of numbers; raises WorkloadError for anything else."""
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


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor | np.ndarray | np.generic):
        return {bool: "bool", int: "int64"}.get(type(value), "float64")
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} of shape {tuple(value.shape)}" if value.ndim else dtype


_SPARE: list[np.random.MT19937] = []
"""Generators that no block uses; making one takes 0.5 ms."""


def derive_seed(*parts: object) -> int:
    """Turns a tuple such as (seed, "augment", step, part) into 63 random-looking bits."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class seeded:  # noqa: N801 - reads as a statement: with seeded(7): ...
    """Seeds the global generators of torch, NumPy and `random` in a block, and restores them after.

    A normal number that NumPy has drawn ahead is lost. Blocks of several threads at once disturb
    each other's draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        self._fork = torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self._fork.__enter__()
        self._python = random.getstate()
        # NumPy takes 0.4 ms to copy its state and to put it back; another generator takes none.
        self._numpy = np.random.mtrand.get_bit_generator()
        self._lent = _SPARE.pop() if _SPARE else np.random.MT19937()
        np.random.mtrand.set_bit_generator(self._lent)
        plant_seed(self._seed)

    def __exit__(self, *exception: Any) -> None:
        # Where another thread's block left its own in place, this one may still be in use there.
        if np.random.mtrand.get_bit_generator() is self._lent:
            _SPARE.append(self._lent)
        np.random.mtrand.set_bit_generator(self._numpy)
        random.setstate(self._python)
        self._fork.__exit__(*exception)


def plant_seed(seed: int) -> None:
    """Seeds the global generators for good; inside a `seeded` block, up to its end."""
    # torch.manual_seed would also leave seeds waiting for devices that are not started yet, and
    # takes a stack trace for each: a third of a small training's time.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def shuffled_indices(total: int, seed: int) -> Tensor:
    """Returns a permutation of 0..total-1 that depends only on the seed."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))


def cut_batches(total: int, batch_size: int) -> list[range]:
    """Cuts positions 0..total-1 into batches; the last may be short, none is padded or repeated."""
    return [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]


def take_batch(
    workload: Workload,
    data: Any,
    indices: Tensor,
    *,
    device: torch.device | None = None,
    augment_seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Fetches examples by index, augments them if a seed is given, and prepares them.

    An item's index and `augment_seed` seed the global generators of torch, NumPy and `random` that
    its data set draws from, so an item read without `augment_seed` always looks alike.

    Args:
        indices: (B,) positions in `data`.
        augment_seed: Seeds `workload.augment`; None leaves augmentation out.

    Raises:
        WorkloadError: An item cannot be read, items do not fit into one batch, or `augment` or
            `prepare` fails; naming the split and the examples.
    """
    split = _split_of(workload, data)
    while isinstance(data, Portion):
        data, indices = data.data, data.indices[indices]
    key = () if augment_seed is None else (augment_seed,)
    if isinstance(data, tuple):
        inputs, targets = (take_rows(column, indices, split) for column in data)
    else:
        inputs, targets = _read_items(data, indices.tolist(), split, key)
    if augment_seed is not None and workload.augment is not None:
        with seeded(augment_seed), _naming("augment", split, indices):
            inputs = workload.augment(inputs)
        if not isinstance(inputs, Tensor) or len(inputs) != len(targets):
            raise WorkloadError(
                f"workload.augment: must return one tensor of {len(targets)} inputs, as many as it "
                f"was given, not {kind_of(inputs)}"
            )
    if device is not None:
        inputs, targets = inputs.to(device), targets.to(device)
    if workload.prepare is not None:
        seed = derive_seed("prepare", *key, *indices[:1].tolist())
        with seeded(seed), _naming("prepare", split, indices):
            inputs = workload.prepare(inputs)
    return inputs, targets


def first_example(workload: Workload) -> tuple[Tensor, Tensor]:
    """Fetches the first training example, not augmented, as a batch of one."""
    return take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))


def compare_readings(workload: Workload, data: Any, *seeds: int | None) -> list[bool]:
    """Returns whether inputs, and targets, of a few examples are the same under two seeds."""
    few = torch.arange(min(_NUM_COMPARED, num_examples(data)))
    one, other = (take_batch(workload, data, few, augment_seed=seed) for seed in seeds)
    return [is_alike(a, b) for a, b in zip(one, other, strict=True)]


def is_alike(one: object, other: object) -> bool:
    """Returns whether two tensors hold the same values; anything else is not compared."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


@contextmanager
def _naming(what: str, split: str, indices: Tensor) -> Iterator[None]:
    """Turns a failure of the workload's own function into an error that names the examples."""
    try:
        yield
    except (GbpError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        some = ", ".join(str(index) for index in indices[:4].tolist())
        raise WorkloadError(
            f"workload.{what} raised {in_one_line(error)} on examples {some}"
            f"{', ...' if len(indices) > 4 else ''} of workload.{split}"
        ) from error


def _read_items(
    data: Any, indices: Sequence[int], split: str, key: tuple[int, ...]
) -> list[Tensor]:
    """Reads a data set's items, each under a seed of its own, so that batches may be cut anyhow."""
    items = []
    with seeded(0):
        for index in indices:
            plant_seed(derive_seed("item", *key, index))
            items.append(read_item(data, index, split))
        return collate(items, indices, split)


def _split_of(workload: Workload, data: Any) -> str:
    """Names the split that an index counts in; one that is set aside is part of the training's."""
    names = [name for name in ("train", "test", "validation") if getattr(workload, name) is data]
    is_aside = names == ["validation"] and isinstance(data, Portion)
    return "train" if is_aside or not names else names[0]
