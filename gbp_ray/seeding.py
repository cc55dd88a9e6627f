"""Random numbers that depend on seeds and on nothing else: not on what was drawn before."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["derive_seed", "plant_seed", "seeded", "shuffled_indices"]

_SPARE: list[np.random.MT19937] = []
"""Generators that no block uses; making one takes 0.5 ms."""


def derive_seed(*parts: object) -> int:
    """Turns a tuple such as (seed, "augment", step, part) into 63 random-looking bits."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class seeded:  # noqa: N801 - reads as a statement: with seeded(7): ...
    """Seeds the global generators of torch, NumPy and `random` in a block, and restores them after.

    A normal number that NumPy has drawn ahead is lost. The generators are the process's own, so
    blocks of several threads at once disturb each other's draws.
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
