"""Labels of axes: which positions of which weights go together.

Each position of each axis of a weight is an element; elements that are coupled form the sets of a
union-find. The axes of a value in the graph are labelled with elements. Axes that a reshape has
split are labelled together: of the heads and channels (H, D) of attention, each pair has its own
element, until an operator couples all channels of a head. What stays undecided at the end is
decided so that most units remain, and always so that the elements that go form whole rows of such a
table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gbp_ray.pruning.structure import Role

__all__ = ["FIXED", "Block", "Elements", "Labelled", "Tracing", "Work"]

FIXED = 0
"""The element of positions that must stay, such as constants that no weight makes."""


class Elements:
    """A union-find over positions of axes, with the reasons why some sets are no units."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        self._frozen: dict[int, str] = {FIXED: "made by no weight"}
        self._heads: set[int] = set()

    def new(self, size: int) -> np.ndarray:
        """Makes elements, each a set of its own."""
        first = len(self._parent)
        self._parent.extend(range(first, first + size))
        return np.arange(first, first + size)

    def find(self, element: int) -> int:
        """Returns the representative of a set."""
        parent = self._parent
        while parent[element] != element:
            parent[element] = parent[parent[element]]
            element = parent[element]
        return element

    def find_all(self, ids: np.ndarray) -> np.ndarray:
        """Returns the representatives, in the same shape."""
        found = np.fromiter((self.find(i) for i in ids.reshape(-1).tolist()), np.int64, ids.size)
        return found.reshape(ids.shape)

    def tie(self, some: np.ndarray, others: np.ndarray, why: str) -> None:
        """Couples elements pairwise; one that is coupled to a fixed position is frozen."""
        some, others = np.broadcast_arrays(some, others)
        for a, b in zip(some.reshape(-1).tolist(), others.reshape(-1).tolist(), strict=True):
            a, b = self.find(a), self.find(b)
            if a == b:
                continue
            if FIXED in (a, b):
                self._freeze(max(a, b), f"{why}, with what no weight makes")
                continue
            # The first made represents: it belongs to the weight that comes first.
            a, b = min(a, b), max(a, b)
            self._parent[b] = a
            reason = self._frozen.get(a) or self._frozen.pop(b, "")
            if reason:
                self._frozen[a] = reason
            if b in self._heads:
                self._heads.add(a)

    def tie_together(self, ids: np.ndarray, axis: int, why: str) -> None:
        """Couples all elements along an axis of a table."""
        rows = np.moveaxis(ids, axis, 0)
        self.tie(rows[1:], rows[:1], why)

    def freeze(self, ids: np.ndarray, why: str) -> None:
        """Notes that the sets of some elements are no units."""
        for element in ids.reshape(-1).tolist():
            self._freeze(self.find(element), why)

    def mark_heads(self, ids: np.ndarray) -> None:
        """Notes that the sets of some elements are heads of attention."""
        self._heads.update(self.find(element) for element in ids.reshape(-1).tolist())

    def is_head(self, element: int) -> bool:
        """Returns whether an element belongs to a head."""
        return self.find(element) in self._heads

    def why_frozen(self, element: int) -> str:
        """Returns why the set of an element is no unit, or ""."""
        return self._frozen.get(self.find(element), "")

    def _freeze(self, root: int, why: str) -> None:
        self._frozen.setdefault(root, why)


