"""Finds the units of a network: follows every axis of every weight through its graph.

The graph is that of `torch.export`, in eval mode. Each position of each axis of a weight is an
element; rules (`axis_rules`) say for each operator which elements it couples, and those end in one
set of a union-find. A set is a unit if some weight makes it and some weight reads it. An operator
without a rule, or one that looks at an axis as a whole, such as a softmax, freezes what it touches,
and the reason is kept.

The axes of a value in the graph are labelled with elements. Axes that a reshape has split are
labelled together: of the heads and channels (H, D) of attention, each pair has its own element,
until an operator couples all channels of a head. What stays undecided at the end is decided so that
most units remain, and always so that the elements that go form whole rows of such a table.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gbp_ray.errors import PruneError, in_one_line
from gbp_ray.pruning.structure import Axis, Group, Product, Role, Slice, Structure
from gbp_ray.workloads.contract import in_mode

__all__ = ["FIXED", "Block", "Elements", "Labelled", "Tracing", "Work", "find_structure"]

FIXED = 0
"""The element of positions that no weight makes."""


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
                self._freeze(max(a, b), why)
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
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    weight: str = ""

    def block_of(self, dim: int) -> Block | None:
        """Returns the block that an axis lies in."""
        return next((block for block in self.blocks if dim in block.dims), None)

    def as_value(self) -> Labelled:
        """Drops the name of the weight: this is computed from it."""
        return replace(self, weight="")

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
        tables: Of axes that are labelled together, to be decided at the end.
    """

    elements: Elements = field(default_factory=Elements)
    where: str = ""
    roles: dict[int, set[Role]] = field(default_factory=dict)
    tables: list[np.ndarray] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

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
        """Notes the role of an axis of a weight, or of a view of one."""
        block = value.block_of(dim)
        if value.weight and block is not None:
            for element in block.ids.reshape(-1).tolist():
                self.roles.setdefault(element, set()).add(role)


def _spread(ids: np.ndarray, key: tuple[str, ...], joint: tuple[str, ...]) -> np.ndarray:
    order = sorted(range(len(key)), key=lambda place: joint.index(key[place]))
    sizes = dict(zip(key, ids.shape, strict=True))
    return ids.transpose(order).reshape([sizes.get(letter, 1) for letter in joint])


# -- the graph -------------------------------------------------------------------------------------


def find_structure(
    model: nn.Module,
    inputs: Sequence[Tensor],
    run: Callable[..., Sequence[Tensor]],
    exclude: Iterable[str] = (),
) -> Structure:
    """Finds the units of a network and what they cost, from one example.

    Args:
        model: Unsharded, on any device, the meta device included. It is left as it is.
        inputs: The tensors of one example.
        run: (model, *inputs) -> the outputs that count.
        exclude: First names of parameters that no unit may lie in.

    Raises:
        PruneError: torch.export cannot follow the network.
    """
    from gbp_ray.pruning.axis_rules import apply_rule

    program = _export(model, inputs, run)
    tracing = Tracing()
    names = _first_names(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ids: dict[tuple[str, int], np.ndarray] = {}
    env: dict[Any, Any] = {}
    signature = program.graph_signature
    of_inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    program.graph.eliminate_dead_code()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = names.get(of_inputs.get(node.name, "").removeprefix("network."), "")
            env[node] = _label(node, name, tracing, ids)
        elif node.op == "output":
            tracing.where = "the network's outputs"
            for source in node.all_input_nodes:
                if isinstance(env[source], Labelled):
                    tracing.freeze(env[source])
        else:
            tracing.where = _describe(node)
            env[node] = apply_rule(tracing, node, env)
    for name in exclude:
        for (owner, _), own in ids.items():
            if owner == name:
                tracing.elements.freeze(own, "prune.exclude")
    _decide_tables(tracing)
    return _build(tracing, ids, tensors, {n for n, _ in model.named_parameters()})


class _Passing(nn.Module):
    """A network with the pass that a workload makes through it."""

    def __init__(self, network: nn.Module, run: Callable[..., Sequence[Tensor]]) -> None:
        super().__init__()
        self.network, self._run = network, run

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._run(self.network, *inputs))


def _export(
    model: nn.Module, inputs: Sequence[Tensor], run: Callable[..., Sequence[Tensor]]
) -> Any:
    # The copy shares the tensors: export puts others in their place while it looks.
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    try:
        with warnings.catch_warnings(), in_mode(twin, is_training=False), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(_Passing(twin, run).eval(), tuple(inputs), strict=False)
    except Exception as error:
        raise PruneError(
            "prune.granularity: torch.export cannot follow this network "
            f"({in_one_line(error)[:200]}); units of it are not known, so set granularity to "
            '"weight", or avoid what it names'
        ) from error


def _first_names(model: nn.Module) -> dict[str, str]:
    """Maps every name of a parameter or buffer to its first one."""
    first: dict[int, str] = {}
    pairs = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: first.setdefault(id(tensor), name) for name, tensor in pairs}


