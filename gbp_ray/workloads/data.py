"""Batches of examples: read by index, under seeds, and each fault named by its example."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from gbp_ray.errors import GbpError, WorkloadError, in_one_line, name_some
from gbp_ray.workloads.batch import Batch, kind_of, map_tensors, size_of, tensors_in
from gbp_ray.workloads.contract import Portion, Workload, num_examples

__all__ = [
    "Loaded",
    "collate",
    "compare_readings",
    "cut_batches",
    "derive_seed",
    "first_example",
    "is_alike",
    "plant_seed",
    "read_item",
    "seeded",
    "shuffled_indices",
    "take_batch",
    "take_rows",
    "without_loaders",
]

_NUM_COMPARED = 8
_MAY_PASS = (MemoryError, ConnectionError, TimeoutError)
"""Failures that another attempt may not meet; all others are taken to come again."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """The data set of a DataLoader, with its collate function, None where that is torch's own."""

    data: Any
    collate: Callable[[list[Any]], Any] | None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def without_loaders(workload: Workload) -> Workload:
    """Replaces DataLoaders by their data sets and collate functions, and warns of it.

    Raises:
        WorkloadError: A loader's data set has no examples by index.
    """
    found: dict[str, Any] = {}
    for split in ("train", "test", "validation"):
        loader = getattr(workload, split)
        if not isinstance(loader, DataLoader):
            continue
        if isinstance(loader.dataset, IterableDataset):
            raise WorkloadError(
                f"workload.{split}: a DataLoader over a {type(loader.dataset).__name__} has no "
                "examples by index; give a map-style data set"
            )
        own = loader.collate_fn
        found[split] = Loaded(loader.dataset, None if own is default_collate else own)
    if found:
        names = " and ".join(f"workload.{split}" for split in found)
        warnings.warn(
            f"{names}: the data set and the collate function of the DataLoader are used; its batch "
            "size, sampler and processes are not, since the job decides these",
            stacklevel=2,
        )
    return replace(workload, **found) if found else workload


def read_item(data: Any, index: int, split: str) -> Any:
    """Reads an example; raises WorkloadError if the data set fails."""
    try:
        return data[index]
    except (GbpError, *_MAY_PASS):
        raise
    except Exception as error:
        if isinstance(data, IterableDataset):
            raise WorkloadError(
                f"workload.{split}: a {type(data).__name__} has no examples by index; give "
                "(inputs, targets) or a map-style data set"
            ) from error
        raise WorkloadError(
            f"workload.{split}: example {index} cannot be read, its data set raised "
            f"{in_one_line(error)}; mend the example or leave it out"
        ) from error


def collate(items: Sequence[Any], indices: Sequence[int], split: str) -> Batch:
    """Stacks examples leaf by leaf, (B, ...) each; lists of numbers count as tensors.

    Raises:
        WorkloadError: A leaf is no number or tensor, or its name, shape or dtype differ between
            two examples; naming them.
    """
    rows = [
        _leaves(item, f"workload.{split}: example {index}")
        for item, index in zip(items, indices, strict=True)
    ]
    kinds = [{name: _describe(leaf) for name, leaf in row.items()} for row in rows]
    for index, kind in zip(indices, kinds, strict=True):
        if kind != kinds[0]:
            names = (kinds[0] | kind).keys()
            name = next(n for n in names if kind.get(n) != kinds[0].get(n))
            one, other = (found.get(name, "none there") for found in (kinds[0], kind))
            what = f"the {name}" if name.endswith("]") else f"the {name}s"
            raise WorkloadError(
                f"workload.{split}: {what} of examples {indices[0]} and {index} cannot be put "
                f"into one batch: {one} and {other}; give all one shape and one dtype, or give "
                "Workload a collate that pads them"
            )
    columns = {name: default_collate([row[name] for row in rows]) for name in rows[0]}
    return Batch.of(_rebuild(items[0], columns))


def _leaves(item: Any, where: str) -> dict[str, Any]:
    """Lists the tensors, arrays and numbers of an example by name."""
    found: dict[str, Any] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key in value:
                visit(value[key], f"{name}[{key!r}]")
        elif isinstance(value, (tuple, list)) and not _is_numeric(value):
            for place, part in enumerate(value):
                visit(part, f"{name}[{place}]")
        elif _is_numeric(value):
            found[name] = torch.tensor(value) if isinstance(value, (tuple, list)) else value
        else:
            raise WorkloadError(
                f"{where}: its {name} is {kind_of(value)}; examples are (input, target) or other "
                "nests of tensors, arrays and numbers; convert it in the data set, or give "
                "Workload a collate"
            )

    if isinstance(item, (tuple, list)) and len(item) == 2:
        visit(item[0], "input")
        visit(item[1], "target")
    else:
        visit(item, "item")
    if not found:
        raise WorkloadError(f"{where} is {kind_of(item)}, which holds no tensor; leave it out")
    return found


