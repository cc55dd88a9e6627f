"""Fewer examples for quick trials."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Subset

from gbp_ray.errors import WorkloadError

__all__ = ["take_examples"]


def take_examples(split: Any, count: int | None, option: str) -> Any:
    """Keeps some examples of a split.

    Args:
        split: A pair of arrays, of which the first examples are kept, or a data set, of which
            evenly spread ones are kept, because folders of images come class by class.
        count: How many; None keeps all.
        option: Name of the option that holds the count, for messages.

    Raises:
        WorkloadError: The count is not a whole number from 1 to the size of the split.
    """
    if count is None:
        return split
    total = len(split[1]) if isinstance(split, tuple) else len(split)
    is_whole = isinstance(count, int) and not isinstance(count, bool)
    if not is_whole or not 1 <= count <= total:
        raise WorkloadError(
            f"workload.options.{option} = {count!r}: must be a whole number from 1 to {total}, "
            "or left out to take all examples"
        )
    if isinstance(split, tuple):
        return tuple(column[:count] for column in split)
    return Subset(split, [index * total // count for index in range(count)])