def _label(
    node: Any, name: str, tracing: Tracing, ids: dict[tuple[str, int], np.ndarray]
) -> Labelled | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(int(size) for size in value.shape)
    if not name:
        return Labelled(shape)
    blocks = []
    for dim, size in enumerate(shape):
        if size > 1:
            if (name, dim) not in ids:
                ids[name, dim] = tracing.elements.new(size)
            blocks.append(Block((dim,), ids[name, dim]))
    return Labelled(shape, tuple(blocks), name)


def _describe(node: Any) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    path = paths[-1].removeprefix("network").lstrip(".") if paths else ""
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
    return f"{name} in '{path}'" if path else str(name)


def _decide_tables(tracing: Tracing) -> None:
    """Couples elements until those of each table go by whole rows of one of its axes."""
    elements, is_changed = tracing.elements, True
    while is_changed:
        is_changed = False
        for table in tracing.tables:
            (block,) = tracing.simplify(
                Labelled(table.shape, (Block(tuple(range(table.ndim)), table),))
            ).blocks or (None,)
            if block is None or block.ids.ndim == 1:
                continue
            kept = int(np.argmax(block.ids.shape))
            rows = np.moveaxis(block.ids, kept, 0).reshape(block.ids.shape[kept], -1)
            elements.tie_together(rows, 1, "a reshape")
            is_changed = True


def _build(
    tracing: Tracing,
    ids: Mapping[tuple[str, int], np.ndarray],
    tensors: Mapping[str, Tensor],
    parameters: set[str],
) -> Structure:
    elements = tracing.elements
    places: dict[int, list[tuple[str, int, list[int]]]] = {}
    for (name, dim), own in ids.items():
        roots = elements.find_all(own)
        if (roots == roots[0]).all():
            elements.freeze(roots[:1], "would leave nothing of the axis")
        by_root: dict[int, list[int]] = {}
        for position, root in enumerate(roots.tolist()):
            by_root.setdefault(root, []).append(position)
        for root, positions in by_root.items():
            places.setdefault(root, []).append((name, dim, positions))

    def role_of(name: str, dim: int) -> set[Role]:
        return tracing.roles.get(int(ids[name, dim][0]), set())

    units: dict[tuple[Any, ...], list[int]] = {}
    for root, found in places.items():
        roles = {r for name, dim, _ in found if name in parameters for r in role_of(name, dim)}
        if not {"in", "out"} <= roles:
            elements.freeze(np.array([root]), "no weight both makes and reads it")
        if not elements.why_frozen(root):
            signature = tuple((name, dim, len(positions)) for name, dim, positions in found)
            units.setdefault(signature, []).append(root)
    groups: list[Group] = []
    group_of: dict[int, int] = {}
    for signature, members in units.items():
        slices = tuple(
            Slice(
                name,
                dim,
                np.array([places[root][number][2] for root in members]),
                "in" if "in" in role_of(name, dim) else "out",
            )
            for number, (name, dim, _) in enumerate(signature)
        )
        makers = [name for name, dim, _ in signature if "out" in role_of(name, dim)]
        kind = "head" if elements.is_head(members[0]) else "channel"
        group_of.update(dict.fromkeys(members, len(groups)))
        groups.append(Group(makers[0], kind, len(members), slices))  # type: ignore[arg-type]

    def axis_of(table: np.ndarray) -> Axis:
        roots = elements.find_all(table).reshape(-1).tolist()
        counts: dict[int, int] = {}
        for root in roots:
            if root in group_of:
                counts[group_of[root]] = counts.get(group_of[root], 0) + 1
        per_unit = tuple((g, n // groups[g].num_units) for g, n in sorted(counts.items()))
        return Axis(len(roots) - sum(counts.values()), per_unit)

    def product_of(factor: int, tables: Iterable[np.ndarray], name: str) -> Product:
        axes = []
        for table in tables:
            axis = axis_of(table)
            if axis.per_unit:
                axes.append(axis)
            else:
                factor *= axis.fixed
        return Product(factor, tuple(axes), name)

    weights = []
    for name in sorted(parameters):
        shape = tensors[name].shape
        known = [ids[name, dim] for dim in range(len(shape)) if (name, dim) in ids]
        factor = int(
            np.prod([n for dim, n in enumerate(shape) if (name, dim) not in ids], initial=1)
        )
        weights.append(product_of(factor, known, name))
    shapes = {part.name: tuple(tensors[part.name].shape) for g in groups for part in g.slices}
    frozen = {
        f"{name}[{dim}]": elements.why_frozen(int(own[0]))
        for (name, dim), own in ids.items()
        if "out" in role_of(name, dim) and all(map(elements.why_frozen, own.tolist()))
    }
    return Structure(
        tuple(groups),
        tuple(product_of(work.factor, work.tables, work.name) for work in tracing.work),
        tuple(weights),
        {name: tensors[name].element_size() for name in parameters},
        shapes,
        frozen,
    )