@dataclass(frozen=True, eq=False)
class Block:
    """The elements of some axes of a value: a table as long on each side as the axis is."""

    dims: tuple[int, ...]
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Labelled:
    """A value of the graph: its shape, and blocks for the axes that are labelled.

    Attributes:
        weight: First name of the parameter that this is a view of, or "".
        buffers: First names of the buffers of one axis that this was computed from, element by
            element, and from nothing else.
        is_constant: It does not depend on the network's inputs.
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    weight: str = ""
    buffers: tuple[str, ...] = ()
    is_constant: bool = False

    def block_of(self, dim: int) -> Block | None:
        """Returns the block that an axis lies in."""
        return next((block for block in self.blocks if dim in block.dims), None)

    def as_value(self) -> Labelled:
        """Drops the names of weights or buffers: this is computed from them."""
        return replace(self, weight="", buffers=())

    def moved(self, shape: Sequence[int], to: Mapping[int, int]) -> Labelled:
        """Renumbers axes; blocks of an axis that `to` lacks are dropped."""
        blocks = tuple(
            Block(tuple(to[dim] for dim in block.dims), block.ids)
            for block in self.blocks
            if all(dim in to for dim in block.dims)
        )
        return replace(self, shape=tuple(shape), blocks=blocks)


@dataclass
class Work:
    """Multiply-adds of an operation: what does not change, and the tables of what does."""

    factor: int
    tables: list[np.ndarray]
    name: str


@dataclass
class Tracing:
    """What the rules work with.

    Attributes:
        where: Of the operation at hand, for reasons.
        roles: Element of a weight to its roles, once a rule has used it.
        path: Of the module that makes it, "" for the network.
        tables: Of axes that are labelled together, with that path, to be decided at the end.
        zeros: The elements of each run of zeros that is padded in.
        ids: The elements of (tensor, axis), of weights and of those buffers that have channels.
        seen: First names of the parameters that operations use.
        is_refused: No rule could say what the operation at hand multiplies.
    """

    elements: Elements = field(default_factory=Elements)
    where: str = ""
    path: str = ""
    roles: dict[int, set[Role]] = field(default_factory=dict)
    tables: list[tuple[str, np.ndarray]] = field(default_factory=list)
    zeros: list[np.ndarray] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    ids: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    is_refused: bool = False

    def label(self, name: str, shape: tuple[int, ...]) -> tuple[Block, ...]:
        """Returns the blocks of a weight or buffer; an axis of size 1 has none."""
        blocks = []
        for dim, size in enumerate(shape):
            if size > 1:
                if (name, dim) not in self.ids:
                    self.ids[name, dim] = self.elements.new(size)
                blocks.append(Block((dim,), self.ids[name, dim]))
        return tuple(blocks)

    def add_zeros(self, size: int) -> np.ndarray:
        """Makes elements of zeros, which go with the units that are added to them."""
        ids = self.elements.new(size)
        self.zeros.append(ids)
        return ids

    def label_buffer(self, value: Labelled) -> Labelled:
        """Labels what buffers of one axis make, whatever axes of size 1 it has been given."""
        axes = [dim for dim, size in enumerate(value.shape) if size > 1]
        if not value.buffers or len(axes) != 1 or value.blocks:
            return value
        size = value.shape[axes[0]]
        (block,), *others = (self.label(name, (size,)) for name in value.buffers)
        for (other,) in others:
            self.elements.tie(block.ids, other.ids, self.where)
        return replace(value, blocks=(Block((axes[0],), block.ids),))

    def simplify(self, value: Labelled) -> Labelled:
        """Drops the axes along which all elements are coupled: these stay whole."""
        blocks = []
        for block in value.blocks:
            ids = self.elements.find_all(block.ids)
            keep = [
                place
                for place in range(ids.ndim)
                if ids.shape[place] > 1 and (ids != ids.take([0], axis=place)).any()
            ]
            if not keep:
                continue
            index = tuple(slice(None) if place in keep else 0 for place in range(ids.ndim))
            # A set that fills an axis by itself stays in the block of no axis: nothing reads it.
            blocks.append(Block(tuple(block.dims[place] for place in keep), block.ids[index]))
        return replace(value, blocks=tuple(blocks))

    def whole(self, value: Labelled, *dims: int) -> Labelled:
        """Couples all elements along some axes, which so stay whole."""
        for dim in dims:
            block = value.block_of(dim % max(len(value.shape), 1))
            if block is not None:
                place = block.dims.index(dim % len(value.shape))
                self.elements.tie_together(block.ids, place, self.where)
                if block.ids.ndim == 1:
                    self.elements.freeze(block.ids, self.where)
        return self.simplify(value)

    def freeze(self, value: Labelled, why: str = "") -> None:
        """Freezes all elements of a value."""
        for block in value.blocks:
            self.elements.freeze(block.ids, why or self.where)

    def couple(
        self,
        values: Sequence[Labelled],
        letters: Sequence[str],
        out: str,
        macs_each: int | None = None,
    ) -> Labelled:
        """Couples values along axes of the same letter, of which those in `out` remain.

        An axis of which one value has elements and another has none, although it is as long, is
        frozen. The result's blocks come from the values in turn.

        Args:
            letters: A letter for each axis of each value.
            macs_each: Notes so many multiply-adds for each combination of letters.
        """
        sizes: dict[str, int] = {}
        for value, word in zip(values, letters, strict=True):
            for letter, size in zip(word, value.shape, strict=True):
                sizes[letter] = max(sizes.get(letter, 1), size)
        tables: dict[tuple[str, ...], np.ndarray] = {}
        for value, word in zip(values, letters, strict=True):
            for block in value.blocks:
                self._add_table(tables, tuple(word[dim] for dim in block.dims), block.ids)
        labelled = {letter for key in tables for letter in key}
        for value, word in zip(values, letters, strict=True):
            for dim, letter in enumerate(word):
                if letter not in labelled or value.shape[dim] < sizes[letter]:
                    continue
                if value.block_of(dim) is None:
                    for key, table in tables.items():
                        if letter in key:
                            self._fix(table, key.index(letter))
        # What is summed over leaves no trace in a table of the other axes.
        every = "".join(dict.fromkeys(letter for word in letters for letter in word))
        joint = Labelled(
            tuple(sizes[letter] for letter in every),
            tuple(
                Block(tuple(every.index(letter) for letter in key), table)
                for key, table in tables.items()
            ),
        )
        joint = self.simplify(joint)
        if macs_each is not None:
            self._note_work(joint, macs_each, next((v.weight for v in values if v.weight), ""))
        for dim in (every.index(letter) for letter in every if letter not in out):
            found = joint.block_of(dim)
            if found is not None and len(found.dims) > 1:
                joint = self.whole(joint, dim)
        place = {every.index(letter): out.index(letter) for letter in out if letter in every}
        return joint.moved(tuple(sizes.get(letter, 1) for letter in out), place)

    def _note_work(self, joint: Labelled, factor: int, name: str) -> None:
        for dim, size in enumerate(joint.shape):
            if joint.block_of(dim) is None:
                factor *= size
        self.work.append(Work(factor, [block.ids for block in joint.blocks], name))

    def _fix(self, table: np.ndarray, place: int) -> None:
        self.elements.tie_together(table, place, self.where)
        if table.ndim == 1:
            self.elements.freeze(table, self.where)

    def _add_table(
        self, tables: dict[tuple[str, ...], np.ndarray], key: tuple[str, ...], ids: np.ndarray
    ) -> None:
        """Couples a table with those that share a letter, spread to the letters of both."""
        for other in [found for found in tables if set(found) & set(key)]:
            theirs = tables.pop(other)
            joint = other + tuple(letter for letter in key if letter not in other)
            mine, theirs = _spread(ids, key, joint), _spread(theirs, other, joint)
            self.elements.tie(mine, theirs, self.where)
            ids = np.broadcast_arrays(mine, theirs)[1]
            key = joint
        tables[key] = ids

    def plays(self, role: Role, value: Labelled, dim: int) -> None:
        """Notes the role of an axis of a weight, or of what is computed from weights."""
        block = value.block_of(dim)
        if value.is_constant and block is not None:
            for element in block.ids.reshape(-1).tolist():
                self.roles.setdefault(element, set()).add(role)


def _spread(ids: np.ndarray, key: tuple[str, ...], joint: tuple[str, ...]) -> np.ndarray:
    order = sorted(range(len(key)), key=lambda place: joint.index(key[place]))
    sizes = dict(zip(key, ids.shape, strict=True))
    return ids.transpose(order).reshape([sizes.get(letter, 1) for letter in joint])