def _rebuild(item: Any, columns: dict[str, Any]) -> Any:
    """Puts joined leaves into the nest that the items have."""

    def build(value: Any, name: str) -> Any:
        if name in columns:
            return columns[name]
        if isinstance(value, Mapping):
            return {key: build(value[key], f"{name}[{key!r}]") for key in value}
        return tuple(build(part, f"{name}[{place}]") for place, part in enumerate(value))

    if isinstance(item, (tuple, list)) and len(item) == 2:
        return build(item[0], "input"), build(item[1], "target")
    return build(item, "item")


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
    if isinstance(value, (tuple, list)):
        # A list of numbers, or of equally long lists of them.
        parts = [value]
        while isinstance(parts[0], (tuple, list)) and len({len(part) for part in parts}) == 1:
            if not (parts := [inner for part in parts for inner in part]):
                return False
            if not all(isinstance(part, (tuple, list)) for part in parts):
                return all(isinstance(part, (bool, int, float)) for part in parts)
        return False
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
) -> Batch:
    """Fetches examples by index, augments them if a seed is given, and prepares them.

    An item's index and `augment_seed` seed the global generators of torch, NumPy and `random` that
    its data set draws from, so an item read without `augment_seed` always looks alike.

    Args:
        indices: (B,) positions in `data`.
        augment_seed: Seeds `workload.augment`; None leaves augmentation out.

    Raises:
        WorkloadError: An item cannot be read, items do not fit into one batch, or `collate`,
            `augment` or `prepare` fails; naming the split and the examples.
    """
    split = _split_of(workload, data)
    while isinstance(data, Portion):
        data, indices = data.data, data.indices[indices]
    key = () if augment_seed is None else (augment_seed,)
    if isinstance(data, tuple):
        batch = Batch(*(take_rows(column, indices, split) for column in data))
    else:
        batch = _read_items(workload, data, indices.tolist(), split, key)
    if augment_seed is not None and workload.augment is not None:
        with seeded(augment_seed), _naming("augment", split, indices):
            batch = _changed(batch, workload.augment)
        if isinstance(batch.targets, Tensor) and batch.is_pair:
            inputs, size = batch.inputs, len(batch.targets)
            if not isinstance(inputs, Tensor) or len(inputs) != size:
                raise WorkloadError(
                    f"workload.augment: must return one tensor of {size} inputs, as many as it "
                    f"was given, not {kind_of(inputs)}"
                )
    if device is not None:
        batch = batch.map(lambda tensor: tensor.to(device))
    if workload.prepare is not None:
        seed = derive_seed("prepare", *key, *indices[:1].tolist())
        with seeded(seed), _naming("prepare", split, indices):
            batch = _changed(batch, workload.prepare)
    return batch


def _changed(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """Applies a workload's own function to the inputs of pairs, or to a whole batch."""
    inputs = function(batch.inputs)
    return Batch(inputs, batch.targets) if batch.is_pair else Batch(inputs, inputs)


def first_example(workload: Workload) -> Batch:
    """Fetches the first training example, not augmented, as a batch of one."""
    return take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))


def compare_readings(workload: Workload, data: Any, *seeds: int | None) -> list[bool]:
    """Returns whether inputs, and targets, of a few examples are the same under two seeds."""
    few = torch.arange(min(_NUM_COMPARED, num_examples(data)))
    one, other = (take_batch(workload, data, few, augment_seed=seed) for seed in seeds)
    return [is_alike(a, b) for a, b in zip(one, other, strict=True)]


def is_alike(one: object, other: object) -> bool:
    """Returns whether the tensors of two nests hold the same values; no others are compared."""
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=False))
    return all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


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
    workload: Workload, data: Any, indices: Sequence[int], split: str, key: tuple[int, ...]
) -> Batch:
    """Reads a data set's items, each under a seed of its own, so that batches may be cut anyhow."""
    own = workload.collate or (data.collate if isinstance(data, Loaded) else None)
    items = []
    with seeded(0):
        for index in indices:
            plant_seed(derive_seed("item", *key, index))
            items.append(read_item(data, index, split))
        if own is None:
            return collate(items, indices, split)
        return _collate_own(workload, own, items, indices, split)


def _collate_own(
    workload: Workload,
    function: Callable[[list[Any]], Any],
    items: list[Any],
    indices: Sequence[int],
    split: str,
) -> Batch:
    """Joins items by the user's function; names the example that it fails on."""

    def join(some: list[Any]) -> Any:
        try:
            return function(some)
        except (GbpError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - told by name below
            return error

    found = join(items)
    if isinstance(found, Exception):
        pairs = zip(indices, items, strict=True)
        bad = next((index for index, item in pairs if isinstance(join([item]), Exception)), None)
        where = f"example {bad}"
        if bad is None:
            where = f"examples {name_some([str(index) for index in indices])} together"
        raise WorkloadError(
            f"workload.collate raised {in_one_line(found)} on {where} of workload.{split}; it "
            "takes a list of items and returns (inputs, targets) or another nest of tensors"
        ) from found
    batch = Batch.of(map_tensors(found, lambda tensor: tensor))
    if size_of(batch.targets) not in (0, len(items)) and workload.count in (None, len):
        raise WorkloadError(
            f"workload.collate: makes {size_of(batch.targets)} rows of {len(items)} examples of "
            f"workload.{split}, so that it is not known what their loss is a mean over; keep one "
            "row for each, or give Workload a count"
        )
    if not size_of(batch.targets):
        raise WorkloadError(
            f"workload.collate: returned {kind_of(found)} for {len(items)} examples of "
            f"workload.{split}; it must return (inputs, targets) or another nest of tensors"
        )
    return batch


def _split_of(workload: Workload, data: Any) -> str:
    """Names the split that an index counts in; one that is set aside is part of the training's."""
    names = [name for name in ("train", "test", "validation") if getattr(workload, name) is data]
    is_aside = names == ["validation"] and isinstance(data, Portion)
    return "train" if is_aside or not names else names[0]
